"""Deterministic runs that meet error after error of the file system, in their ranks, their rollout worker and the command
that started them: each ends with the bytes of an undisturbed one. `make test-faults`."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from injection import ERRORS, Fault, arm, check_same, fired, left, run_through
from tiny_runs import TinyRuns

pytestmark = [pytest.mark.slow, pytest.mark.faults]

PLACES = [
    # What the command reads and writes before the tasks, while they work and when they have ended.
    ("command", "read", "*/data/train.jsonl", 0),
    ("command", "open", "*/attempts", 0),
    ("command", "write", "*/.owner.json.*", 0),
    ("command", "fsync", "*/.data.json.*", 0),
    ("command", "rename", "*/versions.json", 0),
    ("command", "rename", "*/runs/*/config.json", 0),
    ("command", "open", "*/metrics.jsonl", 0),
    ("command", "read", "*/metrics.jsonl", 0),
    ("command", "read", "*/metrics.jsonl", 3),
    ("command", "open", "*/errors", 0),
    ("command", "open", "*/errors", 9),
    ("command", "open", "*/tasks", 0),
    # Finding each other, and watching each other.
    ("rank", "rename", "*/tasks/*.json", 0),
    ("rank", "read", "*/tasks/*.json", 0),
    ("rank", "open", "*/tasks", 5),
    ("rank", "write", "*/.store.json.*", 0),
    ("rank", "open", "*/store.json", 0),
    ("rank", "read", "*/store.json", 0),
    ("worker", "fsync", "*/tasks/*", 0),
    ("worker", "read", "*/tasks/*.json", 0),
    ("worker", "open", "*/tasks", 7),
    ("worker", "read", "*/store.json", 0),
    # What a start reads: it is given up, and the next one reads it.
    ("rank", "read", "*/model/*", 0),
    ("rank", "read", "*/data/sft.jsonl", 0),
    ("worker", "open", "*/data/train.jsonl", 0),
    ("worker", "read", "*/model/tokenizer.json", 0),
    ("worker", "write", "*/engine_model*", 0),
    ("worker", "rename", "*/engine_model*", 0),
    # Records and events.
    ("rank", "write", "*/metrics.jsonl", 0),
    ("rank", "write", "*/metrics.jsonl", 5),
    ("rank", "fsync", "*/metrics.jsonl", 1),
    ("rank", "fsync", "*/metrics.jsonl", 4),
    ("rank", "rename", "*/metrics.jsonl", 0),
    ("rank", "write", "*/events/*", 0),
    ("rank", "rename", "*/pace.json", 0),
    # Checkpoints: written, sealed, renamed, and read by the next start.
    ("rank", "write", "*/checkpoints/*", 0),
    ("rank", "write", "*/checkpoints/*", 3),
    ("rank", "fsync", "*/checkpoints/*", 0),
    ("rank", "fsync", "*/checkpoints/*", 2),
    ("rank", "open", "*/checkpoints/*.distcp", 0),
    ("rank", "rename", "*/checkpoints/*/.metadata", 0),
    ("rank", "rename", "*/checkpoints/*/COMPLETE", 0),
    ("rank", "rename", "*/checkpoints/step_??????", 0),
]
RUNS = 4
TIMES = 2
"""Each place is met so often, by different errors in different runs."""


def faults_of(run: int) -> list[Fault]:
    chosen = [(i, place) for n in range(TIMES) for i, place in enumerate(PLACES) if (i + 2 * n) % RUNS == run]
    return [Fault(role, call, p, ERRORS[(i + run) % len(ERRORS)], skip) for i, (role, call, p, skip) in chosen]


@pytest.mark.parametrize("run", range(RUNS))
def test_a_run_that_meets_errors_of_the_file_system_ends_with_the_same_bytes(
    runs: TinyRuns, reference: Path, injector: Path, tmp_path: Path, run: int
) -> None:
    faults, name = faults_of(run), f"disturbed-{run}"
    said = run_through(runs, name, arm(injector, tmp_path / "faults", faults), len(faults))
    assert len(fired(tmp_path / "faults")) == len(faults), left(tmp_path / "faults")
    assert len(said) <= 8, "what is absorbed has ended attempts"
    check_same(runs.path(name), reference, tmp_path)


def test_there_are_enough_faults() -> None:
    faults = [fault for run in range(RUNS) for fault in faults_of(run)]
    assert len(faults) == TIMES * len(PLACES) >= 60
    assert {f.error for f in faults} == set(ERRORS) and {f.role for f in faults} == {"command", "rank", "worker"}
    assert {f.call for f in faults} == {"open", "read", "write", "fsync", "rename"} and errno.ENOSPC in ERRORS
