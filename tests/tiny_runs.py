"""Short runs of a tiny model: the folder of model and data, the settings that they share, and their processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import write_model
from tiny_task import write_data

from fp8slurm.observe.metrics import read_metrics

TIMEOUT_S = 400


def make_folder(folder: Path, held_out: int, moe: bool = False, family: str = "qwen3") -> Path:
    """FOLDER/model, and FOLDER/data with that many held-out questions."""
    for name in ("model", "data"):
        (folder / name).mkdir()
    write_model(folder / "model", moe=moe, family=family)
    write_data(folder / "data")
    questions = folder / "data" / "eval.jsonl"
    questions.write_text("\n".join(questions.read_text().splitlines()[:held_out]) + "\n")
    return folder


def settings(folder: Path, name: str, **more: Any) -> list[str]:
    """Flags of a run in FOLDER/runs on what `make_folder` made; sft__max_steps=2 is --sft.max-steps=2."""
    data = folder / "data"
    flags = {
        "run.name": name, "run.root": folder / "runs", "model.hf-checkpoint": folder / "model",
        "data.train": data / "train.jsonl", "data.eval": data / "eval.jsonl", "sft.data": data / "sft.jsonl",
        "sft.eval-every": 0, **{key.replace("__", ".").replace("_", "-"): value for key, value in more.items()},
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in flags.items()]


class TinyRuns:
    """Runs on this machine, in one folder. What they say is in FOLDER/NAME.log."""

    def __init__(
        self, folder: Path, held_out: int, *switches: str, moe: bool = False, family: str = "qwen3",
        recipe: str = "tiny-fp8", **more: Any,
    ) -> None:  # fmt: skip
        """switches, more: what all of these runs are started with."""
        self.folder, self.recipe = make_folder(folder, held_out, moe, family), recipe
        self.switches, self.more = switches, more
        self._logs: dict[subprocess.Popen, Path] = {}

    def command(self, name: str, *switches: str, **more: Any) -> list[str]:
        flags = settings(self.folder, name, **(self.more | more))
        program = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", self.recipe]
        return [*program, *flags, *self.switches, *switches]

    def start(
        self, name: str, *switches: str, environment: dict[str, str] | None = None, **more: Any
    ) -> subprocess.Popen:
        log = self.folder / f"{name}.log"
        with open(log, "w") as out:
            process = subprocess.Popen(
                self.command(name, *switches, **more), stdout=out, stderr=subprocess.STDOUT, env=environment
            )
        self._logs[process] = log
        return process

    def said(self, process: subprocess.Popen) -> str:
        return self._logs[process].read_text()

    def finish(self, process: subprocess.Popen, status: int = 0) -> str:
        """What it said; fails with that if it ends otherwise, or not at all."""
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.stop(process)
        assert process.returncode == status, self.said(process)
        return self.said(process)

    def run(self, name: str, *switches: str, **more: Any) -> Path:
        """From start to end; the run's directory."""
        self.finish(self.start(name, *switches, **more))
        return self.path(name)

    def stop(self, process: subprocess.Popen) -> None:
        """End it with its tasks, if it goes on."""
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def wait_for_step(self, process: subprocess.Popen, name: str, step: int) -> None:
        """Until this RL step has its record; fails with what was said where it does not get there."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            if last_step(self.path(name)) >= step:
                return
            time.sleep(0.05)
        if last_step(self.path(name)) < step:
            self.stop(process)
            pytest.fail(f"step {step} was not reached: {self.said(process)}")

    def engines(self, process: subprocess.Popen) -> list[psutil.Process]:
        """The engines' main processes."""
        found = []
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                if child.cmdline()[-1:] == ["fp8slurm.engine.child"] and child.pid == os.getpgid(child.pid):
                    found.append(child)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found


def last_step(run: Path) -> int:
    """The last RL step that was recorded, -1 if none was."""
    try:
        return max((r["step"] for r in read_metrics(run) if r["phase"] == "rl"), default=-1)
    except ValueError:
        return -1


def task_pids(run: Path, attempt: int) -> dict[int, int]:
    """Processes of an attempt's tasks."""
    tasks = {
        int(p.stem): json.loads(p.read_text()) for p in (run / "attempts" / str(attempt) / "tasks").glob("[0-9]*.json")
    }
    return {index: t["pid"] for index, t in tasks.items()}


def weights(run: Path, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of its newest checkpoint, exported into `out`."""
    from safetensors.torch import load_file

    from fp8slurm.checkpoint import torch_dist_to_hf

    newest = max((run / "checkpoints").glob("step_*"), key=lambda p: p.name)
    config = json.loads((run / "config.json").read_text())
    torch_dist_to_hf(newest, out, origin_hf_dir=config["model"]["hf_checkpoint"])
    return {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}
