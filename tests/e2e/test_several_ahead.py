"""rollout.max_staleness above 1: requests go on over updates, groups are taken in the order of asking, a kill loses none."""

import json
import os
import signal

import pytest
from tiny_runs import task_pids

from fp8slurm.observe.metrics import read_metrics
from fp8slurm.rl.ahead import OPEN_FILE

pytestmark = pytest.mark.slow


def test_engines_are_two_steps_ahead_and_no_prompt_is_lost(tiny_runs):
    runs = tiny_runs(
        8, "--run.no-deterministic", "--rollout.no-drop-no-signal", run__steps=6, sft__batch_size=64, sft__max_steps=2,
        rollout__prompts_per_step=4, rollout__n_samples=4, rollout__max_staleness=2, rollout__truncated="keep",
        rollout__save_every=1, engine__max_running_requests=6, checkpoint__every=2, eval__every=3,
    )  # fmt: skip
    process, run = runs.start("a"), runs.path("a")
    runs.wait_for_step(process, "a", 3)
    assert json.loads((run / "checkpoints" / "step_000002" / OPEN_FILE).read_text())["positions"]
    os.kill(task_pids(run, 0)[0], signal.SIGKILL)
    runs.finish(process, status=1)
    runs.run("a")

    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == list(range(7)) and "eval/accuracy" in records[3]
    aged = [r["lag/versions_max"] for r in records if "lag/versions_max" in r]
    assert aged and max(aged) <= 2, "older than it may be, or never older than the step"
    assert all(r["gap/mean_abs"] < 0.05 for r in records if "gap/mean_abs" in r)
    taken = []
    for step in range(1, 7):
        rows = [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
        assert len(rows) == 16 and len({row["index"] for row in rows}) == 4
        taken += sorted({row["index"] for row in rows})
    last = run / "checkpoints" / "step_000006"
    assert not (last / OPEN_FILE).exists(), "asked for steps that there are not"
    assert len(taken) == len(set(taken)) == json.loads((last / "state.json").read_text())["cursor"]
