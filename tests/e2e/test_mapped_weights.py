"""Runs whose weights do not pass through the host: the protocol of CUDA IPC, with files in place of GPU memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fp8slurm.models.tiny import write_model
from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.rl.tiny_task import write_data

pytestmark = pytest.mark.slow

TIMEOUT = 400


def command(folder: Path, name: str, way: str, **more: object) -> list[str]:
    data = folder / "data"
    flags = {
        "run.name": name, "run.root": folder / "runs", "run.steps": 3, "model.hf-checkpoint": folder / "model",
        "data.train": data / "train.jsonl", "data.eval": data / "eval.jsonl", "sft.data": data / "sft.jsonl",
        "sft.max-steps": 2, "sft.batch-size": 64, "sft.eval-every": 0, "rollout.prompts-per-step": 6, "rollout.n-samples": 4,
        "rollout.max-replacements": 0, "checkpoint.every": 10, "sync.verify": "always", "sync.transport": way,
        "sync.bucket-bytes": 262144, "slurm.ranks-per-node": 2, "parallel.tensor-parallel-size": 2,
        **{key.replace("__", ".").replace("_", "-"): value for key, value in more.items()},
    }  # fmt: skip
    line = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", "tiny-fp8", *(f"--{k}={v}" for k, v in flags.items())]
    return [*line, "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mapped")
    for name in ("model", "data"):
        (folder / name).mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    held_out = folder / "data" / "eval.jsonl"
    held_out.write_text("\n".join(held_out.read_text().splitlines()[:16]) + "\n")
    return folder


@pytest.fixture(scope="module")
def by_gloo(folder):
    done = subprocess.run(command(folder, "gloo", "gloo"), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "gloo"


def records(run: Path) -> list[dict]:
    return [without_times(r) for r in read_metrics(run / "metrics.jsonl")]


def digests(run: Path, name: str) -> list:
    return json.loads((run / "attempts" / "0" / f"digests_{name}.json").read_text())["digests"]


def test_the_same_bytes_arrive_as_through_the_host(folder, by_gloo):
    line = command(folder, "mapped", "shared-memory", engine__per_node=2)
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "runs" / "mapped"
    assert digests(run, "0_0") == digests(run, "0_1") == digests(by_gloo, "0")
    assert not list((run / "attempts" / "0").glob("weights_*")), "files that stood in for GPU memory are left"


def test_an_engine_that_dies_gets_its_weights_from_the_trainer_again(folder, by_gloo):
    with open(folder / "killed.log", "w") as log:
        process = subprocess.Popen(command(folder, "killed", "shared-memory"), stdout=log, stderr=subprocess.STDOUT)
    run = folder / "runs" / "killed"
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and '"phase": "rl", "step": 1,' in (run / "metrics.jsonl").read_text():
                break
            time.sleep(0.02)
        engines = [
            c for c in psutil.Process(process.pid).children(recursive=True)
            if c.cmdline()[-1:] == ["fp8slurm.engine.child"] and c.pid == os.getpgid(c.pid)
        ]  # fmt: skip
        assert len(engines) == 1, (folder / "killed.log").read_text()
        engines[0].send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT) == 0, (folder / "killed.log").read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    assert records(run) == records(by_gloo)
    assert digests(run, "0") == digests(by_gloo, "0")
