"""A run whose node has two engines: the same records whatever happens to one of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fp8slurm.models.tiny import write_model
from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.report.attempts import read_attempts
from fp8slurm.rl.tiny_task import write_data

pytestmark = pytest.mark.slow

TIMEOUT = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    held_out = folder / "data" / "eval.jsonl"
    held_out.write_text("\n".join(held_out.read_text().splitlines()[:48]) + "\n")
    return folder


def start(folder: Path, name: str) -> subprocess.Popen:
    data = folder / "data"
    flags = {
        "run.name": name, "run.root": folder / "runs", "run.steps": 4, "model.hf-checkpoint": folder / "model",
        "data.train": data / "train.jsonl", "data.eval": data / "eval.jsonl", "sft.data": data / "sft.jsonl",
        "sft.max-steps": 2, "sft.batch-size": 64, "sft.eval-every": 0, "rollout.prompts-per-step": 7, "rollout.n-samples": 4,
        "rollout.max-replacements": 1, "rollout.max-tokens": 32, "rollout.save-every": 1, "checkpoint.every": 10,
        "sync.verify": "always", "engine.per-node": 2, "engine.max-running-requests": 24, "slurm.ranks-per-node": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", "tiny-fp8", *(f"--{k}={v}" for k, v in flags.items())]
    command += ["--observe.no-plot", "--observe.no-tensorboard", "--rollout.no-drop-no-signal"]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def engine_processes(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if child.cmdline()[-1:] == ["fp8slurm.engine.child"] and child.pid == os.getpgid(child.pid):
                found.append(child)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


def rollouts(run: Path) -> list[dict]:
    return [json.loads(line) for p in sorted((run / "rollouts").glob("*.jsonl")) for line in p.read_text().splitlines()]


def test_two_engines_share_a_run_and_one_of_them_may_die(folder):
    whole = start(folder, "whole")
    assert whole.wait(TIMEOUT) == 0, (folder / "whole.log").read_text()
    broken = start(folder, "broken")
    run = folder / "runs" / "broken"
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and broken.poll() is None:
            if (run / "metrics.jsonl").is_file() and '"phase": "rl", "step": 1,' in (run / "metrics.jsonl").read_text():
                break
            time.sleep(0.02)
        engines = engine_processes(psutil.Process(broken.pid))
        assert len(engines) == 2, (folder / "broken.log").read_text()
        engines[1].send_signal(signal.SIGKILL)
        assert broken.wait(TIMEOUT) == 0, (folder / "broken.log").read_text()
    finally:
        broken.kill()
    records = [[without_times(r) for r in read_metrics(folder / "runs" / name)] for name in ("whole", "broken")]
    assert [(r["phase"], r["step"]) for r in records[0]] == [("sft", s) for s in (1, 2)] + [("rl", s) for s in range(5)]
    assert records[0] == records[1]
    for r in records[0][3:]:
        assert 0 < r["gap/mean_abs"] < 0.1 and r["rollout/groups"] == 7
    assert rollouts(folder / "runs" / "whole") == rollouts(run) and rollouts(run)
    logs = "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))
    assert len(re.findall(r"engine 0\.[01] failed .*; restart 1", logs)) == 1
    for name in ("whole", "broken"):
        attempt = folder / "runs" / name / "attempts" / "0"
        held = [json.loads((attempt / f"digests_0_{i}.json").read_text()) for i in range(2)]
        assert held[0] == held[1] and held[0]["version"] == 6
        assert {"engine_0_0.log", "engine_0_1.log"} <= {p.name for p in (attempt / "logs").iterdir()}
    assert [a.engine_restarts for a in read_attempts(run, [])] == [1]
