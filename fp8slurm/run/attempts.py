"""Attempts of a run: when each began and ended, which steps it took, why it ended, and what went wrong in it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8slurm.core.numbers import number
from fp8slurm.core.processes import process_start
from fp8slurm.run.directory import rl_step
from fp8slurm.run.events import CONTINUED, RESTART, read_events
from fp8slurm.run.read_json import read_json
from fp8slurm.run.task_errors import ENDED, STOPPED, VERDICT

FAULTS_SHOWN = 50


@dataclass
class Attempt:
    """One start of the run."""

    number: int
    started: float | None = None
    """Unix seconds."""
    ended: float | None = None
    """None: unknown, or it goes on."""
    recorded: bool = False
    """Whether its tasks recorded their events; without, where it began and its faults are not known."""
    began_at: str = ""
    """Checkpoint that it continued from; "" without one."""
    last: tuple[str, int] | None = None
    """(phase, step) of its last record, where known."""
    state: str = "unknown"
    """running, held (by a job, or by a process of another machine), done, stopped, failed or unknown."""
    stop: str = ""
    """How it stopped as planned, and what follows; or who ended it, where nothing was wrong with it."""
    resubmitted: str = ""
    """The job that follows."""
    error: str = ""
    """May be a traceback."""
    primary: bool = False
    """Whether the error is the attempt's own, and no consequence of being ended."""
    why: str = ""
    """Why it ended, in one text."""
    faults: list[str] = field(default_factory=list)
    """Skipped checkpoints, engine restarts and the like, in the order of time."""
    engine_restarts: int = 0
    command: list[str] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    job: str = ""
    """Slurm job."""
    stacks: int = 0
    """Tasks that left their stacks."""


def run_state(steps: int | None, checkpoint: str, last: int | None, newest: Attempt | None) -> str:
    """Where a run stands by its own files: running, held, finished, failed, stopped or new.

    steps: run.steps; checkpoint: the name of the newest complete one; last: the last recorded RL step.
    """
    if newest is not None and newest.state in ("running", "held"):
        return newest.state
    done = newest is not None and newest.state == "done" and last is not None  # its checkpoints may be gone since
    reached = max(rl_step(checkpoint), last if done and last is not None else -1)
    if steps is not None and reached >= steps:
        return "finished"
    return "new" if newest is None else "failed" if newest.state == "failed" else "stopped"


def read_attempts(run: Path, notes: list[str]) -> list[Attempt]:
    """All attempts, oldest first."""
    folder = run / "attempts"
    try:
        numbers = sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        notes.append("attempts/ is missing: when the run was started, and how it ended, is unknown")
        return []
    except OSError as error:
        notes.append(f"attempts/ cannot be read: {error.strerror}")
        return []
    return [read_attempt(run, n, n == numbers[-1], notes) for n in numbers]


def read_attempt(run: Path, number: int, newest: bool, notes: list[str], job_over: bool = False) -> Attempt:
    """One attempt; what cannot be read is noted. job_over: the job that holds it, if one does, is known to be over."""
    folder, a = run / "attempts" / str(number), Attempt(number)
    versions, owner = read_json(folder / "versions.json", notes), read_json(folder / "owner.json", notes)
    packages = versions.get("packages")
    a.command = [str(x) for x in _listed(versions.get("command")) if isinstance(x, (str, int))]
    a.packages = {str(k): str(v) for k, v in packages.items()} if isinstance(packages, dict) else {}
    a.changed = [x for x in _listed(versions.get("changed")) if isinstance(x, str)]
    a.job = str(owner.get("job") or "")
    tasks, done = _glob(folder, "tasks/[0-9]*.json"), _glob(folder, "tasks/*.done")
    errors = _glob(folder, "errors/*.json")
    a.stacks = len(_glob(folder, "stacks/task_*"))
    a.started = min(_times([folder / "versions.json", *tasks]), default=None)
    a.last = _last(run / "metrics.jsonl" if newest else folder / "metrics.jsonl")
    _read_events(folder, a, notes)
    if not a.began_at and isinstance(owner.get("checkpoint"), str):
        a.began_at = owner["checkpoint"]
    stopped = read_json(folder / STOPPED, notes)
    a.stop, a.resubmitted = stop_words(stopped), str(stopped.get("resubmitted") or "")
    a.error, a.primary, gone, ended = _error(folder, tasks, errors, notes, "Slurm" if a.job else "a signal")
    a.stop = a.stop or ended
    held = "" if job_over and a.job else holder_state(owner)
    if held and not errors and len(done) < max(1, len(tasks)):
        a.state = held
        where = f"job {a.job}" if a.job else f"process {owner.get('pid')} on {owner.get('host')}"
        a.why = "" if held == "running" else f"{where} holds it, as far as its files say; fp8slurm status asks Slurm"
        return a
    if a.stop:
        a.state, a.why = "stopped", "; ".join(text for text in (a.stop, gone or a.error) if text)
    elif gone or a.error:
        a.state, a.why = "failed", gone or a.error
    elif tasks:
        a.state, a.why = "done", "every task ended by itself"
    else:
        a.why = "it ended before its tasks began"
    ends = _times([*done, *errors, folder / STOPPED])
    a.ended = max(ends or _times(_glob(folder, "logs/*_log.*")), default=None)
    return a


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def holder_state(owner: dict[str, Any]) -> str:
    """Of an owner.json: running, held where its holder cannot be seen from here, "" where it is gone."""
    host, pid, start = (owner.get(key) for key in ("host", "pid", "start"))
    if not isinstance(pid, int) or start is None:
        return ""
    if host == socket.gethostname() and process_start(pid) == start:
        return "running"
    return "held" if "job" in owner or host != socket.gethostname() else ""


