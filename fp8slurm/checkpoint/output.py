"""Where a conversion's result grows: OUT.tmp, renamed to OUT when it is complete; what is finished there is kept."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Iterable

from fp8slurm.checkpoint.errors import BadCheckpoint

FINGERPRINT = "conversion.json"
PART = ".part"


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def disk_full(error: OSError, path: Path) -> OSError:
    """The same error with the way out, if it says that the disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"no space left on the disk of {path.parent}; finished shards are kept there, the same command goes on"
        return OSError(error.errno, text)
    return error


class OutputFolder:
    """OUT.tmp and its way to OUT.

    `fingerprint` says what is being made from what: a left-over OUT.tmp with the same one is continued, with another
    one it is made anew, and a folder of that name that no conversion made is refused.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any], overwrite: bool = False) -> None:
        self.path = Path(os.path.abspath(path))
        self.tmp = self.path.with_name(self.path.name + ".tmp")
        self._fingerprint = json.dumps(fingerprint, sort_keys=True, indent=1)
        self._overwrite = overwrite

    def check(self, inputs: Iterable[Path]) -> None:
        """ValueError if OUT exists (without overwrite), is an input or lies in one, or if OUT.tmp is not ours."""
        for folder in inputs:
            folder = folder.resolve()
            if (
                self.path.resolve() == folder
                or folder in self.path.resolve().parents
                or self.path.resolve() in folder.parents
            ):
                raise ValueError(f"{self.path}: the output must lie outside the input {folder}")
        if self.path.exists() and not self._overwrite:
            raise ValueError(f"{self.path} exists; give another folder, or --overwrite to replace it")
        if self.tmp.exists() and any(self.tmp.iterdir()) and not (self.tmp / FINGERPRINT).is_file():
            raise ValueError(f"{self.tmp} exists and no conversion made it; move it away")

    def begin(self) -> None:
        """Make OUT.tmp, or take up the one that an interrupted conversion of the same input left."""
        mark = self.tmp / FINGERPRINT
        if mark.is_file() and mark.read_text() != self._fingerprint:
            shutil.rmtree(self.tmp)
        self.tmp.mkdir(parents=True, exist_ok=True)
        for part in self.tmp.glob("*" + PART):
            part.unlink()
        if not mark.is_file():
            write_durably(mark, self._fingerprint.encode())

    def missing_bytes(self, sizes: dict[str, int]) -> int:
        """Bytes still to be written, given the size of every output file."""
        done = [n for n in sizes if (self.tmp / n).is_file() and (self.tmp / n).stat().st_size == sizes[n]]
        return sum(size for name, size in sizes.items() if name not in done)

    def free_bytes(self) -> int:
        """Free space on the output's disk."""
        folder = self.path
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_space(self, sizes: dict[str, int]) -> None:
        """OSError (ENOSPC) if what is missing does not fit."""
        needed, free = self.missing_bytes(sizes), self.free_bytes()
        if needed > free:
            raise OSError(errno.ENOSPC, f"{self.path}: {needed} bytes are to be written, {free} are free on that disk")

    def finish(self, expected: set[str]) -> None:
        """Rename OUT.tmp to OUT. Everything in it must be expected: strangers are an error, not shipped along."""
        there = {p.name for p in self.tmp.iterdir()} - {FINGERPRINT}
        if there != expected:
            raise BadCheckpoint(f"{self.tmp}: unexpected or missing files: {sorted(there ^ expected)}")
        fsync_folder(self.tmp)
        if self.path.exists():
            old = self.path.with_name(self.path.name + ".old")
            os.rename(self.path, old)
            os.rename(self.tmp, self.path)
            shutil.rmtree(old)
        else:
            os.rename(self.tmp, self.path)
        fsync_folder(self.path.parent)
        # only now: a .tmp folder without it would look like a stranger's after a crash
        (self.path / FINGERPRINT).unlink()
