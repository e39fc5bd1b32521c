"""Runs whose processes meet errors of the file system (injector.cpp), started again as a job script would."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_runs import TIMEOUT_S, TinyRuns, weights

from fp8slurm.observe.metrics import read_metrics, without_times

ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EAGAIN)


@dataclass(frozen=True)
class Fault:
    """The (skip + 1)-th call of a kind on a path that matches, in one process of a role, fails once."""

    role: str
    """command, rank or worker."""
    call: str
    """open, read, write, fsync or rename (of what it is renamed to)."""
    pattern: str
    """As fnmatch takes it; * also stands for slashes."""
    error: int
    skip: int = 0

    def line(self) -> str:
        return f"{self.role} {self.call} {self.error} {self.skip} {self.pattern}\n"


def compile_injector(folder: Path) -> Path:
    library = folder / "injector.so"
    source = Path(__file__).parent / "faults" / "injector.cpp"
    subprocess.run(["c++", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def arm(library: Path, folder: Path, faults: list[Fault]) -> dict[str, str]:
    """What a process needs in its environment to meet these faults; `folder` keeps which it has met."""
    (folder / "plan").mkdir(parents=True)
    for number, fault in enumerate(faults):
        (folder / "plan" / f"{number:03d}").write_text(fault.line())
    return {"LD_PRELOAD": str(library), "FAULTS": str(folder), "FAULTS_RANKS": "2"}


def fired(folder: Path) -> list[str]:
    path = folder / "fired"
    return path.read_text().splitlines() if path.exists() else []


def left(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted((folder / "plan").iterdir())]


def is_permanent(attempt: Path) -> bool:
    """What the job script asks before it requeues."""
    return any(json.loads(path.read_text())["permanent"] for path in (attempt / "errors").glob("task_*.json"))


def run_through(runs: TinyRuns, name: str, environment: dict[str, str], starts: int) -> list[str]:
    """Start the run until it has ended well, `starts` times at most; what each start said."""
    said: list[str] = []
    while True:
        process = runs.start(name, environment=os.environ | environment)
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            runs.stop(process)
        said.append(runs.said(process))
        if status == 0:
            return said
        numbers = [int(path.name) for path in (runs.path(name) / "attempts").iterdir()]
        newest = runs.path(name) / "attempts" / str(max(numbers))
        assert status == 1 and not is_permanent(newest), said[-1]
        assert "Traceback (most recent call last)" not in said[-1].partition("the run failed")[0], said[-1]
        assert len(said) < starts, "\n".join(said)


def check_same(run: Path, reference: Path, folder: Path) -> None:
    """The same records (times and failed saves left out), and weights equal in every byte; `folder` for the exports."""

    def records(path: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in without_times(r).items() if k != "checkpoint/failed"} for r in read_metrics(path)]

    assert records(run) == records(reference)
    got, want = weights(run, folder / "got"), weights(reference, folder / "want")
    assert got.keys() == want.keys()
    differ = [name for name in want if not torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8))]
    assert not differ, differ
