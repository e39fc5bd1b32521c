"""Host memory, /dev/shm and limits of this machine."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError

MEMORY, SHARED, LIMITS = Check("memory"), Check("shm"), Check("limits")

SHM = Path("/dev/shm")
MIB = 2**20
DOCTORS_JOB = "fp8slurm-doctor"
"""Name of the job that `fp8slurm doctor --slurm` queues."""
NO_LIMIT = 2**60
"""cgroup v1 says "none" as a number of this size."""
SHM_A_PROCESS = 64 * MIB
"""Free /dev/shm for each task and engine rank: NCCL's buffers between GPUs without peer access, SGLang's queues,
torch's shared tensors. Assumed, generous."""
OPEN_FILES = (1024, 4096)
"""Below the first an error, below the second a warning: sockets between all ranks, checkpoint files, pipes."""


def processes(config: RunConfig) -> int:
    """Tasks and engine ranks on a node."""
    return config.slurm.ranks_per_node + 1 + config.engine.per_node * config.engine.tensor_parallel_size


def check_machine(configs: list[RunConfig], plans: bool) -> Iterator[Finding]:
    """plans: compare host memory with `fp8slurm plan`, which imports torch."""
    yield from _memory(configs if plans else [])
    yield from _shm(max((processes(c) for c in configs), default=4))
    yield from _limits()


def _memory(configs: list[RunConfig]) -> Iterator[Finding]:
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    given = os.environ.get("SLURM_MEM_PER_NODE", "")  # MiB; the job's limit
    job = int(given) * MIB if given.isdigit() and int(given) else total
    own = (
        os.environ.get("SLURM_JOB_NAME") == DOCTORS_JOB and job == total
    )  # has less than the run unless it says how much
    group = total if own else min(cgroup_limits(), default=total)
    limit, whose = min((total, ""), (job, ", the job's limit"), (group, ", the cgroup's limit"), key=lambda one: one[0])
    free = min(free, limit)
    enough = True
    for config in configs:
        if not config.slurm.gpus_per_node:
            continue
        from fp8slurm.plan import make_plan

        try:
            host = {item.name: item.bytes for item in make_plan(config).host}
        except InputError:  # a layout that cannot be: train and submit say why
            continue
        needed = sum(host.values())
        if needed > free:
            enough = False
            parts = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in host.items())
            yield MEMORY.error(
                f"{config.run.name}: a node needs {needed / 1e9:.0f} GB of host memory ({parts}); {free / 1e9:.0f} GB"
                f" are free here{whose if free == limit else ''}",
                "--slurm.memory 0 asks for all of the node; more nodes or --optim.no-cpu-offload lower the need"
                " (fp8slurm plan)",
            )
    if enough:
        yield MEMORY.ok(f"{free / 1e9:.0f} of {total / 1e9:.0f} GB of host memory free{whose if free == limit else ''}")


def cgroup_limits(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that this process' cgroup and those above it allow, of both versions (cgroups(7)). What is pinned or lies
    in /dev/shm counts, and a process that takes more is ended."""
    limits = []
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        for at in (folder, *folder.parents):
            with suppress(OSError):
                text = (at / name).read_text().strip()
                limits += [int(text)] if text.isdigit() and int(text) < NO_LIMIT else []
            if at == base:
                break
    return limits


def _shm(count: int) -> Iterator[Finding]:
    needed = count * SHM_A_PROCESS
    try:
        stat = os.statvfs(SHM)
    except OSError as error:
        yield SHARED.error(f"{SHM}: {error.strerror}", "it must be a tmpfs; in a container mount the host's")
        return
    size, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    shown = f"{SHM}: {free / MIB:.0f} of {size / MIB:.0f} MiB free"
    if free < needed:
        left = [p.name for p in SHM.iterdir() if p.name.startswith(("sgl_", "torch_", "nccl-", "psm_", "sem."))]
        yield SHARED.error(
            f"{shown}; {count} processes want {needed // MIB} MiB",
            f"remove what dead jobs left ({len(left)} files of SGLang, torch and NCCL are there), or mount it larger "
            "(docker --shm-size, mount -o remount,size=)",
        )
    elif not os.access(SHM, os.W_OK):
        yield SHARED.error(f"{SHM} cannot be written", "it must have mode 1777")
    else:
        yield SHARED.ok(shown)


def _limits() -> Iterator[Finding]:
    fine = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES[1]:
        up = (
            f"ulimit -n {hard if hard > 0 else 65536} in --slurm.setup"
            if hard > soft or hard == -1
            else "ask the site to raise the hard limit"
        )
        yield Finding(
            "limits",
            "error" if soft < OPEN_FILES[0] else "warning",
            f"open files: {soft} (hard limit {hard}); {OPEN_FILES[1]} are enough",
            up,
        )
    else:
        fine.append(f"open files {'unlimited' if soft == resource.RLIM_INFINITY else soft}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024} KiB"
    if infiniband and locked != resource.RLIM_INFINITY:
        yield LIMITS.error(
            f"locked memory: {shown}; InfiniBand registers memory and needs it unlimited",
            "PropagateResourceLimitsExcept=MEMLOCK in slurm.conf and LimitMEMLOCK=infinity for slurmd: ask the site",
        )
    else:
        fine.append(f"locked memory {shown}{'' if infiniband else ' (no InfiniBand here, so it does not matter)'}")
    if fine:
        yield LIMITS.ok(", ".join(fine))
