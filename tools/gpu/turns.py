"""Jobs of a visit that start up beside one another and then measure one after the other, alone on the GPU.

tools/gpu/visit.py gives a job TURNS = FOLDER:COUNT. Servers take a minute and more to start, most of it on the CPU; the COUNT
jobs of a folder do that together, wait until all of them are ready, and then take turns by a file lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 240.0
"""A job that is not ready by then is not waited for."""


def arrive(folder: Path, name: str) -> None:
    """This job needs the GPU for nothing but its measurement from now on, or is over."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.ready").touch()


@contextmanager
def alone(name: str, limit_s: float = LIMIT_S) -> Iterator[None]:
    """Wait until every job of this one's folder is ready, then have the GPU alone; nothing at all outside a visit."""
    if "TURNS" not in os.environ:
        yield
        return
    text, _, count = os.environ["TURNS"].rpartition(":")
    folder = Path(text)
    arrive(folder, name)
    until = time.time() + limit_s
    while len(list(folder.glob("*.ready"))) < int(count) and time.time() < until:
        time.sleep(0.2)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
