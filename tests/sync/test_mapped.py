"""What an engine is told of memory that it maps: by handle on a GPU, by path without one."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from fp8slurm.engine.inside.recorded import KNOWN
from fp8slurm.sync.bucket import WeightSpec
from fp8slurm.sync.mapped import MappedBucket, MappedTransport, flat_bucket, memory_handle

FORMS = [("a.weight", "float8_e4m3fn", (4, 8), 0), ("a.weight_scale_inv", "float32", (1, 1), 32)]


def opened(bucket: str) -> dict[str, Any]:
    return pickle.loads(base64.b64decode(bucket))


def check_forms(metadata: list[Any]) -> None:
    assert [(m.name, m.dtype, tuple(m.shape), m.start_idx, m.end_idx) for m in metadata] == [
        ("a.weight", torch.float8_e4m3fn, (4, 8), 0, 32),
        ("a.weight_scale_inv", torch.float32, (1, 1), 32, 36),
    ]


def test_a_file_is_named_by_its_path(tmp_path: Path) -> None:
    got = opened(flat_bucket(memory_handle(tmp_path / "weights"), FORMS))
    assert got["flattened_tensor"] == str(tmp_path / "weights")
    check_forms(got["metadata"])


def test_each_rank_of_an_engine_maps_its_own_gpus_copy_and_a_new_engine_is_told_everything(tmp_path: Path) -> None:
    """A bucket is named in full once; an engine that was started anew has forgotten that, and would not know its number."""
    specs = tuple(WeightSpec(name, getattr(torch, dtype), shape, at) for name, dtype, shape, at in FORMS)
    handles = tuple(memory_handle(tmp_path / f"rank{r}") for r in range(4))
    bucket = MappedBucket(1, specs, torch.empty(0, dtype=torch.uint8), handles=handles)
    asked: list[list[str]] = []
    transport = MappedTransport(ranks=(1, 3))
    for _ in range(2):  # the engine's first start, and another
        transport.open(SimpleNamespace(receive_handles=asked.append), 2)
        for _ in range(2):
            transport.start(bucket)
            transport.finish()
        transport.close(True)
    got = [[opened(text) for text in one] for one in asked]
    assert [[g["flattened_tensor"] for g in one] for one in got] == [
        [str(tmp_path / "rank1"), str(tmp_path / "rank3")]
    ] * 4
    for one in got[::2]:
        check_forms(one[0]["metadata"])
    for one in got[1::2]:
        (known,) = one[0]["metadata"]
        assert known.name.startswith(KNOWN) and (known.start_idx, known.end_idx) == (0, 36)


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
