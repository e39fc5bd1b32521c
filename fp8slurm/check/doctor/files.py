"""The shared file system, and the paths of the recipes, as this machine sees them."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.config import RunConfig

FILES, PATHS = Check("files"), Check("paths")

SKEW = (1.0, 5.0)
"""Seconds by which clocks may differ: above the first a warning, above the second an error. The job stops by its own
clock before the time limit that Slurm counts."""
LISTED = ("model.hf_checkpoint", "model.rollout_checkpoint", "data.train", "data.eval", "sft.data")


def check_folder(folder: Path, flag: str = "--run.root") -> Iterator[Finding]:
    """Exclusive creation, rename, fsync and hard link in the folder of the runs; its clock against this machine's.

    These are what a run directory stands on: no lock is taken anywhere. What is made is removed again.
    """
    base = folder
    while not base.exists() and base.parent != base:
        base = base.parent
    mine = base / f".fp8slurm-doctor-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    step = "create a folder"
    try:
        mine.mkdir(mode=0o700)
        step = "create a file exclusively"
        a, b = mine / "a", mine / "b"
        fd = os.open(a, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(fd, b"x" * 4096)
            step = "fsync a file"
            os.fsync(fd)
            skew = time.time() - os.fstat(fd).st_mtime
        finally:
            os.close(fd)
        step = "create a file exclusively"
        try:
            os.close(os.open(a, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            raise OSError(0, "the same file could be created exclusively twice")
        except FileExistsError:
            pass
        step = "make a hard link"
        os.link(a, b)
        step = "rename over a file"
        os.replace(b, mine / "c")
        os.replace(a, mine / "d")
        step = "fsync a folder"
        fd = os.open(mine, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        yield FILES.error(
            f"{flag} {folder}: cannot {step}: {error.strerror or error}",
            f"{flag} must be a folder on a file system that every node can write, with POSIX rename and hard links",
        )
        return
    finally:
        for name in "abcd":
            (mine / name).unlink(missing_ok=True) if mine.is_dir() else None
        if mine.is_dir():
            mine.rmdir()
    free = os.statvfs(base)
    yield FILES.ok(
        f"{flag} {folder}: exclusive create, rename, fsync, hard link; {free.f_bavail * free.f_frsize / 1e9:.0f} GB"
        " free"
    )
    yield from skew_finding(skew, "the file system's", "files")


def skew_finding(seconds: float, whose: str, check: str) -> Iterator[Finding]:
    """What a clock that is `seconds` ahead (behind, if negative) of `whose` means."""
    if abs(seconds) > SKEW[0]:
        yield Finding(
            check,
            "error" if abs(seconds) > SKEW[1] else "warning",
            f"this node's clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} {whose}",
            "ask the site to repair its time service (chronyc tracking); --slurm.exclude leaves the node out",
        )


def paths(config: RunConfig) -> list[tuple[str, Path]]:
    """(flag, path) of what a run reads."""
    values = config.model_dump()
    out = []
    for key in LISTED:
        section, name = key.split(".")
        if values[section][name] is not None:
            out.append((f"--{key.replace('_', '-')}", Path(values[section][name])))
    return out + [(f"--data.sources {name}.file", source.file) for name, source in config.data.sources.items()]


def digest(path: Path) -> str:
    """Names and sizes of a file's, or a folder's files: equal where two nodes see the same.

    Raises:
        OSError: a file cannot be read.
    """
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            f.read(1)
            sha.update(f"{file.name} {os.fstat(f.fileno()).st_size}\n".encode())
    return sha.hexdigest()


def check_paths(configs: list[RunConfig]) -> tuple[list[Finding], dict[str, str]]:
    """Checkpoint and data of the recipes, readable here; also {path: digest}, to compare with other nodes."""
    findings, digests = [], {}
    for flag, path in dict.fromkeys(p for c in configs for p in paths(c)):
        try:
            digests[str(path)] = digest(path)
        except OSError as error:
            findings.append(
                PATHS.error(
                    f"{flag} {path}: {error.strerror}",
                    "put it on a file system that every node mounts, with rights to read it; relative paths start at"
                    " the folder of the command",
                )
            )
    if digests:
        findings.append(PATHS.ok(f"readable: {', '.join(digests)}"))
    return findings, digests
