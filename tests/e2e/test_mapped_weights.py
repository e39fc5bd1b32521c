"""Runs whose weights do not pass through the host: the protocol of CUDA IPC, with files in place of GPU memory."""

import json
import signal
from pathlib import Path

import pytest

from fp8slurm.observe.metrics import read_metrics, without_times

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    return tiny_runs(
        16, "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard", run__steps=3, sft__max_steps=2,
        sft__batch_size=64, rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=0,
        checkpoint__every=10, sync__verify="always", sync__bucket_bytes=262144, slurm__ranks_per_node=2,
        parallel__tensor_parallel_size=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def by_gloo(runs):
    return runs.run("gloo", sync__transport="gloo")


def records(run: Path) -> list[dict]:
    return [without_times(r) for r in read_metrics(run / "metrics.jsonl")]


def digests(run: Path, name: str) -> list:
    return json.loads((run / "attempts" / "0" / f"digests_{name}.json").read_text())["digests"]


def test_the_same_bytes_arrive_as_through_the_host(runs, by_gloo):
    run = runs.run("mapped", sync__transport="shared-memory", engine__per_node=2)
    assert digests(run, "0_0") == digests(run, "0_1") == digests(by_gloo, "0")
    assert not list((run / "attempts" / "0").glob("weights_*")), "files that stood in for GPU memory are left"


def test_an_engine_that_dies_gets_its_weights_from_the_trainer_again(runs, by_gloo):
    process, run = runs.start("killed", sync__transport="shared-memory"), runs.path("killed")
    try:
        runs.wait_for_step(process, "killed", 1)
        engines = runs.engines(process)
        assert len(engines) == 1, runs.said(process)
        engines[0].send_signal(signal.SIGKILL)
        runs.finish(process)
    finally:
        runs.stop(process)
    assert records(run) == records(by_gloo)
    assert digests(run, "0") == digests(by_gloo, "0")
