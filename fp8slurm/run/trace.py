"""`fp8slurm trace`: asks a run for a profile of its next step (docs/perf.md).

the command   attempts/N/trace.json                          which ranks
rank 0        takes it at the next step boundary, and tells all ranks       (rl/boundary.py)
these ranks   attempts/N/trace/step_000012/rank_0.json.gz    a step's profile (rl/tracing.py)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.files import write_atomic
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.read_json import read_json
from fp8slurm.run.status import find_run, statuses

REQUEST = "trace.json"
MOST_RANKS = 16
"""A profile takes memory and disk on each."""


def take_request(attempt_dir: Path) -> list[int]:
    """The ranks that are to trace the next step; the request is gone then. Empty: there is none, or a torn one."""
    file = attempt_dir / REQUEST
    if not file.exists():
        return []
    try:
        ranks = json.loads(file.read_text())["ranks"]
        file.unlink()
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [rank for rank in ranks if type(rank) is int] if isinstance(ranks, list) else []


def request(run: Path, ranks: list[int]) -> Path:
    """Ask for a trace of the next step; returns the folder that it comes into. InputError: nothing runs that could
    write it, or it has no such ranks."""
    (status,), _ = statuses([run])
    if status.state not in ("running", "held", "unknown") or status.attempt is None:
        raise InputError(f"{run} is {status.state}: only the steps of a running run can be traced")
    notes: list[str] = []
    slurm: dict[str, Any] = read_json(run / "config.json", notes).get("slurm") or {}
    world = int(slurm.get("nodes", 1)) * int(slurm.get("ranks_per_node", 1))
    if wrong := [rank for rank in ranks if not 0 <= rank < world]:
        raise InputError(f"--rank {wrong[0]}: {run} has {world} training ranks; allowed: 0 to {world - 1}")
    if len(set(ranks)) > MOST_RANKS:
        raise InputError(f"--rank: {len(set(ranks))} ranks; at most {MOST_RANKS} are traced at a time")
    attempt_dir = RunDirectory(run).attempts / str(status.attempt)
    write_atomic(attempt_dir / REQUEST, json.dumps({"ranks": sorted(set(ranks))}))
    return attempt_dir / "trace"


def main(argv: list[str]) -> int:
    """`fp8slurm trace RUN [--rank N ...]`; 0: asked for, without waiting."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm trace",
        description="Have a running run write a profile of its next step (torch.profiler, Chrome's format) and, on a "
        "GPU, its memory's history. Metrics and weights are not touched; the step takes longer.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory or name")
    parser.add_argument("--rank", type=int, nargs="+", default=[0], metavar="N", help="training ranks (default: 0)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run directories (%(default)s)")
    args = parser.parse_args(argv)
    folder = request(find_run(args.run, args.root), args.rank)
    print(f"the next step of rank {', '.join(map(str, sorted(set(args.rank))))} will be in {folder}")
    return 0
