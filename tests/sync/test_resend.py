"""Without a copy of the last update in the rollout worker: an engine that dies gets its weights from the trainer again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import write_model
from tiny_task import write_data

from fp8slurm.observe.metrics import read_metrics

pytestmark = pytest.mark.slow

TIMEOUT = 500


def engine_server(tree: psutil.Process) -> psutil.Process | None:
    """The engine's first process among the descendants of a run."""
    for process in tree.children(recursive=True):
        try:
            if "fp8slurm.engine.child" in process.cmdline():
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def test_the_trainer_sends_again_what_an_engine_lost(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    write_model(tmp_path / "model")
    write_data(tmp_path / "data")
    held_out = (tmp_path / "data/eval.jsonl").read_text().splitlines()[:16]
    (tmp_path / "data/eval.jsonl").write_text("\n".join(held_out) + "\n")
    flags = {
        "run.name": "lost", "run.root": tmp_path / "runs", "run.steps": 30, "model.hf-checkpoint": tmp_path / "model",
        "data.train": tmp_path / "data/train.jsonl", "data.eval": tmp_path / "data/eval.jsonl",
        "sft.data": tmp_path / "data/sft.jsonl", "sft.max-steps": 2, "sft.batch-size": 16, "sft.eval-every": 0,
        "rollout.prompts-per-step": 4, "rollout.n-samples": 4, "rollout.max-replacements": 0, "checkpoint.every": 1000,
        "eval.every": 0, "sync.verify": "always",
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "fp8slurm.cli",
        "train",
        "--recipe",
        "tiny-fp8",
        *(f"--{k}={v}" for k, v in flags.items()),
    ]
    command += ["--sync.keep-last-update=False", "--rollout.no-drop-no-signal"]
    run = tmp_path / "runs/lost"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and '"phase": "rl", "step": 1,' in (run / "metrics.jsonl").read_text():
                break
            time.sleep(0.05)
        server = engine_server(psutil.Process(process.pid))
        assert server is not None, (tmp_path / "log").read_text()
        server.kill()
        assert process.wait(TIMEOUT) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    records = [r for r in read_metrics(run) if r["phase"] == "rl"]
    assert [r["step"] for r in records] == list(range(31))
    logs = "".join(
        p.read_text(errors="replace") for p in run.glob("attempts/0/**/*") if p.suffix in (".out", ".err", ".log")
    )
    assert "restart 1" in logs
    digests = json.loads((run / "attempts/0/digests_0.json").read_text())
    assert digests["version"] >= 0  # the engine held what it was sent, compared after every update
    parts = {"quantize", "copy", "gather", "wait", "receive", "handover", "load", "session", "verify"}
    assert parts == {
        k.removeprefix("time/sync_") for k in records[-1] | records[0] if k.startswith("time/sync_")
    } or any({f"time/sync_{p}" for p in parts} <= r.keys() for r in records)
