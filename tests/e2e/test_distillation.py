"""On-policy distillation in whole runs: the tiny model learns from a trained tiny teacher, which an FP8 engine serves."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from fp8slurm.checkpoint import hf_to_fp8, torch_dist_to_hf
from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "distill.sh"


def test_a_student_learns_from_a_teacher_in_fp8(tiny_runs):
    """No reward is looked at: what falls is the KL to the teacher, and with it the held-out accuracy comes up."""
    runs = tiny_runs(128, "--observe.no-plot", sft__batch_size=128, checkpoint__every=200)
    taught = runs.run("teacher", run__steps=0, sft__max_steps=80, sft__stop_accuracy=1)
    (checkpoint,) = (taught / "checkpoints").glob("step_*")
    torch_dist_to_hf(checkpoint, runs.folder / "hf", origin_hf_dir=runs.folder / "model")
    hf_to_fp8(runs.folder / "hf", runs.folder / "teacher-fp8")
    flags = re.findall(r'ARGS="--run.name student ([^"]*)"', EXAMPLE.read_text())[0]
    flags = flags.replace("models/tiny-teacher-FP8", str(runs.folder / "teacher-fp8"))
    run = runs.run(
        "student", *flags.split(), run__steps=12, sft__max_steps=20, eval__every=0, train__updates_per_step=1, optim__lr=3e-4,
        rollout__save_every=12,
    )  # fmt: skip
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    kl = [r["teacher/kl"] for r in records[1:]]
    accuracy = [r["eval/accuracy"] for r in records if "eval/accuracy" in r]
    assert statistics.mean(kl[-3:]) < 0.9 * statistics.mean(kl[:3]), kl  # 2.90 and 2.42
    assert accuracy[-1] > 1.5 * accuracy[0], accuracy  # 0.086 and 0.195
    rows = [json.loads(line) for line in (run / "rollouts" / "step_000012.jsonl").read_text().splitlines()]
    assert len(rows) == 256 and all(len(row["teacher_logprobs"]) == len(row["tokens"]) for row in rows)
