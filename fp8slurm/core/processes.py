"""Processes: where new ones find this package, and whether one that was written down is still the one that lives."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

PACKAGE_ROOT = str(Path(__file__).parents[2])
"""The folder that holds this package."""


def python_path() -> str:
    """PYTHONPATH for a process that imports this package from where this one has it."""
    return os.pathsep.join(filter(None, (PACKAGE_ROOT, os.environ.get("PYTHONPATH"))))


def limit_memory(mib: int) -> None:
    """Limit this process's address space from now on, for it and what it starts; 0: no limit."""
    if mib:
        resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a child that was started in a session of its own, and whatever of that session it started, and reap it.

    Before the child is reaped its id is its own. A process that has begun another session is not reached."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def process_start(pid: int) -> str | None:
    """Start time, as the kernel writes it, of a process of this machine; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def process_of(held: dict[str, Any]) -> str | None:
    """The living process of this machine that an owner.json describes, in words, or None."""
    pid, start = held.get("pid"), held.get("start")
    if held.get("host") == socket.gethostname() and type(pid) is int and start and process_start(pid) == start:
        return f"process {pid} on this machine"
    return None
