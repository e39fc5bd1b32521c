"""Settings that are decided by others where they are left open."""

from __future__ import annotations

import os
from typing import Literal

from fp8slurm.config.schema import RunConfig

TransportName = Literal["gloo", "cuda-ipc", "shared-memory", "nccl", "gloo-direct"]


def transport_of(config: RunConfig) -> TransportName:
    """sync.transport: by the handle of the memory where trainer and engines share GPUs, by NCCL where each have their
    own, else through the host."""
    chosen = config.sync.transport
    if chosen != "auto":
        return chosen
    if not config.slurm.gpus_per_node:
        return "gloo"
    return "nccl" if config.engine.placement == "split" else "cuda-ipc"


def engines_start_after_trainer(config: RunConfig) -> bool:
    """Whether an engine starts only when the trainer's state lies in the GPU's memory.

    It takes engine.mem_fraction of what is free when it starts: on a GPU that they share, started side by side, its
    share would depend on who comes first, and the trainer might find no room any more.
    """
    return config.slurm.gpus_per_node > 0 and config.engine.placement == "shared"


def engines_sleep(config: RunConfig) -> bool:
    """engine.sleep: where trainer and engines share GPUs."""
    sleep = config.engine.sleep
    return config.slurm.gpus_per_node > 0 and config.engine.placement == "shared" if sleep is None else sleep


def spare_cores(tasks: int) -> int:
    """Processes for rewards, where `tasks` others compute on the cores that this process may run on: 2 to 32."""
    return min(32, max(2, len(os.sched_getaffinity(0)) - tasks))


def reward_workers(config: RunConfig) -> int:
    """reward.workers: as many as the cores that the node's ranks and engines leave. In a Slurm job that gives each task
    cores of its own (slurm.cpus_per_task) the rollout worker shares its with the engines only."""
    s = config.slurm
    own = s.executor == "slurm" and s.cpus_per_task is not None
    return config.reward.workers or spare_cores(config.engine.per_node + (0 if own else s.ranks_per_node))


def recomputes_logprobs(config: RunConfig) -> bool:
    """train.recompute_logprobs: whether old log-probabilities take a forward pass of their own."""
    t = config.train
    return t.recompute_logprobs == "always" or t.updates_per_step * t.epochs_per_step > 1


def under_slurm(config: RunConfig) -> RunConfig:
    """The configuration with slurm.executor = "slurm", whatever it was."""
    return config.model_copy(update={"slurm": config.slurm.model_copy(update={"executor": "slurm"})})
