"""What a task sets before it imports torch: variables that libraries read when they are imported, GPUs, logging."""

from __future__ import annotations

import logging
import os
import sys

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import transport_of
from fp8slurm.config.placement import Placement, Task
from fp8slurm.core.errors import InputError
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import Job

GPUS = "FP8SLURM_CUDA_VISIBLE_DEVICES"
"""CUDA_VISIBLE_DEVICES of the process that starts local tasks, or "all": submitit's local executor gives them none."""


def set_environment(config: RunConfig, placement: Placement, task: Task) -> None:
    """Environment variables that libraries read when they are imported.

    Raises:
        InputError: Slurm gave this node fewer GPUs than the placement needs.
    """
    assert "torch" not in sys.modules, "torch was imported before the environment was set: it has counted its threads"
    from fp8slurm.fp8.environment import set_fp32_scales

    set_fp32_scales()
    if config.slurm.cpu_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.slurm.cpu_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(config, len(os.sched_getaffinity(0)))))
    # Trainer and engine take turns on the same cores: a thread that spins while it waits would take the other's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN and torch's layer over it keep 0.5 MB for every shape of a BF16 product, 1024 shapes each, and hardly two
    # micro-batches have the same shape: a rank would grow by 10 MB a step.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    # Ranks and rollout workers wait on the store in turns of seconds, and torch would write two warnings for each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if placement.nodes == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = slurm.interface_of(slurm.address())
        os.environ.setdefault("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
        if problem := slurm.no_such_interface(os.environ["NCCL_SOCKET_IFNAME"]):
            raise InputError(problem)
    if placement.gpus_per_node:
        set_gpus(placement.gpus_per_node)
        if transport_of(config) in ("nccl", "gloo-direct"):  # both ends of a group have to agree, and SGLang sets it so
            os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        # NCCL's flight recorder: the last collectives of every rank, for the monitor to write out when nothing moves.
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # its name since torch 2.10, and before
            os.environ.setdefault(name, "2000")
    else:  # a node may have GPUs that this run has not asked for: ranks and engines take what they see
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def threads_of_a_rank(config: RunConfig, cores: int) -> int:
    """Of the cores that a task may run on: its own, if Slurm has dealt them out, else a share of them."""
    dealt = os.environ.get("SLURM_CPUS_PER_TASK", "") if config.slurm.executor == "slurm" else ""
    return min(cores, int(dealt)) if dealt.isdigit() else max(1, cores // config.slurm.ranks_per_node)


def see_gpus() -> None:
    """Undo that submitit's local executor hides the GPUs."""
    gpus = os.environ.pop(GPUS, None)
    if gpus == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    elif gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus


def set_gpus(needed: int) -> None:
    """CUDA_VISIBLE_DEVICES = the GPUs that Slurm gave this node, which are not always 0, 1, ...; a task's `gpu` is an
    index into them. Raises InputError where they are too few."""
    given = slurm.gpu_list()
    if Job.here() is not None and len(given) < needed:
        bound = slurm.gpu_binding(os.environ)
        raise InputError(
            f"Slurm gave this {'task' if bound else 'node'} {len(given)} GPUs ({','.join(given) or 'none'}), "
            f"--slurm.gpus-per-node is {needed}{f'; {bound} binds GPUs to tasks: leave it out' if bound else ''}"
        )
    if given:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given)


def set_logging(config: RunConfig, task: Task) -> None:
    first = task.role == "worker" or task.number == 0
    level = (config.run.log_level if first else config.run.rank_log_level).upper()
    line = f"%(asctime)s %(levelname)s {task.role} {task.number} %(name)s: %(message)s"
    logging.basicConfig(level=level, format=line, stream=sys.stderr, force=True)


def address_of(placement: Placement) -> str:
    """Where the store and gloo listen."""
    if placement.nodes == 1:
        return "127.0.0.1"
    return slurm.address()
