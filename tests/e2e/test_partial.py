"""rollout.oversample: what a step leaves unfinished goes on in the next; after a kill no prompt is lost or taken twice."""

import json
import os
import signal

import pytest
from tiny_runs import task_pids

from fp8slurm.observe.metrics import read_metrics
from fp8slurm.rl.ahead import OPEN_FILE

pytestmark = pytest.mark.slow


def test_partial_rollouts_lose_no_prompt_and_take_none_twice(tiny_runs):
    runs = tiny_runs(
        8, "--run.no-deterministic", "--rollout.no-drop-no-signal", run__steps=6, sft__batch_size=64, sft__max_steps=2,
        rollout__prompts_per_step=4, rollout__n_samples=4, rollout__max_staleness=3, rollout__oversample=1.5,
        rollout__save_every=1, rollout__truncated="keep", engine__max_running_requests=6, checkpoint__every=2, eval__every=0,
    )  # fmt: skip
    process, run = runs.start("a"), runs.path("a")
    runs.wait_for_step(process, "a", 3)
    open_then = json.loads((run / "checkpoints" / "step_000002" / OPEN_FILE).read_text())["positions"]
    os.kill(task_pids(run, 0)[0], signal.SIGKILL)
    runs.finish(process, status=1)
    runs.run("a")

    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == list(range(7)) and open_then
    assert any(r.get("rollout/in_flight", 0) > 0 for r in records)
    aged = [r for r in records if "lag/versions" in r]
    assert aged and all(0 < r["lag/versions_max"] <= 3 and 0 < r["lag/share"] <= 1 for r in aged)
    # the gap is that of tokens of the trainer's own version: as small as in a run without older ones
    own = [r["gap/mean_abs"] for r in aged if "gap/mean_abs" in r]
    assert own and max(own) < 0.05
    taken = []
    for step in range(1, 7):
        rows = [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
        indices = sorted({row["index"] for row in rows})
        assert len(indices) == 4 and len(rows) == 16, "whole groups, as many as a step takes"
        assert all(len(row["tokens"]) == len(row["logprobs"]) for row in rows)
        taken += indices
    last = run / "checkpoints" / "step_000006"
    left = json.loads((last / OPEN_FILE).read_text())["positions"]
    cursor = json.loads((last / "state.json").read_text())["cursor"]
    assert len(taken) == len(set(taken)) == cursor - len(left), "a prompt was lost, or taken twice"
