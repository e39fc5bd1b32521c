"""FP8 primary weights with Adam in host memory, FP8 emulated: byte for byte against Megatron's own CPU-offloaded Adam of
BF16 weights, on one rank and on two (data- and expert-parallel), and through checkpoints of all four kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from trainer_reference import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("models")
    return {"dense": write_model(at / "dense"), "moe": write_model(at / "moe", moe=True)}


def check_against_hybrid(got: dict[str, Any], weights: int) -> None:
    assert got["unlike 1"] == got["unlike 20"] == [], "masters, moments, codes and scales"
    assert got["losses"] and got["fp8"] == got["codes"] == weights
    assert got["moved"] > 4 * weights, "twenty steps are not one"
    assert all(rounds > 3 for rounds in got["rounds"]), got


def test_one_rank(launch: Callable[..., Any], models: dict[str, Path]) -> None:
    """Every kind is continued as every other; the gradients of FP8 weights are those of the BF16 weights that they come
    from, also from a folder and a checkpoint (a transposed copy that was left behind gives data gradients of zero)."""
    done = launch("one", 1, ["dense", "changes"], module="host_adam_scenarios", **models)
    check_against_hybrid(done.result("dense"), 8)
    got = done.result("changes")
    assert got["folder"] == got["state"] == got["gradients"] == [], got
    assert got["losses"] == [True] * 16
    assert got["kernel"] == [], "Megatron's offload and ours step alike, also after a resume from Adam on the GPU"
    assert got["smallest"] > 1e-3


def test_two_ranks(launch: Callable[..., Any], models: dict[str, Path]) -> None:
    done = launch("two", 2, ["dense", "ep2", "other_layout"], module="host_adam_scenarios", **models)
    for rank in range(2):
        check_against_hybrid(done.result("dense", rank), 8)
        check_against_hybrid(done.result("ep2", rank), 12)
        done.result("other_layout", rank)
    folders = [done.folder / name for name in ("dp2", "tp2")]
    found = [dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata for folder in folders]
    tensors = {k: v for k, v in found[0].items() if hasattr(v, "properties")}
    assert len(tensors) > 30 and tensors.keys() <= found[1].keys()
    files = [{k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in tensors.items()} for _ in folders]
    for state, folder in zip(files, folders):
        dcp.load(state, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    assert [k for k in tensors if not torch.equal(files[0][k], files[1][k])] == []