def stop_words(stopped: dict[str, Any]) -> str:
    """A stopped.json in words, "" for none."""
    saved = f"{'saved' if stopped.get('saved') else 'not saved'} at {stopped['at']}" if stopped.get("at") else ""
    return "; ".join(str(x) for x in (stopped.get("why"), saved, stopped.get("next") or stopped.get("why_not")) if x)


def _error(
    folder: Path, tasks: list[Path], errors: list[Path], notes: list[str], by: str
) -> tuple[str, bool, str, str]:
    """(text, primary, gone, ended) of what brought an attempt down, in the order of task_errors.first_error: the job
    script's verdict, a task that ended without a word (gone: where the attempt is over), the first error of a task.
    ended: where nothing did, and it was told to end; by: who tells an attempt so."""
    verdict = read_json(folder / "errors" / VERDICT, notes)
    text = verdict.get("text")
    if isinstance(text, str):
        text = text.strip()
        if "primary" not in verdict and ENDED.fullmatch(text):  # of a version that took this for the reason
            return "", False, "", f"ended by {by}"
        return ("", False, "", text) if verdict.get("primary") is False else (text, True, "", "")
    left = [e for p in errors if isinstance((e := read_json(p, notes)).get("text"), str)]
    ended = {str(e.get("task")) for e in left} | {p.stem for p in tasks if p.with_suffix(".done").exists()}
    silent = [p.stem for p in tasks if p.stem not in ended]
    gone = f"task {silent[0]} was killed or ended without a word" if silent else ""
    if not left:
        return "", False, gone, ""
    if not gone and not any(e.get("primary", True) for e in left):
        earliest = min(left, key=lambda e: number(e.get("time")) or 0.0)
        if ENDED.fullmatch(earliest["text"].strip()):
            return "", False, "", f"ended by {by}"
    first = min(left, key=lambda e: (not e.get("primary", True), number(e.get("time")) or 0.0))
    return f"task {first.get('task', '?')}: {first['text'].strip()}", bool(first.get("primary", True)), gone, ""


def _read_events(folder: Path, a: Attempt, notes: list[str]) -> None:
    events = read_events(folder, notes)
    a.recorded = events is not None
    for event in events or []:
        a.engine_restarts += event["kind"] == RESTART
        if event["kind"] == CONTINUED:
            a.began_at = a.began_at or event["text"]
        else:
            a.faults.append(event["text"])
    if len(a.faults) > FAULTS_SHOWN:
        a.faults[FAULTS_SHOWN:] = [f"... and {len(a.faults) - FAULTS_SHOWN} more in events/"]


def _last(metrics: Path) -> tuple[str, int] | None:
    """(phase, step) of the last whole record of a metrics file."""
    try:
        with open(metrics, "rb") as f:
            f.seek(max(0, metrics.stat().st_size - 65536))
            lines = f.read().split(b"\n")[:-1]
        for line in reversed(lines):
            record: Any = json.loads(line)
            return str(record["phase"]), int(record["step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))
    except OSError:
        return []


def _times(paths: Iterable[Path]) -> list[float]:
    """When they were last written to, of those that are there."""
    out = []
    for path in paths:
        try:
            out.append(path.stat().st_mtime)
        except OSError:  # noqa: PERF203 - removed meanwhile
            continue
    return out
