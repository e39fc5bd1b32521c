"""Masters of FP8 primary weights in Megatron's distributed optimizer and checkpoints, on two ranks without a GPU.

The tensor class is TransformerEngine's and needs a GPU (tools/gpu/param_gather_probe.py); everything around it is here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from trainer_reference import write_model

from fp8slurm.trainer.primary_fp8 import completed_together


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("piece", [1, 100, 10**6])
def test_weights_by_rounds(ranks: int, piece: int) -> None:
    """Every weight once; a rank's own fill its rounds in order, and what lies across ranks comes last and alone."""
    sizes = [40, 90, 10, 10, 200, 60, 60, 5, 300, 41]
    own = -(-sum(sizes) // ranks)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    places = [(end - size, end, i) for i, (size, end) in enumerate(zip(sizes, ends))]
    rounds = list(completed_together(places, own, ranks, piece))
    assert sorted(p for together in rounds for p in together) == places
    across = [p for p in places if p[0] // own != (p[1] - 1) // own]
    assert rounds[len(rounds) - len(across) :] == [[p] for p in across]
    for rank in range(ranks):
        mine = [[p for p in r if p[0] // own == rank] for r in rounds[: len(rounds) - len(across)]]
        filled = [sum(end - start for start, end, _ in r) for r in mine]
        assert all(f <= piece or len(r) == 1 for f, r in zip(filled, mine))
        assert [p for r in mine for p in r] == sorted(p for r in mine for p in r)
        assert all(filled[i + 1] == 0 for i in range(len(filled) - 1) if not filled[i]), "no rank waits in between"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_masters_are_what_is_saved(launch: Callable[..., Any], dense: Path, layout: str) -> None:
    done = launch(layout, 2, [f"{layout}_masters"], module="primary_scenarios", dense=dense)
    for rank in range(2):
        got = done.result(f"{layout}_masters", rank)
        mine, whole, weights, claimed = (got.pop(k) for k in ("mine", "all", "weights", "claimed"))
        assert weights == claimed == 8, "four a layer"
        assert (mine < whole) if layout == "dp2" else (mine == whole), "the masters are cut over data-parallel ranks"
        assert all(got.values()), (rank, got)
    plain, claimed = done.folder / "plain", done.folder / "claimed"
    found = dcp.FileSystemReader(str(plain)).read_metadata().state_dict_metadata
    tensors = {k: v for k, v in found.items() if hasattr(v, "properties")}
    model = {k for k in tensors if not k.startswith("optimizer.")}
    assert {tensors[k].properties.dtype for k in model} == {torch.bfloat16} and len(model) > 8
    files = [{k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in tensors.items()} for _ in range(2)]
    for state, folder in zip(files, (plain, claimed)):
        dcp.load(state, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    for key in tensors:
        a, b = (state[key].contiguous().view(torch.uint8) for state in files)
        assert torch.equal(a, b), f"{key}: with FP8 weights another checkpoint than without"
