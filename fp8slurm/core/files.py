"""Small files that are there whole or not at all, and the sums of large ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fp8slurm.core.errors import TransientInputError

Result = TypeVar("Result")

MAY_PASS = {
    errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EREMOTEIO, errno.ENOTCONN,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET,
}  # fmt: skip
"""What a shared file system answers while a server is away, a folder is being replaced or a disk is full."""
PAUSES_S = (0.2, 1.0, 5.0)


def patiently(act: Callable[[], Result], pauses_s: Sequence[float] = PAUSES_S) -> Result:
    """What `act` returns. An error that may pass (MAY_PASS, a file that is torn now) is waited for, with these pauses.

    act: must bear to be called again after it failed halfway.

    Raises:
        whatever the last call raised; at once what no wait mends: a file that is not there, missing rights.
    """
    for pause in pauses_s:
        try:
            return act()
        except OSError as error:
            if error.errno not in MAY_PASS:
                raise
        except TransientInputError:
            pass
        time.sleep(pause)
    return act()


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises OSError, also for EAGAIN, which Python's own files answer with None."""
    content: bytes | None = path.read_bytes()
    if content is None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
    return content


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


def names_in(folder: Path) -> list[str]:
    """What is in a folder, in no order; nothing if it is not there.

    Raises OSError where it cannot be read: Path.glob of Python 3.13 shows such a folder as an empty one, and a run
    would begin anew, or take itself for replaced.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


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
        value = json.loads(read_bytes(path).decode())
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
