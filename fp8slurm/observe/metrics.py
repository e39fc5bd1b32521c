"""metrics.jsonl: one record a step, appended and fsynced; cut back to a checkpoint on a resume. See docs/metrics.md."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import patiently, read_bytes

PHASES = ("sft", "rl")
Record = dict[str, Any]
Position = tuple[str, int]
"""(phase, step): every sft step lies before every rl step."""
TIMED = ("time/", "throughput/")
"""Prefixes of the keys that depend on the machine's speed."""


def position(record: Mapping[str, Any]) -> Position:
    """Where a record stands in the run."""
    return record["phase"], record["step"]


def order(at: Position) -> tuple[int, int]:
    """A position as numbers that sort by time. ValueError: unknown phase."""
    phase, step = at
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r} is not one of {', '.join(PHASES)}")
    return PHASES.index(phase), step


class MetricsWriter:
    """Appends to `path`. With resume_at = (phase, step) of the checkpoint that a run goes on from, records behind it
    and a torn last line are removed first; with None, everything is. InputError: a broken line before the last."""

    def __init__(self, path: Path, resume_at: Position | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._last: Position | None = None
        keep = 0
        if resume_at is not None and self.path.exists():
            for record, end in _complete_lines(self.path):
                if order(position(record)) > order(resume_at):
                    break
                self._last, keep = position(record), end
        self._file = open(self.path, "ab", buffering=0)
        self._end = keep
        patiently(lambda: self._append(b""))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record with `phase` and `step`; numbers may be 0-d tensors, NaN and infinities become null.

        Raises:
            OSError: the disk stays full, or the file system away, for longer than `patiently` waits.
        """
        plain = {key: _plain(value) for key, value in record.items()}
        at = position(plain)
        assert self._last is None or order(at) > order(self._last), f"record {at} after {self._last}"
        line = json.dumps(plain, allow_nan=False).encode() + b"\n"
        patiently(lambda: self._append(line))
        self._end += len(line)
        self._last = at

    def _append(self, line: bytes) -> None:
        """Behind the last record that is on disk, also where an earlier try left a part of this one: after a failed
        fsync a second one says nothing about the pages of the first."""
        self._file.truncate(self._end)
        while line:
            written: int | None = self._file.write(line)
            if written is None:  # Python's files answer so
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self.path))
            line = line[written:]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; every record is on disk already."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsTail:
    """Follows a metrics.jsonl that another process writes."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._at = 0

    def poll(self) -> list[Record]:
        """The records completed since the last call; what is none is left out. A file that was cut back is followed
        from its new end. OSError: it cannot be read now, and the next call begins where this one did."""
        try:
            with open(self.path, "rb") as f:
                at = min(self._at, os.fstat(f.fileno()).st_size)
                f.seek(max(0, at - 1))
                if at and f.read(1) != b"\n":  # cut back and grown past here since: on from its next line
                    f.readline()
                at = f.tell()
                data: bytes | None = f.read()
        except FileNotFoundError:
            return []
        if data is None:  # Python's files answer so
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(self.path))
        data = data[: data.rfind(b"\n") + 1]
        self._at = at + len(data)
        return [record for line in data.splitlines() if (record := _record(line)) is not None]


def read_metrics(path: Path) -> list[Record]:
    """All records of a file or of a run directory; a torn last line is left out. InputError: no file, a broken line."""
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a run directory or a metrics.jsonl")
    return [record for record, _ in _complete_lines(path)]


def column(records: list[Record], key: str, phase: str = "rl") -> tuple[list[int], list[float]]:
    """(steps, values) of the records of a phase in which `key` has a number."""
    rows = [(r["step"], r[key]) for r in records if r["phase"] == phase and r.get(key) is not None]
    return [step for step, _ in rows], [value for _, value in rows]


def without_times(record: Record) -> Record:
    """The record less what depends on the machine's speed: equal in two deterministic runs."""
    return {key: value for key, value in record.items() if not key.startswith(TIMED)}


def _complete_lines(path: Path) -> list[tuple[Record, int]]:
    """(record, first byte behind its line); a last line without its line break, or unreadable, was torn by a crash."""
    lines, end = [], 0
    whole = read_bytes(path).split(b"\n")
    raw = [line + b"\n" for line in whole[:-1]] + [line for line in whole[-1:] if line]
    for number, line in enumerate(raw, 1):
        end += len(line)
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no line break")
            record = json.loads(line)
            order(position(record))
        except (KeyError, TypeError, ValueError) as error:
            if number == len(raw):
                break
            raise TransientInputError(f"{path}:{number} is not a metrics record: {error}") from None
        lines.append((record, end))
    return lines


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
        order(position(record))
    except (KeyError, TypeError, ValueError):
        return None
    return record


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a 0-d tensor or a numpy number
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
