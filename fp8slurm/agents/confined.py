"""The child process that runs one tool's code: gives up what it is not to have, then runs the code.

Started by sandbox.Sandbox as `python -m fp8slurm.agents.confined FILE`; the file's keys are those of `main`. It imports
little, for it starts with every call. Linux only; the steps and what each keeps away stand in STEPS.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import os
import resource
import signal
import struct
import sys
import traceback
from typing import Any

from fp8slurm.core.processes import limit_memory

STEPS = {
    "namespaces": "no network, and no process, shared memory or semaphore of anybody else",
    "read-only": "no file is written outside of the tool's own folder",
    "scratch": "that folder is memory of bounded size, gone at the end",
    "proc": "/proc shows the tool's own processes only",
}
"""What keeps a tool apart, in the order in which it is done. Where the first fails, so do the others."""
LOST = 125
"""Status: a step failed that went well when the sandbox was made."""
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x00020000 | 0x08000000  # user, net, pid, mount, ipc
_MOUNT_SETATTR, _RECURSIVE, _READ_ONLY = 442, 0x8000, 1
_NOSUID_NODEV, _NOSUID_NODEV_NOEXEC = 6, 14
_EMPTY = b"size=4k,mode=0555"
_DEATH_SIGNAL, _NO_NEW_PRIVILEGES = 1, 38
_CAPSET, _CAPABILITIES_V3 = {"x86_64": 126, "aarch64": 91}, 0x20080522
_INSIDE_ID = 65534

_libc = ctypes.CDLL(None, use_errno=True)


def main(path: str) -> None:
    """Run `source` in `folder`, after `steps`, within the limits `memory_mib`, `disk_mib`, `cpu_s` and `processes`.

    `hidden`: folders that are empty for it. With `probe` nothing is run: it prints, as JSON, which steps fail and why.
    """
    with open(path, encoding="utf-8") as f:
        spec = json.load(f)
    _die_with_parent()
    failed: dict[str, str] = {}
    if "namespaces" in spec["steps"]:
        _attempt(failed, "namespaces", _unshare)
    if not failed and spec["steps"]:
        child = os.fork()  # a process namespace is its creator's children's
        if child:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(status if status >= 0 else 128 - status)
        _die_with_parent()
        _attempt(failed, "read-only", _make_read_only)
        folder = spec["folder"].encode()
        for path in spec["hidden"]:
            _attempt(
                failed, "hidden", lambda: _mount(b"none", path.encode(), b"tmpfs", _NOSUID_NODEV, b"size=4k,mode=0555")
            )
        size = f"size={spec['disk_mib']}m,nr_inodes=10000,mode=0700".encode()
        _attempt(failed, "scratch", lambda: _mount(b"none", folder, b"tmpfs", _NOSUID_NODEV, size))
        _attempt(failed, "proc", lambda: _mount(b"proc", b"/proc", b"proc", _NOSUID_NODEV_NOEXEC, None))
        _drop_capabilities()
    if spec["probe"]:
        print(json.dumps(failed))
        return
    if lost := [step for step in failed if step in spec["steps"] or step == "hidden"]:
        print(f"{lost[0]}: {failed[lost[0]]}", file=sys.stderr)
        sys.exit(LOST)
    _limit(spec)
    os.chdir(spec["folder"])
    _run(spec["source"])


def _attempt(failed: dict[str, str], step: str, do: Any) -> None:
    try:
        do()
    except OSError as error:
        failed[step] = f"{error}"


def _call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _die_with_parent() -> None:
    _libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _unshare() -> None:
    """Own namespaces, in which this user is nobody, so that a new program gets no capability there."""
    user, group = os.geteuid(), os.getegid()
    _call(_libc.unshare(_NAMESPACES), "unshare")
    for name, line in (
        ("setgroups", "deny"), ("uid_map", f"{_INSIDE_ID} {user} 1"), ("gid_map", f"{_INSIDE_ID} {group} 1")
    ):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as f:
            f.write(line)


def _make_read_only() -> None:
    """Every mount there is; mount_setattr is Linux 5.12's."""
    attributes = struct.pack("4Q", _READ_ONLY, 0, 0, 0)
    _call(_libc.syscall(_MOUNT_SETATTR, -1, b"/", _RECURSIVE, attributes, len(attributes)), "mount_setattr")


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes | None) -> None:
    _call(_libc.mount(source, target, kind, flags, data), f"mount on {target.decode()}")


def _drop_capabilities() -> None:
    """Those that the namespace gave; without them mounts cannot be undone. RuntimeError: the kernel refuses."""
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, none = struct.pack("Ii", _CAPABILITIES_V3, 0), bytes(24)
    if os.uname().machine not in _CAPSET or _libc.syscall(_CAPSET[os.uname().machine], header, none) != 0:
        raise RuntimeError(f"capset failed ({os.uname().machine}): {os.strerror(ctypes.get_errno())}")


def _limit(spec: dict[str, Any]) -> None:
    limit_memory(spec["memory_mib"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (spec["disk_mib"] << 20, spec["disk_mib"] << 20))
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu_s"], spec["cpu_s"]))
    if "namespaces" in spec["steps"]:  # counted within the namespace there, over all processes of the user elsewhere
        resource.setrlimit(resource.RLIMIT_NPROC, (spec["processes"], spec["processes"]))


def _run(source: str) -> None:
    name = "tool.py"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    sys.path.insert(0, "")
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None  # without this function
        traceback.print_exception(error.with_traceback(own))
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
