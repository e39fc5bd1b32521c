"""Attempts of a run: when each began and ended, which steps it took, why it ended, and what went wrong in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8slurm.core.processes import process_of
from fp8slurm.run.task_errors import first_error

LOG_BYTES = 32 << 20
"""As much of a log is searched, from its end."""
FAULTS_SHOWN = 50
_SKIPPED = re.compile(r"checkpoint (\S+) is skipped: (.*)")
_FROM = re.compile(r"continuing from \S*?((?:sft|step)_\d+)")
_ENGINE = re.compile(r"engine (\d+(?:\.\d+)?) failed(.*)")
_BAD_STEP = re.compile(
    r"(step \d+: no (?:group with signal|sample to train on); no update|checkpoint \S+ was not "
    r"written.*|"
    r"checkpoint \S+ cannot be begun.*)"
)


@dataclass
class Attempt:
    """One start of the run."""

    number: int
    started: float | None = None
    """Unix seconds."""
    ended: float | None = None
    """None: unknown, or it goes on."""
    began_at: str = ""
    """Checkpoint that it continued from; "" without one."""
    last: tuple[str, int] | None = None
    """(phase, step) of its last record, where known."""
    state: str = "unknown"
    """running, done, stopped, failed or unknown."""
    why: str = ""
    """Why it ended, in one text (may be a traceback)."""
    faults: list[str] = field(default_factory=list)
    """Skipped checkpoints, engine restarts and the like, in the order of the logs."""
    engine_restarts: int = 0
    command: list[str] = field(default_factory=list)
    packages: dict[str, str] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)
    job: str = ""
    """Slurm job."""
    stacks: int = 0
    """Tasks that left their stacks."""


def read_attempts(run: Path, notes: list[str]) -> list[Attempt]:
    """All attempts, oldest first."""
    folder = run / "attempts"
    try:
        numbers = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        notes.append("attempts/ is missing: when the run was started, and how it ended, is unknown")
        return []
    except OSError as error:
        notes.append(f"attempts/ cannot be read: {error.strerror}")
        return []
    return [_read(folder / str(n), n, n == numbers[-1], run, notes) for n in numbers]


def _read(folder: Path, number: int, newest: bool, run: Path, notes: list[str]) -> Attempt:
    from fp8slurm.run.read_json import read_json

    a = Attempt(number)
    said = read_json(folder / "versions.json", notes)
    a.command = [str(x) for x in said.get("command") or [] if isinstance(x, (str, int))]
    a.packages = {str(k): str(v) for k, v in said["packages"].items()} if isinstance(said.get("packages"), dict) else {}
    a.changed = [str(x) for x in said.get("changed") or [] if isinstance(x, str)]
    owner = read_json(folder / "owner.json", notes)
    a.job = str(owner.get("job") or "")
    tasks = [p for p in _glob(folder, "tasks/[0-9]*.json")]
    done = list(_glob(folder, "tasks/*.done"))
    errors = list(_glob(folder, "errors/*.json"))
    a.stacks = len(list(_glob(folder, "stacks/task_*")))
    begun = [t for p in [folder / "versions.json", *tasks] if (t := _mtime(p)) is not None]
    a.started = min(begun, default=None)
    stopped = read_json(folder / "stopped.json", notes)
    ends = [t for p in [*done, *errors, folder / "stopped.json"] if (t := _mtime(p)) is not None]
    logs = sorted(_glob(folder, "logs/*_log.err")) + sorted(_glob(folder, "logs/*_log.out"))
    _search(logs, a)
    a.last = _last(run / "metrics.jsonl" if newest else folder / "metrics.jsonl")
    if not a.began_at and isinstance(owner.get("checkpoint"), str):
        a.began_at = owner["checkpoint"]
    if _living(owner) and not errors and len(done) < max(1, len(tasks)):
        a.state, a.why = "running", ""
        return a
    try:
        error = first_error(folder)
    except (OSError, ValueError, KeyError, TypeError):
        error = "an error was left in errors/ that cannot be read"
    if stopped:
        saved = f"{'saved' if stopped.get('saved') else 'not saved'} at {stopped['at']}" if stopped.get("at") else ""
        parts = (stopped.get("why"), saved, stopped.get("next") or stopped.get("why_not"), error)
        a.state, a.why = "stopped", "; ".join(str(x) for x in parts if x)
    elif error is not None:
        a.state, a.why = "failed", error
    elif tasks and len(done) >= len(tasks):
        a.state, a.why = "done", "every task ended by itself"
    else:
        a.why = "nothing was left that says so" if tasks else "it ended before its tasks began"
    last_words = [t for p in logs if (t := _mtime(p)) is not None]
    a.ended = max(ends or last_words, default=None)
    return a


def _search(logs: list[Path], a: Attempt) -> None:
    """Fill in what the tasks' logs say."""
    more = 0
    for path in logs:
        for line in _lines(path):
            found = ""
            if m := _FROM.search(line):
                a.began_at = a.began_at or m[1]
            elif m := _SKIPPED.search(line):
                found = f"checkpoint {Path(m[1]).name} was skipped: {m[2]}"
            elif m := _ENGINE.search(line):
                a.engine_restarts += "; restart" in m[2]
                found = f"engine {m[1]} failed{m[2]}"
            elif m := _BAD_STEP.search(line):
                found = m[1]
            if found and len(a.faults) < FAULTS_SHOWN:
                a.faults.append(found)
            elif found:
                more += 1
    if more:
        a.faults.append(f"... and {more} more in the logs")


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - LOG_BYTES))
            for line in f:
                yield line[:2000].decode(errors="replace").rstrip()
    except OSError:
        return


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


def _living(owner: dict[str, Any]) -> bool:
    try:
        return process_of(owner) is not None
    except (KeyError, TypeError, OSError):
        return False


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return [p for p in folder.glob(pattern) if not p.name.startswith(".")]
    except OSError:
        return []


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
