"""Torch's allocator on GPUs that trainer and engines share."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import reduce_tensor

from fp8slurm.core import gpu_memory as memory


@pytest.mark.parametrize(
    ("given", "expandable", "wanted"),
    [
        ("", True, "expandable_segments:True"),
        ("max_split_size_mb:64", False, "max_split_size_mb:64,expandable_segments:False"),
        ("expandable_segments:True,max_split_size_mb:64", False, "expandable_segments:False,max_split_size_mb:64"),
        (
            "roundup_power2_divisions:[256:1,512:2]",
            True,
            "roundup_power2_divisions:[256:1,512:2],expandable_segments:True",
        ),
    ],
)
def test_other_settings_are_said_again(given: str, expandable: bool, wanted: str) -> None:
    assert memory.settings(given, expandable) == wanted


@pytest.mark.parametrize(
    ("said", "wanted"), [(None, True), ("max_split_size_mb:64", True), ("expandable_segments:False", False)]
)
def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch, said: str | None, wanted: bool) -> None:
    """In a process with a GPU, and torch's own call: the setting is made, taken back for what engines map, and made again."""
    made: list[str] = []
    for name in memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if said is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "_set", lambda on: made.append(memory.settings(memory.given(), on)))
    memory.use_expandable_segments()
    with pytest.raises(RuntimeError, match="inside"), memory.mappable():
        raise RuntimeError("inside")
    other = "" if said is None else f"{said},"
    assert made == ([f"{other}expandable_segments:{on}" for on in (True, False, True)] if wanted else [])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_what_engines_map_lies_in_no_expandable_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    memory.use_expandable_segments()
    ordinary = torch.empty(2**25, dtype=torch.uint8, device="cuda")
    del ordinary  # its memory is free and large enough, but cannot be mapped
    with memory.mappable():
        mapped = torch.empty(2**25, dtype=torch.uint8, device="cuda")
    ordinary = torch.empty(2**25, dtype=torch.uint8, device="cuda")

    def is_expandable(tensor: torch.Tensor) -> bool:
        at = tensor.data_ptr()
        (found,) = [s for s in torch.cuda.memory_snapshot() if s["address"] <= at < s["address"] + s["total_size"]]
        return found["is_expandable"]

    assert is_expandable(ordinary) and not is_expandable(mapped)
    assert reduce_tensor(mapped)  # an IPC handle can be had
