"""Files that a command is told to write."""

from __future__ import annotations

from pathlib import Path

from fp8slurm.core.errors import InputError


def check_file(path: Path, flag: str) -> None:
    """Before the work is done: InputError where `path`, given with `flag`, is a folder or lies in none."""
    if path.is_dir():
        raise InputError(f"{flag} {path} is a folder: give the name of a file")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no folder {path.parent}")
