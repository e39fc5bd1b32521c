"""A run with an FP8 KV cache on two tensor-parallel ranks, whose scales go into checkpoints."""

import json
import shutil

import pytest

from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.trainer.kv_scales import FILE

pytestmark = pytest.mark.slow


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
    shutil.rmtree(run / "checkpoints" / "step_000002")
    again = [r for r in read_metrics(runs.run("a")) if r["phase"] == "rl"]
    keys = {key for key in records[2] if not key.startswith(("final_", "eval/", "memory/"))}
    first, second = (without_times(rows[2]) for rows in (records, again))
    assert {k: v for k, v in first.items() if k in keys} == {k: v for k, v in second.items() if k in keys}
