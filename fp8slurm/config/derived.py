"""Settings that are decided by others where they are left open."""

from __future__ import annotations

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


def under_slurm(config: RunConfig) -> RunConfig:
    """The configuration with slurm.executor = "slurm", whatever it was."""
    return config.model_copy(update={"slurm": config.slurm.model_copy(update={"executor": "slurm"})})
