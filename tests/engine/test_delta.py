"""The bytes in which two states of a bucket differ: found, encoded, put into place."""

from __future__ import annotations

import pytest
import torch

from fp8slurm.engine.inside import delta


def states(size: int, changed: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two payloads of `size` bytes that differ in `changed` places, the first and the last among them."""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    new, places = old.clone(), torch.randperm(size, generator=generator)[:changed]
    if changed > 1:
        places[:2] = torch.tensor([0, size - 1])
    places = places.unique()
    new[places] += torch.randint(1, 256, (len(places),), generator=generator, dtype=torch.uint8)
    return old, new


@pytest.mark.parametrize("size", [1, 7, 8, 4099, delta.CHUNK, delta.CHUNK + 3, 5 * delta.CHUNK - 1])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 1.0])
@pytest.mark.parametrize("window", [5, delta.WINDOW])
def test_what_is_put_into_place_is_the_new_state(monkeypatch, size: int, share: float, window: int) -> None:
    if window < delta.WINDOW and size > delta.CHUNK:
        window = 4001
    monkeypatch.setattr(delta, "WINDOW", window)
    old, new = states(size, int(size * share))
    at = delta.positions(old, new, size)
    assert at is not None and torch.equal(at, (old != new).nonzero().flatten())
    encoded = delta.encode(at, new)
    assert encoded.numel() == delta.encoded_bytes(size, at.numel())
    delta.apply(encoded, at.numel(), old)
    assert torch.equal(old, new)


def test_more_changes_than_may_be_are_none() -> None:
    old, new = states(100_000, 500)
    found = delta.positions(old, new, 100_000)
    assert found is not None and delta.positions(old, new, found.numel()) is not None
    assert delta.positions(old, new, found.numel() - 1) is None and delta.positions(old, new, 0) is None
    assert delta.positions(old, old, 0).numel() == 0  # type: ignore[union-attr]


def test_every_damaged_byte_changes_the_checksum() -> None:
    old, new = states(70_000, 150)
    at = delta.positions(old, new, 70_000)
    assert at is not None
    encoded = delta.encode(at, new)
    right = delta.checksum(encoded)
    for i in range(encoded.numel()):
        damaged = encoded.clone()
        damaged[i] ^= 1 << (i % 8)
        assert delta.checksum(damaged) != right, i
    two = encoded.clone()
    two[:8] = encoded[:8].roll(4)  # words that change places
    assert torch.equal(two, encoded) or delta.checksum(two) != right


def test_a_length_that_cannot_be_is_refused() -> None:
    old, new = states(1000, 10)
    at = delta.positions(old, new, 1000)
    assert at is not None
    encoded = delta.encode(at, new)
    with pytest.raises(ValueError, match=f"a delta of {at.numel() + 2} changed bytes of 1000 has"):
        delta.apply(encoded, at.numel() + 2, old)
    with pytest.raises(ValueError, match="of 70000 has"):
        delta.apply(encoded, at.numel(), torch.zeros(70_000, dtype=torch.uint8))
