"""Runs whose ranks send the weights straight into the engines: the way of split placement, over gloo."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from fp8slurm.observe.metrics import read_metrics, without_times

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    """Two pipeline stages, so two sources; two engines; an update after every supervised step, of dozens of buckets."""
    return tiny_runs(
        16, "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard", run__steps=1, sft__max_steps=6,
        sft__batch_size=64, sft__eval_every=1, sft__eval_from=1, sft__stop_accuracy=1.0, rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=0,
        checkpoint__every=10, sync__verify="first", sync__bucket_bytes=65536, slurm__ranks_per_node=2,
        parallel__pipeline_parallel_size=2, engine__per_node=2, sync__transport="gloo-direct", run__log_level="debug",
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_gloo(runs):
    return runs.run("gloo", sync__transport="gloo", sync__verify="always")


def records(run: Path) -> list[dict]:
    return [without_times(r) for r in read_metrics(run / "metrics.jsonl")]


def digests(run: Path, name: str) -> dict:
    return json.loads((run / "attempts" / "0" / f"digests_{name}.json").read_text())


def log(run: Path) -> str:
    return "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))


def test_the_same_bytes_arrive_as_through_the_host(runs, by_gloo):
    run = runs.run("direct", sync__verify="always")
    assert digests(run, "0_0") == digests(run, "0_1") == digests(by_gloo, "0_0")
    assert records(run) == records(by_gloo)
    assert log(run).count("'join': True}") == 1


def killed(runs, name: str, when: str) -> Path:
    """A run, one of whose engines is killed when its rollout worker logs `when` for the third time."""
    process, run = runs.start(name), runs.path(name)
    try:
        while (seen := log(run).count(when)) < 3:
            assert process.poll() is None, runs.said(process)
            time.sleep(0.002)
        assert seen == 3
        runs.engines(process)[1].send_signal(signal.SIGKILL)
        runs.finish(process)
    finally:
        runs.stop(process)
    return run


def test_an_engine_that_dies_between_updates_joins_again(runs, by_gloo):
    run = killed(runs, "evaluation", "command evaluate")
    assert records(run) == records(by_gloo)
    assert log(run).count("'join': True}") == 2
    assert len(re.findall(r"engine 0\.[01] failed .*; restart 1", log(run))) == 1


def test_an_engine_that_dies_in_an_update_takes_the_groups_with_it(runs, by_gloo):
    run = killed(runs, "update", "command update")
    assert records(run) == records(by_gloo)
    assert log(run).count("'join': True}") == 2
    # The other one holds half an update: it is restarted, too, and both get it from the trainer again.
    assert len(re.findall(r"engine 0\.[01] failed .*; restart 1", log(run))) == 2
