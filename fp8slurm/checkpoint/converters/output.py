"""Where a conversion's result grows: OUT.tmp, renamed to OUT when it is complete; what is finished there is kept.

One conversion at a time works in OUT.tmp. Its process and a random token lie there: while that process is alive on this
machine, others are refused; on another machine nobody can tell, so the newest one takes OUT.tmp over, and the one
before finds another token and stops before it gives a file its name.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.core.files import fsync_folder
from fp8slurm.core.processes import process_of, process_start

log = logging.getLogger(__name__)
FINGERPRINT = "conversion.json"
OWNER = "conversion.owner.json"
OURS = frozenset({FINGERPRINT, OWNER})
"""Files of OUT.tmp that are not part of the result."""
PART = ".part"


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
        self._token = secrets.token_hex(8)

    def check(self, folders: Iterable[Path], files: Iterable[Path] = ()) -> None:
        """InputError if OUT exists (without overwrite) or is no folder, is an input folder or lies in one, holds an
        input file (where a link leads), or if OUT.tmp is not ours."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            what = "a symbolic link" if self.path.is_symlink() else "no folder"
            raise InputError(f"{self.path} is {what}; OUT must be a folder or not exist yet")
        folders, files = [p.resolve() for p in folders], [p.resolve() for p in files]
        for place in (self.path.resolve(), self.tmp.resolve()):
            for folder in folders:
                if place == folder or folder in place.parents or place in folder.parents:
                    raise InputError(f"{self.path}: the output must lie outside the input {folder}")
            for file in files:
                if place in file.parents:
                    raise InputError(f"{self.path}: the input file {file} lies in it; give another OUT")
        if self.path.exists() and not self._overwrite:
            raise InputError(f"{self.path} exists; give another folder, or --overwrite to replace it")
        made_by_us = self.tmp.is_dir() and ((self.tmp / FINGERPRINT).is_file() or not any(self.tmp.iterdir()))
        if self.tmp.is_symlink() or (self.tmp.exists() and not made_by_us):
            raise InputError(f"{self.tmp} exists and no conversion made it; move it away")

    def begin(self) -> None:
        """Make OUT.tmp, or take up the one that an interrupted conversion of the same input left.

        InputError: another process of this machine works in it.
        """
        owner = self._owner()
        living = process_of(owner) if owner else None
        if living:
            raise InputError(f"{self.tmp}: {living} is converting into it; wait for it, end it, or give another OUT")
        mark = self.tmp / FINGERPRINT
        if mark.is_file() and mark.read_text() != self._fingerprint:
            shutil.rmtree(self.tmp)
        self.tmp.mkdir(parents=True, exist_ok=True)
        for part in self.tmp.glob("*" + PART):
            part.unlink(missing_ok=True)
        if not mark.is_file():
            write_durably(mark, self._fingerprint.encode())
        pid = os.getpid()
        me = {"host": socket.gethostname(), "pid": pid, "start": process_start(pid), "token": self._token}
        write_durably(self.part(OWNER), json.dumps(me).encode())
        os.replace(self.part(OWNER), self.tmp / OWNER)

    def part(self, name: str) -> Path:
        """Where the file `name` grows: under a name of this conversion alone, so that no other one writes into it."""
        return self.tmp / f"{name}.{self._token}{PART}"

    def _owner(self) -> dict[str, Any] | None:
        """Who works in OUT.tmp; None if that is not known."""
        try:
            return json.loads((self.tmp / OWNER).read_text())
        except (OSError, ValueError):
            return None

    def check_owner(self) -> None:
        """BadCheckpoint if another conversion has begun in OUT.tmp since `begin`."""
        if (self._owner() or {}).get("token") != self._token:
            raise BadCheckpoint(f"another conversion took {self.tmp} over; this one stops without touching it")

    def release(self) -> None:
        """This conversion is over, finished or not: another may begin."""
        if (self._owner() or {}).get("token") == self._token:
            (self.tmp / OWNER).unlink(missing_ok=True)

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
        """Rename OUT.tmp to OUT. Everything in it must be expected: strangers are an error, not shipped along.

        With overwrite, OUT is called OUT.old.PID.TOKEN for the moment between two renames. One that a crash left goes
        with the next --overwrite; without it, its path is logged.
        """
        self.check_owner()
        there = {p.name for p in self.tmp.iterdir()} - OURS
        if there != expected:
            raise BadCheckpoint(f"{self.tmp}: unexpected or missing files: {sorted(there ^ expected)}")
        fsync_folder(self.tmp)
        if self.path.exists():
            os.rename(self.path, self.path.with_name(f"{self.path.name}.old.{os.getpid()}.{self._token}"))
        os.rename(self.tmp, self.path)
        fsync_folder(self.path.parent)
        # only now: a .tmp folder without it would look like a stranger's after a crash
        for name in OURS:
            (self.path / name).unlink()
        for old in self._left_over():
            if self._overwrite:
                shutil.rmtree(old)
            else:
                log.warning("%s: a folder that an interrupted --overwrite replaced; remove it if it is not needed", old)

    def _left_over(self) -> list[Path]:
        """Folders that OUT was renamed to by conversions that were to replace it."""
        name = re.compile(re.escape(self.path.name) + r"\.old\.\d+\.[0-9a-f]{16}")
        return [p for p in self.path.parent.iterdir() if name.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
