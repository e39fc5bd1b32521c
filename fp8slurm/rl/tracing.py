"""A training rank's end of `fp8slurm trace`: one step under torch.profiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MEMORY_EVENTS = 200_000
"""Allocations and frees of a step that are kept, the newest."""
log = logging.getLogger(__name__)


@contextmanager
def traced(attempt_dir: Path, rank: int, name: str) -> Iterator[None]:
    """What happens inside as attempts/N/trace/NAME/rank_R.json.gz; on a GPU also
    rank_R.memory.pickle (pytorch.org/memory_viz). A file is there whole or not at all; where it cannot be written, the
    run goes on. An exception inside leaves no trace."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as p:
            yield
        folder = attempt_dir / "trace" / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / f"rank_{rank}.json.gz", p.export_chrome_trace)
            if cuda:
                _write(folder / f"rank_{rank}.memory.pickle", torch.cuda.memory._dump_snapshot)
            log.info("the trace of %s is in %s", name, folder)
        except (OSError, RuntimeError) as error:  # RuntimeError: the profiler's, of a file that it cannot open
            log.error("the trace of %s could not be written: %s", name, error)
    finally:
        if cuda:
            torch.cuda.memory._record_memory_history(enabled=None)


def _write(path: Path, write: Callable[[str], object]) -> None:
    part = path.with_name(f"tmp.{path.name}")  # the suffix tells the profiler to compress
    try:
        write(str(part))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
