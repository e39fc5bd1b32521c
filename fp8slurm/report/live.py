"""A run that goes on, on a terminal: what `train` shows of it, and `status --follow` of one that somebody started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import patiently
from fp8slurm.observe.console import Display
from fp8slurm.observe.metrics import MetricsTail
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.read_json import read_json
from fp8slurm.run.status import RunStatus, phase_words, statuses

ASK_S = 5.0
"""Between two looks at the run's state, which ask Slurm where it has a job."""
LOOK_S = 0.5


class LiveRun:
    """A run's display, brought up to date by `update`; a context manager."""

    def __init__(self, path: Path, stream: TextIO | None = None) -> None:
        config = read_json(path / "config.json", [])
        self.run = RunDirectory(path)
        self.display = Display(path.resolve().name, _totals(config), stream)
        self._tail, self._looked = MetricsTail(path / "metrics.jsonl"), 0.0
        self._started = self._stepped = False
        self.display.history(self._tail.poll())

    def __enter__(self) -> LiveRun:
        self.display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.__exit__()

    def update(self) -> None:
        """Show the records that have come, and what the tasks of the newest attempt do until then. OSError."""
        for record in self._tail.poll():
            self.display.update(record)
            self._stepped = True
        if time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            newest = self.run.newest_attempt()
            folder = self.run.attempts / str(newest)
            words = phase_words(folder, time.time(), self.display.is_live) if newest >= 0 else ""
            self._started = self._started or bool(words)
            self.display.status(words or ("" if self._stepped else "first step" if self._started else "starting"))


def _totals(config: dict) -> dict[str, int]:
    steps = {"sft": (config.get("sft") or {}).get("max_steps"), "rl": (config.get("run") or {}).get("steps")}
    return {phase: n for phase, n in steps.items() if isinstance(n, int) and n}


def follow(path: Path, say: Callable[[str], None]) -> RunStatus:
    """Show a run until it is over, through requeues and resubmissions; `say` gets a line when its state changes.

    Returns its last status. A file system that stumbles, or a Slurm that does not answer, is waited for.
    """
    said, asked_at, status = "", 0.0, statuses([path])[0][0]
    if over(status):
        say(state_words(status))
        return status
    with patiently(lambda: LiveRun(path)) as live:
        while True:
            try:
                live.update()
                if time.monotonic() - asked_at > ASK_S:
                    status, asked_at = statuses([path])[0][0], time.monotonic()
            except (OSError, TransientInputError):
                pass
            if (now := state_words(status)) != said:
                said = now
                say(now)
            if over(status):
                live.update()
                live.display.status("")
                return status
            time.sleep(LOOK_S)


def over(status: RunStatus) -> bool:
    """Whether neither a job nor a process goes on with the run; unknown while Slurm does not answer."""
    if status.problem:
        return False
    if status.job is not None:
        return status.job.over and status.state not in ("running", "held")
    return status.state not in ("running", "held")


def state_words(status: RunStatus) -> str:
    """Slurm's word for the run's job, with its reason and when it is expected to start; the run's own state without."""
    if status.job_id is None:
        return f"{status.name}: {status.state}"
    if status.problem:
        return f"job {status.job_id}: Slurm does not answer: {status.problem}"
    if status.job is None:
        return f"job {status.job_id}: forgotten by Slurm"
    reason = f" ({status.job.reason})" if status.job.reason else ""
    start = f", start expected {status.job.start}" if status.job.state == "PENDING" and status.job.start else ""
    return f"job {status.job_id}: {status.job.state}{reason}{start}"
