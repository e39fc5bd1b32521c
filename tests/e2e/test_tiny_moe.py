"""The whole loop with a mixture of experts: two ranks that share them, an engine that has all of them, replay."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fp8slurm.checkpoint import hf_to_fp8, torch_dist_to_hf
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.models.spec import ModelSpec
from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow

SFT_STEPS, STEPS = 14, 20


@pytest.fixture(scope="module")
def run(tiny_runs) -> Path:
    """A run of one RL step, continued to step 20."""
    runs = tiny_runs(
        16, moe=True, recipe="tiny-moe-fp8", data__eval=None, sft__max_steps=SFT_STEPS, sft__batch_size=64,
        sft__stop_accuracy=1, rollout__prompts_per_step=6, rollout__max_replacements=1, checkpoint__every=STEPS,
        eval__every=0, sync__verify="always",
        # the second rank is the source of the last buckets only: it waits for room before it has filled one
        sync__transport="shared-memory", sync__bucket_bytes=2**18,
    )  # fmt: skip
    runs.run("moe", run__steps=1)
    return runs.run("moe", run__steps=STEPS)


@pytest.mark.parametrize(("attempt", "step"), [(0, 1), (1, STEPS)])
def test_the_engine_held_the_converters_bytes(run, tmp_path, attempt, step):
    """Codes and scales of every expert after 1 and 20 updates: what the converter writes, to the byte."""
    torch_dist_to_hf(run / "checkpoints" / f"step_{step:06d}", tmp_path / "hf", origin_hf_dir=run.parents[1] / "model")
    hf_to_fp8(tmp_path / "hf", tmp_path / "fp8")
    spec = ModelSpec.from_hf_dir(tmp_path / "fp8")
    tensors = {k: v for f in (tmp_path / "fp8").glob("*.safetensors") for k, v in load_file(f).items()}
    assert sum(".experts." in name and name.endswith("_scale_inv") for name in tensors) == 2 * 8 * 3
    held = json.loads((run / "attempts" / str(attempt) / "digests_0.json").read_text())
    assert held["version"] == SFT_STEPS + step

    def difference() -> str | None:
        expected = expected_digests(tensors.items(), num_key_value_heads=spec.num_kv_heads)
        return first_difference(held["digests"], expected)

    assert difference() is None
    codes = tensors["model.layers.1.mlp.experts.7.down_proj.weight"]
    codes.view(torch.uint8)[0, 0] ^= 1
    assert "layers.1.mlp.experts.w2_weight" in difference(), "one bit of the last expert must be seen"


def test_replay_does_not_widen_the_gap(run):
    """Experts at the wrong tokens would: their outputs differ from the engine's by far more than FP8 does."""
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    pairs = [(records[0][f"gap/{k}"], records[0][f"gap_no_replay/{k}"]) for k in ("mean_abs", "k3")]
    pairs += [(records[-1][f"final_gap/{k}"], records[-1][f"final_gap_no_replay/{k}"]) for k in ("mean_abs", "k3")]
    for (with_replay, without), room in zip(pairs, (1.2, 2.0, 1.2, 2.0)):  # k3 is carried by a few tokens
        assert 0 < with_replay < room * without
    assert any(a != b for a, b in pairs), "no token was routed otherwise: nothing was replayed"
    assert all(r["grad_norm"] > 0 for r in records[1:] if not r["skipped"])
    assert sum(not r["skipped"] for r in records[1:]) > STEPS / 2
