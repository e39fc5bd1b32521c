"""A run with an FP8 KV cache on two tensor-parallel ranks, whose scales go into checkpoints."""

import json
import shutil
from pathlib import Path

import pytest

from fp8slurm.check.preflight import _kv_cache
from fp8slurm.cli import main
from fp8slurm.config import parse
from fp8slurm.models.spec import ModelSpec
from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.trainer.kv_scales import FILE

pytestmark = pytest.mark.slow


def answers_with_both_caches(run: Path) -> None:
    """An evaluation of the checkpoint serves it with its own scales: the answers are those of the loop's last one."""
    assert main(["eval", "--run", str(run), "--both-kv-caches", "--fail-if-worse", "0.9"]) == 0
    with_cache, looped = (run / "eval" / f"step_000002-fp8-{name}" for name in ("kv-fp8", "training"))
    answers = [
        {row["id"]: row["response"] for row in map(json.loads, (f / "samples.jsonl").read_text().splitlines())}
        for f in (with_cache, looped)
    ]
    assert answers[0] == answers[1] and len(answers[0]) == 8
    for folder in (with_cache, looped):
        assert json.loads((folder / "summary.json").read_text())["kv_cache"] == "fp8"
    found = json.loads((run / "eval" / "compare-step_000002-fp8-kv-fp8" / "compare.json").read_text())
    assert found["kv_cache"] == ["fp8", "auto"] and 0 < found["logprob_gap"]["mean_abs"] < 0.1 and not found["worse"]
    # and a further run may begin with them
    fixed = (
        f"--model.rollout-checkpoint {run}/eval/models/step_000002-fp8 --engine.kv-cache fp8 --engine.kv-scales fixed"
    )
    _kv_cache(parse("tiny-fp8", fixed.split()), ModelSpec.from_hf_dir(run.parents[1] / "model"))


def test_scales_follow_the_weights_and_a_resume_goes_on_with_them(tiny_runs):
    runs = tiny_runs(
        8, "--train.quantize-kv", "--rollout.no-drop-no-signal", engine__kv_cache="fp8", run__steps=2, sft__max_steps=12,
        parallel__tensor_parallel_size=2,
        sft__batch_size=64, rollout__prompts_per_step=4, rollout__n_samples=8, checkpoint__every=1, eval__every=0,
        sync__verify="always",
    )  # fmt: skip
    run = runs.run("a")
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [0, 1, 2]
    # calibrated before step 1: the largest key takes a quarter to a half of the range, as far as weights have not moved
    for r in records[1:]:
        assert all(0.2 < r[f"kv_cache/{x}_full"] < 0.6 for x in "kv") and r["gap/mean_abs"] < 0.05
        assert r["gap_position/0"] == pytest.approx(r["gap/mean_abs"], rel=1e-5)
    scales = json.loads((run / "checkpoints" / "step_000001" / FILE).read_text())["scales"]
    assert len(scales) == 2 and all(0 < s < 1 for layer in scales for s in layer)
    answers_with_both_caches(run)
    shutil.rmtree(run / "checkpoints" / "step_000002")
    again = [r for r in read_metrics(runs.run("a")) if r["phase"] == "rl"]
    keys = {key for key in records[2] if not key.startswith(("final_", "eval/", "memory/"))}
    first, second = (without_times(rows[2]) for rows in (records, again))
    assert {k: v for k, v in first.items() if k in keys} == {k: v for k, v in second.items() if k in keys}
