"""A run whose node has two engines: the same records whatever happens to one of them."""

import json
import re
import signal
from pathlib import Path

import pytest

from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.run.attempts import read_attempts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    return tiny_runs(
        48, "--model.exact", "--observe.no-plot", "--observe.no-tensorboard", "--rollout.no-drop-no-signal", run__steps=4, sft__max_steps=2,
        sft__batch_size=64, rollout__prompts_per_step=7, rollout__n_samples=4, rollout__max_replacements=1,
        rollout__max_tokens=32, rollout__save_every=1, checkpoint__every=10, sync__verify="always", engine__per_node=2,
        engine__max_running_requests=24, slurm__ranks_per_node=1,
    )  # fmt: skip


def rollouts(run: Path) -> list[dict]:
    return [json.loads(line) for p in sorted((run / "rollouts").glob("*.jsonl")) for line in p.read_text().splitlines()]


def test_two_engines_share_a_run_and_one_of_them_may_die(runs):
    whole = runs.run("whole")
    broken, run = runs.start("broken"), runs.path("broken")
    try:
        runs.wait_for_step(broken, "broken", 1)
        engines = runs.engines(broken)
        assert len(engines) == 2, runs.said(broken)
        engines[1].send_signal(signal.SIGKILL)
        runs.finish(broken)
    finally:
        runs.stop(broken)
    records = [[without_times(r) for r in read_metrics(path)] for path in (whole, run)]
    assert [(r["phase"], r["step"]) for r in records[0]] == [("sft", s) for s in (1, 2)] + [("rl", s) for s in range(5)]
    assert records[0] == records[1]
    for r in records[0][3:]:
        assert r["gap/max"] == 0 and r["rollout/groups"] == 7, "not one token differs, on either engine"
    assert rollouts(whole) == rollouts(run) and rollouts(run)
    logs = "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))
    assert len(re.findall(r"engine 0\.[01] failed .*; restart 1", logs)) == 1
    for path in (whole, run):
        attempt = path / "attempts" / "0"
        held = [json.loads((attempt / f"digests_0_{i}.json").read_text()) for i in range(2)]
        assert held[0] == held[1] and held[0]["version"] == 6
        assert {"engine_0_0.log", "engine_0_1.log"} <= {p.name for p in (attempt / "logs").iterdir()}
    assert [a.engine_restarts for a in read_attempts(run, [])] == [1]
