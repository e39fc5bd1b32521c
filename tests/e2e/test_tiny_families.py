"""The whole loop with a tiny Qwen2.5 and a tiny Llama: SGLang's own classes serve what Megatron trains, byte by byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fp8slurm.checkpoint import hf_to_fp8, torch_dist_to_hf
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.models.spec import ModelSpec
from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow

SFT_STEPS, STEPS = 6, 4
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    # biases are cut over the trainer's ranks, gathered, stacked, and cut over the engine's
    "qwen2": {"slurm__ranks_per_node": 2, "parallel__tensor_parallel_size": 2, "engine__tensor_parallel_size": 2},
    "llama": {"slurm__ranks_per_node": 2, "parallel__pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_rl_steps(family: str, tiny_runs, tmp_path: Path) -> None:
    layout = LAYOUTS[family]
    runs = tiny_runs(
        16, family=family, data__eval=None, run__steps=STEPS, sft__max_steps=SFT_STEPS, sft__batch_size=64,
        sft__stop_accuracy=1, rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=1,
        checkpoint__every=STEPS, eval__every=0, sync__verify="always", **layout,
    )  # fmt: skip
    if family == "qwen2":  # questions and answers go beyond the original positions
        config = json.loads((path := runs.folder / "model" / "config.json").read_text())
        path.write_text(json.dumps(config | {"rope_scaling": YARN}))
    run = runs.run(family)
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    assert all(r["grad_norm"] > 0 for r in records[1:] if not r["skipped"])
    assert 0 < records[-1]["final_gap/mean_abs"] < 0.05

    origin, tp = run.parents[1] / "model", layout.get("engine__tensor_parallel_size", 1)
    torch_dist_to_hf(run / "checkpoints" / f"step_{STEPS:06d}", tmp_path / "hf", origin_hf_dir=origin)
    hf_to_fp8(tmp_path / "hf", tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    spec = ModelSpec.from_hf_dir(tmp_path / "fp8")
    held = json.loads((run / "attempts" / "0" / "digests_0.json").read_text())["digests"]

    def difference() -> str | None:
        facts = {"num_key_value_heads": spec.num_kv_heads, "tie_word_embeddings": spec.tie_word_embeddings}
        return first_difference(held, expected_digests(tensors.items(), tensor_parallel_size=tp, **facts))

    assert difference() is None
    what = "k_proj.bias" if family == "qwen2" else "v_proj.weight_scale_inv"
    before = load_file(origin / "model.safetensors")
    assert (
        family != "qwen2"
        or (tensors[f"model.layers.1.self_attn.{what}"] != before[f"model.layers.1.self_attn.{what}"]).any()
    )
    tensors[f"model.layers.1.self_attn.{what}"][0] += 1
    assert f"qkv_proj.{what.partition('.')[2]}" in difference(), "another number in a stacked parameter must be seen"
