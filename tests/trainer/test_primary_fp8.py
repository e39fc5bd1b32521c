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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "dense")


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
