"""What tasks leave in an attempt's folder when they end: their last words, and how the attempt stopped."""

from __future__ import annotations

import json
import re
import time
import traceback
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import names_in, patiently, read_json, write_atomic
from fp8slurm.core.node_faults import node_name

FRAMES = 20
"""Of a foreign error's traceback, the innermost that are recorded."""
STOPPED = "stopped.json"

VERDICT = "verdict.json"
ENDED = re.compile(r"(task \S+: )?(ended by SIG(TERM|INT)|the process that started it \(\d+\) is gone)")
"""What a task says of itself (process/monitor.py) where it was told to end, and nothing was wrong with it."""


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would only meet the error again; of no foreign error that is known."""
    return getattr(error, "permanent", False) is True


def describe(error: BaseException) -> str:
    """An error for the record: the line of one of ours, the last frames of a foreign one's traceback."""
    if isinstance(error, InputError):
        return str(error)
    return "".join(traceback.format_exception(error, limit=-FRAMES))


def record_error(
    folder: Path, index: int, text: str, primary: bool = True, permanent: bool = False, fault: str = ""
) -> None:
    """Write a task's last words where the launcher looks for them; secondary ones are consequences of another's, after
    permanent ones it is no use to start again. fault: what is wrong with this node (core/node_faults.py)."""
    path = folder / f"task_{index}.json"
    said = {"time": time.time(), "task": index, "primary": primary, "permanent": permanent, "text": text}
    if fault:
        said |= {"node": node_name(), "fault": fault}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomic(path, json.dumps(said))

    patiently(write)


def task_errors(attempt_dir: Path) -> list[dict[str, Any]]:
    """What `record_error` has written in an attempt. Raises OSError, TransientInputError."""
    folder = attempt_dir / "errors"
    return [
        read_json(folder / name) for name in names_in(folder) if name.startswith("task_") and name.endswith(".json")
    ]


def left_out(attempts: Path) -> list[dict[str, Any]]:
    """The nodes that a run has left out when it was requeued, in the order of its attempts: node, why. What cannot be
    read says nothing."""
    found = []
    for number in sorted(int(name) for name in names_in(attempts) if name.isdigit()):
        try:
            record = read_json(attempts / str(number) / STOPPED).get("left_out")
        except (OSError, TransientInputError):
            continue
        if isinstance(record, dict) and isinstance(record.get("node"), str):
            found.append(record)
    return found


def first_error(attempt_dir: Path, vanished: bool = True) -> str | None:
    """What brought the attempt down: what the job script found out from srun, else a task that vanished without a word
    (killed), else the earliest error that was nobody else's consequence. None if there was no error.
    `vanished` False: the launcher itself killed what was left.
    """
    verdict = attempt_dir / "errors" / VERDICT
    if verdict.is_file():
        return read_json(verdict)["text"]
    errors = task_errors(attempt_dir)
    spoken = {str(e["task"]) for e in errors}
    tasks = attempt_dir / "tasks"
    for path in sorted(tasks / name for name in names_in(tasks) if name.endswith(".json") and name[0].isdigit()):
        if vanished and path.stem not in spoken and not path.with_suffix(".done").exists():
            return f"task {path.stem} (process {read_json(path)['pid']}) was killed or ended without a word"
    if not errors:
        return None
    first = min(errors, key=lambda e: (not e["primary"], e["time"]))
    return f"task {first['task']}: {first['text']}"
