"""Exact runs: no gap on any token, whatever happens to the run; a run that has one stops."""

import json
import os
import signal

import pytest
from tiny_runs import task_pids

from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    return tiny_runs(
        16, "--model.exact", "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard", run__steps=4,
        sft__max_steps=4, sft__batch_size=64, rollout__prompts_per_step=8, rollout__n_samples=8, rollout__temperature=0.7,
        rollout__save_every=1, checkpoint__every=2, eval__every=2, optim__warmup_steps=0,
    )  # fmt: skip


def test_no_token_differs_in_a_run_that_is_killed_and_goes_on_in_another_layout(runs):
    """Two replicas, then two pipeline stages; updates, evaluations and probes between."""
    process, run = runs.start("killed"), runs.path("killed")
    runs.wait_for_step(process, "killed", 3)
    os.kill(task_pids(run, 0)[1], signal.SIGKILL)
    runs.finish(process, status=1)
    runs.run("killed", "--parallel.pipeline-parallel-size=2")
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    gaps = {k: v for r in records for k, v in r.items() if k.startswith(("gap/", "final_gap/"))}
    assert {"gap/max", "final_gap/max"} <= gaps.keys() and set(gaps.values()) == {0.0}
    assert all(r["gap/max"] == r["gap/mean_abs"] == 0 and r["skipped"] == 0 for r in records[1:])
    for step in range(1, 5):  # token by token: what the engine reported is the trainer's number
        engine, trainer = (
            [json.loads(x) for x in (run / "rollouts" / folder / f"step_{step:06d}.jsonl").read_text().splitlines()]
            for folder in ("", "trainer")
        )
        pairs = [(e["logprobs"], t["trainer_logprobs"]) for e, t in zip(engine, trainer) if t["trainer_logprobs"]]
        assert pairs and all(a == b for a, b in pairs)


def test_context_parallel_ranks_train_on_the_engines_bits(runs):
    """Two ranks share every sequence, through supervised steps, updates and RL steps."""
    few = ("--run.steps=2", "--sft.max-steps=2", "--rollout.prompts-per-step=2", "--eval.every=0")
    runs.run("context", "--parallel.context-parallel-size=2", *few)
    records = [r for r in read_metrics(runs.path("context")) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == [0, 1, 2] and all(r["gap/max"] == 0 for r in records)
    assert all(r["skipped"] == 0 for r in records[1:])


def test_an_engine_that_missed_an_update_stops_the_run(runs):
    said = runs.finish(runs.start("frozen", "--control.freeze-engine"), status=1)
    assert "step 2: --model.exact, and tokens have another log-probability" in said and "of sample" in said, said
    assert [r["step"] for r in read_metrics(runs.path("frozen")) if r["phase"] == "rl"] == [0, 1]
