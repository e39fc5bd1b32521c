"""What happened in an attempt, for its readers: attempts/N/events/task_I.jsonl, a line for each event.

A task appends to a file of its own: two writers on a shared file system never append to the same one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

CONTINUED, SKIPPED, NOT_SAVED, NO_UPDATE, RESTART = "continued", "skipped", "not saved", "no update", "engine restart"
"""Kinds. The text of CONTINUED is the checkpoint's name, that of the others a sentence."""
log = logging.getLogger(__name__)
_lock = threading.Lock()
_file: Path | None = None


def keep_events(attempt_dir: Path, task: int) -> None:
    """From here on this process records its events; a process that has not called this records none."""
    global _file
    _file = attempt_dir / "events" / f"task_{task}.jsonl"
    try:
        _file.parent.mkdir(exist_ok=True)
        _file.touch()
    except OSError as error:
        log.error("events may not be recorded: %s", error)


def record_event(kind: str, text: str) -> None:
    """Append an event; a full disk is no reason to fail."""
    if _file is None:
        return
    line = json.dumps({"time": time.time(), "kind": kind, "text": text}) + "\n"
    try:
        with _lock, open(_file, "a") as f:
            f.write(line)
    except OSError as error:
        log.error("an event could not be recorded: %s", error)


def read_events(attempt_dir: Path, notes: list[str]) -> list[dict[str, Any]] | None:
    """The events of all tasks by time; None: none were recorded (an older version's run, or it ended before)."""
    try:
        paths = sorted((attempt_dir / "events").glob("task_*.jsonl"))
        lines = [line for path in paths for line in path.read_bytes().splitlines()]
    except OSError as error:
        notes.append(f"{error.filename} cannot be read: {error.strerror}")
        return None
    events = []
    for line in lines:
        try:
            event = json.loads(line)
            events.append({"time": float(event["time"]), "kind": str(event["kind"]), "text": str(event["text"])})
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            notes.append(f"attempts/{attempt_dir.name}/events: a line cannot be read (torn?)")
    return sorted(events, key=lambda event: event["time"]) if paths else None
