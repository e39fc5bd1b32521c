"""Runs that send only what changed (sync.delta): the bytes and records of whole updates, an engine killed in between."""

import json
import signal
import time
from pathlib import Path

import pytest

from fp8slurm.observe.metrics import read_metrics, without_times

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    """An update after every supervised step, at learning rates of RL, and one after an RL step; compared every time."""
    return tiny_runs(
        16, "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard", run__steps=1, sft__max_steps=5,
        sft__batch_size=64, sft__eval_every=1, sft__eval_from=1, sft__stop_accuracy=1.0, sft__lr=1e-5, sft__warmup_steps=0,
        optim__lr=1e-5, rollout__prompts_per_step=4, rollout__n_samples=4, rollout__max_replacements=0, checkpoint__every=10,
        sync__verify="always", sync__bucket_bytes=262144, slurm__ranks_per_node=1, run__log_level="debug",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    return runs.run("whole")


def records(run: Path) -> list[dict]:
    taken = [without_times(r) for r in read_metrics(run / "metrics.jsonl")]
    return [{k: v for k, v in r.items() if not k.startswith("sync/")} for r in taken]


def digests(run: Path) -> dict:
    return json.loads((run / "attempts/0/digests_0.json").read_text())


@pytest.mark.parametrize("transport", ["gloo", "gloo-direct"])
def test_bytes_and_records_are_those_of_whole_updates_and_a_new_engine_gets_everything(runs, whole, transport) -> None:
    process, run = runs.start(transport, "--sync.delta", sync__transport=transport), runs.path(transport)
    said = run / "attempts/0/logs"
    try:
        while "".join(p.read_text() for p in said.glob("*_log.err")).count("command evaluate") < 3:
            assert process.poll() is None, runs.said(process)
            time.sleep(0.002)
        runs.engines(process)[0].send_signal(signal.SIGKILL)
        runs.finish(process)
    finally:
        runs.stop(process)
    assert digests(run) == digests(whole) and records(run) == records(whole)
    assert "".join(p.read_text() for p in said.glob("*_log.err")).count("restart 1") == 1
    sent = [r["sync/sent_bytes"] / r["sync/bytes"] for r in read_metrics(run) if "sync/bytes" in r]
    assert len(sent) >= 5 and sent[0] < 0.5
    # The rollout worker has the last update for an engine that restarts; straight into the engines the trainer sends it.
    assert sum(share == 1.0 for share in sent) == (transport == "gloo-direct")
