"""The environment is whole for transformers: it imports models, and loads the FP8 folders that we write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folders
import torch
from transformers import AutoModelForCausalLM

from fp8slurm.checkpoint import fp8_to_hf


def test_a_model_is_imported_as_anybody_would() -> None:
    """In a process of its own, with nothing of ours in it: a torchvision that does not load beside torch fails here."""
    code = "from transformers import Qwen3ForCausalLM, LlamaForCausalLM, AutoModelForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, f"older than requirements/cpu.txt? `make setup` makes it anew\n{done.stderr}"


@pytest.mark.parametrize(
    "more", [{}, tiny_folders.LLAMA, {"moe": True, "tie": False}], ids=["qwen3", "llama", "experts"]
)
def test_our_fp8_is_what_our_own_way_back_gives(tmp_path: Path, more: dict) -> None:
    """Without a GPU transformers dequantizes what it loads: the weights and logits of `fp8-to-hf`, to the bit."""
    _, fp8 = tiny_folders.make_fp8(tmp_path, seed=3, **more)
    fp8_to_hf(fp8, tmp_path / "back")
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in (fp8, tmp_path / "back")
    )
    want = ours.state_dict()
    got = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("_scale_inv")}
    assert sorted(got) == sorted(want)
    different = [name for name, tensor in want.items() if not torch.equal(tensor, got[name])]
    assert not different
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
