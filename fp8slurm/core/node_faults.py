"""What an error says about the machine it came up on: its GPUs or its local disk, and not the run."""

from __future__ import annotations

import errno
import os
import re
import socket
from contextlib import suppress
from pathlib import Path

GPU = re.compile(
    "uncorrectable (?:ECC|NVLink) error|GPU is lost|fallen off the bus|hardware stack error|no CUDA-capable device|"
    "CUDA-capable devices? (?:is|are) busy or unavailable|system not yet initialized|CUDA (?:error: )?unknown error|"
    r"\bXid\b|Unable to determine the device handle|nvlink or a hardware error",
    re.I,
)
"""CUDA's and NVML's words for hardware that has failed, as CUDA 13's cudaError texts and nvidia-smi have them. What a
program of ours may cause too (an illegal address, a launch failure) is not among them."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EREMOTEIO}


LOCAL = ("ext", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "f2fs")
"""Beginnings of the names of file systems that other nodes do not mount."""


def node_name() -> str:
    """This machine, as Slurm calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def node_fault(error: BaseException, text: str) -> str:
    """The fault of this machine that an error, recorded as `text`, speaks of; "" where it speaks of none."""
    if found := GPU.search(text):
        return found[0]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK and seen.filename is not None:
            path = Path(os.fsdecode(seen.filename))
            if is_local(path):
                return f"{os.strerror(seen.errno or 0)} on its own file system: {path}"
        seen = seen.__cause__ or seen.__context__
    return ""


def is_local(path: Path) -> bool:
    """Whether a file, or the folder that it would be in, lies on a file system of this machine alone."""
    try:
        device = os.stat(path if path.exists() else path.parent).st_dev
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [line.rpartition(" - ")[2].split()[0] for line in lines if line.split()[2] == number]
    return bool(kinds) and kinds[0].startswith(LOCAL)


def try_local_disk() -> None:
    """Write a file where this machine's programs put theirs. OSError with the folder: its file system is full, or
    broken; a folder that is not there, or not ours, is left to whoever needs it."""
    path = Path(os.environ.get("TMPDIR") or "/tmp") / f"fp8slurm-{os.getpid()}"
    try:
        with open(path, "wb", buffering=0) as f:
            f.write(bytes(1 << 20))
            os.fsync(f.fileno())
    except OSError as error:
        if error.errno in DISK:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(path.parent)) from None
    finally:
        with suppress(OSError):
            path.unlink()
