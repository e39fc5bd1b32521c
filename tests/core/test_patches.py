"""What is replaced in other libraries is there, is replaced once, and is listed."""

from __future__ import annotations

import types

import pytest

from fp8slurm.core import patches


class Library:
    def double(self, x: int) -> int:
        return 2 * x


NAME = f"{Library.__module__}.Library"


@pytest.fixture(autouse=True)
def nothing_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_applied", {})
    monkeypatch.setattr(Library, "double", Library.double)  # restored afterwards


def test_a_wrapper_gets_what_was_there() -> None:
    @patches.wrap(Library, "double")
    def more(original, self, x: int) -> int:
        return original(self, x) + 1

    assert Library().double(3) == 7 and patches.applied() == [f"{NAME}.double"]
    with pytest.raises(RuntimeError, match="double is patched already"):
        patches.patch(Library, "double", None)


def test_what_is_not_there_is_not_replaced() -> None:
    module = types.ModuleType("library")
    for owner, name in ((Library, f"{NAME}.halve"), (module, "library.halve")):
        with pytest.raises(RuntimeError, match=f"no {name}, which fp8slurm replaces"):
            patches.patch(owner, "halve", None)
        with pytest.raises(RuntimeError, match=name):
            patches.wrap(owner, "halve")(lambda original: None)
    assert patches.applied() == []


def test_one_object_for_a_while() -> None:
    one, other = Library(), Library()
    for _ in range(2):
        with patches.patched(one, "double", lambda x: 0):
            assert (one.double(3), other.double(3)) == (0, 6)
        assert one.double(3) == 6
    assert patches.applied() == [f"{NAME}.double"]
