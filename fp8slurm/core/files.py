"""Small files that are there whole or not at all, and the sums of large ones."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import TransientInputError


def write_atomic(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a small file so that it is there with this text or not at all, also after a power cut."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(tmp, "w", opener=lambda name, flags: os.open(name, flags, mode)) as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)
    fsync_folder(path.parent)


MOST_JSON_BYTES = 100_000_000


def read_json(path: Path, error: type[TransientInputError] = TransientInputError) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: it cannot be read; whatever stands behind it (not there, stale, an I/O error) stays in its errno.
        TransientInputError: it is no JSON object, torn, longer than MOST_JSON_BYTES, or no regular file (a device has
            no end); the message names the file. `error` is raised in its place.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: not a regular file")
    if found.st_size > MOST_JSON_BYTES:
        raise error(f"{path}: {found.st_size} bytes of JSON; at most {MOST_JSON_BYTES} are allowed")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not JSON: {str(reason)[:200]}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object")
    return value


def fsync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
