"""What the tasks of an attempt do until it trains: attempts/N/phases/task_I.json, for `status` and the console.

A task writes a file of its own, whole each time: two writers on a shared file system never write the same one.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import NamedTuple

from fp8slurm.core.files import write_atomic
from fp8slurm.core.numbers import number
from fp8slurm.run.read_json import read_json
from fp8slurm.run.task_errors import STOPPED

CHECKING = "checking settings and data"
LOADING = "loading ranks"
CHECKPOINT = "making the engine's checkpoint"
STARTING = "starting engines"
COMPILING = "compiling kernels"
FIRST_UPDATE = "first update of the engines"
START = "measuring the start, before any update"
TRAINING = "training"
READY = "ready"
IN_ORDER = (CHECKING, CHECKPOINT, LOADING, STARTING, COMPILING, FIRST_UPDATE, START, TRAINING, READY)
log = logging.getLogger(__name__)
_file: Path | None = None
_text = ""


class Phase(NamedTuple):
    """What some task does, and since when (Unix seconds)."""

    text: str
    since: float


def keep_phases(attempt_dir: Path, task: int) -> None:
    """From here on this process says what it does; a process that has not called this says nothing."""
    global _file, _text
    _file, _text = attempt_dir / "phases" / f"task_{task}.json", ""


def enter_phase(text: str) -> None:
    """This process does something else from now on; a full disk is no reason to fail."""
    global _text
    if _file is None or text == _text:
        return
    _text = text
    try:
        _file.parent.mkdir(exist_ok=True)
        write_atomic(_file, json.dumps({"phase": text, "since": time.time()}))
    except OSError as error:
        log.error("that it is %s could not be written: %s", text, error)


def read_phases(attempt_dir: Path) -> list[Phase]:
    """What keeps an attempt from training, in the order in which a start goes; empty where it trains, or has said
    nothing. Torn files say nothing."""
    found: dict[str, float] = {}
    try:
        if next((attempt_dir / "errors").glob("*.json"), None) or (attempt_dir / STOPPED).exists():
            return []  # it is over, or about to be
        paths = list((attempt_dir / "phases").glob("task_*.json"))
    except OSError:
        return []
    for path in paths:
        said = read_json(path, [])
        since = number(said.get("since"))
        if isinstance(said.get("phase"), str) and since is not None:
            found[said["phase"]] = min(since, found.get(said["phase"], since))
    if TRAINING in found:
        return []
    rank = {text: place for place, text in enumerate(IN_ORDER)}
    known = [Phase(text, since) for text, since in found.items() if text in rank and text != READY]
    return sorted(known, key=lambda phase: rank[phase.text])
