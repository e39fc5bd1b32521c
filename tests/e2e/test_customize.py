"""The files of examples/ in runs of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import TinyRuns

from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> TinyRuns:
    more = {
        "run__steps": 2,
        "sft__max_steps": 4,
        "rollout__prompts_per_step": 8,
        "eval__every": 0,
        "checkpoint__every": 9,
    }
    return TinyRuns(tmp_path_factory.mktemp("runs"), 8, **more)


def test_a_reward_of_ones_own(runs):
    run = runs.run("reward", reward__kind="examples.reward:score", rollout__save_every=1)
    records = [r for r in read_metrics(run) if r["phase"] == "rl" and r["step"]]
    for record in records:
        assert record["reward/mean"] <= record["reward/parts/right"] + 1e-9 and 0 <= record["reward/parts/copied"] <= 1
    rows = [json.loads(line) for line in (run / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    fine = {round(row["parts"]["right"] - row["reward"], 9) for row in rows}
    assert fine <= {0, 0.1} and len(records) == 2
    summary = json.loads(next(run.glob("eval/step_000002-*/summary.json")).read_text())
    assert summary["tasks"]["held_out"]["questions"] == 8, "the held-out answers are graded by it, prompt and all"


def steps(run: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(run) if r["phase"] == "rl" and r["step"]]


def test_a_loss_and_an_advantage_of_the_users(runs):
    algorithm = {"loss": "examples.loss:two_sided", "advantage": "examples.advantage:against_median", "tis_cap": 0}
    run = runs.run("own", **{f"algorithm__{key}": value for key, value in algorithm.items()})
    for record in steps(run):
        assert 0 <= record["custom/masked"] < 1 and record["grad_norm"] > 0 and "tis/mean" not in record


@pytest.mark.parametrize(
    "name, switches, more",
    [
        (
            "gspo",
            ["--algorithm.no-divide-by-std"],
            {"advantage": "rloo", "loss_mean": "sequence", "tis_level": "sequence"},
        ),
        (
            "cispo",
            ["--rollout.no-drop-no-signal"],
            {"advantage": "reinforce_pp", "loss_mean": "constant", "tis_excess": "mask"},
        ),
    ],
)
def test_the_other_objectives_run(runs, name, switches, more):
    run = runs.run(name, *switches, algorithm__loss=name, **{f"algorithm__{key}": value for key, value in more.items()})
    for record in steps(run):
        assert record["ratio/mean"] == pytest.approx(1, abs=0.2) and record["grad_norm"] > 0
