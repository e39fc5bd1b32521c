"""COMPLETE, the seal of a run's checkpoint: the size and SHA-256 of every file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fp8slurm.core.files import sha256


def damage(folder: Path, only: Iterable[str] | None = None) -> str | None:
    """Why a checkpoint cannot be used, or None. only: names of the files in the folder to look at; left out: all."""
    complete = folder / "COMPLETE"
    if not complete.is_file():
        return "COMPLETE is missing"
    try:
        files = {n: (want["bytes"], want["sha256"]) for n, want in json.loads(complete.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = {}
    if not files:
        return "COMPLETE cannot be read"
    chosen = list(files if only is None else only)
    for name in chosen:
        path = folder / name
        if name not in files:
            return f"{name} is not among the files that COMPLETE names"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != files[name][0]:
            return f"{name} has {path.stat().st_size} bytes instead of {files[name][0]}"
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(chosen, list(pool.map(sha256, (folder / name for name in chosen)))):
            if digest != files[name][1]:
                return f"{name} was altered (SHA-256)"
    return None
