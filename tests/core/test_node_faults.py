"""Which errors are a machine's own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fp8slurm.core import node_faults
from fp8slurm.core.node_faults import is_local, node_fault, try_local_disk

LOCAL, SHARED = "/dev/shm/x", "/proc/x"


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: CUDA error: uncorrectable ECC error encountered",
        "torch.AcceleratorError: CUDA error: no CUDA-capable device is detected",
        "NVRM: Xid (PCI:0000:4b:00): 79, GPU has fallen off the bus.",
        "CUDA error: an uncorrectable NVLink error was detected during the execution",
        "Unable to determine the device handle for GPU0000:4B:00.0: GPU is lost.",
    ],
)
def test_gpus_that_failed(text: str) -> None:
    assert node_fault(RuntimeError(text), text)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: unspecified launch failure",
        "KeyError: 'Xidia'",
    ],
)
def test_what_a_program_does_to_itself(text: str) -> None:
    assert not node_fault(RuntimeError(text), text)


def test_a_local_disk() -> None:
    def caused(error: OSError) -> RuntimeError:
        outer = RuntimeError("the engine did not start")
        outer.__cause__ = error
        return outer

    full = OSError(errno.ENOSPC, "No space left on device", LOCAL)
    assert (
        node_fault(full, "")
        == node_fault(caused(full), "")
        == f"No space left on device on its own file system: {LOCAL}"
    )
    for error in (
        OSError(errno.ENOSPC, "No space left on device", SHARED),  # what other nodes mount, too
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOENT, "No such file", LOCAL),
    ):
        assert not node_fault(error, "")
    assert is_local(Path(LOCAL)) and not is_local(Path(SHARED)) and not is_local(Path("/nowhere/at/all"))


def test_a_full_disk_is_found_before_anything_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    try_local_disk()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(node_faults.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}") as caught:
        try_local_disk()
    assert caught.value.errno == errno.ENOSPC and not os.listdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    try_local_disk()  # somebody else's to miss
