"""A run directory as a report sees it: whatever is there is read, whatever cannot be is said in `notes`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.numbers import number
from fp8slurm.observe.metrics import Record, order, position
from fp8slurm.run.attempts import Attempt, read_attempts
from fp8slurm.run.directory import RunDirectory, is_run
from fp8slurm.run.evaluations import Comparison, Evaluation, read_comparisons, read_evaluations
from fp8slurm.run.read_json import read_json

Series = list[tuple[int, float | None]]
"""(step, value); None where the step recorded a NaN or an infinity."""


@dataclass
class Run:
    """One run; every part may be empty."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    checkpoint: str = ""
    """Name of the newest that was sealed."""
    notes: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """ "section.key", None where there is none."""
        section, _, name = key.partition(".")
        return self.config.get(section, {}).get(name)

    def series(self, key: str, phase: str = "rl") -> Series:
        """A key's values over the steps of a phase that recorded it."""
        return [(r["step"], number(r[key])) for r in self.records if r["phase"] == phase and key in r]

    def values(self, key: str, phase: str = "rl") -> list[float]:
        """The finite ones, in order."""
        return [v for _, v in self.series(key, phase) if v is not None]

    def last_step(self, phase: str = "rl") -> int | None:
        """Newest recorded step of a phase."""
        return max((r["step"] for r in self.records if r["phase"] == phase), default=None)

    def keys(self, prefix: str = "") -> list[str]:
        """Keys of the records that begin with `prefix`, sorted."""
        return sorted({k for r in self.records for k in r if k.startswith(prefix)})


def read_run(path: Path) -> Run:
    """A run directory. InputError: it is none."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is no folder: give a run directory, such as runs/tiny-fp8")
    if not is_run(path):
        raise InputError(
            f"{path} is no run directory: it has no metrics.jsonl, attempts or config.json of a run; give runs/NAME"
        )
    run = Run(path, path.resolve().name)
    run.config = read_config(path / "config.json", run.notes)
    run.records = read_records(path / "metrics.jsonl", run.notes)
    try:
        run.checkpoint = RunDirectory(path).newest_checkpoint()
    except OSError as error:
        run.notes.append(f"checkpoints/ cannot be read: {error.strerror}")
    run.attempts = read_attempts(path, run.notes)
    run.evaluations = read_evaluations(path / "eval", run.notes)
    run.comparisons = read_comparisons(path / "eval", run.notes)
    return run


def read_config(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Sections of config.json."""
    if not path.exists():
        notes.append("config.json is missing: the configuration is unknown")
    config = read_json(path, notes)
    return {str(k): v for k, v in config.items() if isinstance(v, dict)}


def read_records(path: Path, notes: list[str]) -> list[Record]:
    """The records of metrics.jsonl in the order of the run; broken lines and repeated steps are left out and
    counted."""
    try:
        raw = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        notes.append("metrics.jsonl is missing: no step has been recorded yet")
        return []
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read: {error.strerror}")
        return []
    torn = raw.pop()  # a step that is being written, or was when the run was killed
    records, broken = parse_records(raw)
    repeated = len(raw) - broken - len(records)
    if broken:
        notes.append(f"metrics.jsonl: {broken} of {len(raw)} lines cannot be read and are left out")
    if repeated:
        notes.append(f"metrics.jsonl: {repeated} steps are there twice; the later line counts")
    if torn:
        notes.append("metrics.jsonl ends in half a line, which is left out: the run is writing it, or was killed")
    if not records and not broken:
        notes.append("metrics.jsonl is empty: no step has been recorded yet")
    return records


def parse_records(lines: list[bytes]) -> tuple[list[Record], int]:
    """(records in the order of the run, lines that are none); the later one of two of a step counts."""
    records: dict[tuple[int, int], Record] = {}
    broken = 0
    for line in lines:
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int) or isinstance(record["step"], bool):
                raise TypeError
            records[order(position(record))] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            broken += 1
    return [records[at] for at in sorted(records)], broken
