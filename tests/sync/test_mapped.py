"""What an engine is told of memory that it maps: by handle on a GPU, by path without one."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8slurm.sync.mapped import flat_bucket, memory_handle
from torch.multiprocessing import reductions

FORMS = [("a.weight", "float8_e4m3fn", (4, 8), 0), ("a.weight_scale_inv", "float32", (1, 1), 32)]


def opened(bucket: str) -> dict[str, Any]:
    return pickle.loads(base64.b64decode(bucket))


def check_forms(metadata: list[Any]) -> None:
    assert [(m.name, m.dtype, tuple(m.shape), m.start_idx, m.end_idx) for m in metadata] == [
        ("a.weight", torch.float8_e4m3fn, (4, 8), 0, 32), ("a.weight_scale_inv", torch.float32, (1, 1), 32, 36),
    ]  # fmt: skip


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    got = opened(flat_bucket(memory_handle(tmp_path / "weights"), FORMS))
    assert got["flattened_tensor"] == str(tmp_path / "weights")
    check_forms(got["metadata"])


def test_the_memory_of_a_gpu_is_rebuilt_from_what_its_owner_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's arguments of torch's rebuild_cuda_tensor, through JSON, with the GPU's number made its UUID."""
    said = (
        torch.Tensor, torch.Size([36]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 3, b"\x00\xffhandle", 64, 128, False,
        b"counter\x80", 7, b"event\x81", True,
    )  # fmt: skip
    monkeypatch.setattr(reductions, "reduce_tensor", lambda tensor: (reductions.rebuild_cuda_tensor, said))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-7"))
    bucket = flat_bucket(memory_handle(torch.zeros(36, dtype=torch.uint8)), FORMS)
    rebuilt: list[Any] = []
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *arguments: rebuilt.append(arguments))
    check_forms(opened(bucket)["metadata"])
    (arguments,) = rebuilt
    assert arguments == (*said[:6], "GPU-7", *said[7:])
    assert [type(a) for a in arguments] == [type(a) if i != 6 else str for i, a in enumerate(said)]
