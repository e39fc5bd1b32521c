"""Who runs where: a pure value computed from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError


@dataclass(frozen=True)
class Task:
    """One process of the job."""

    index: int
    """Number of the task in the job; Slurm deals tasks to nodes in blocks."""
    node: int
    role: Literal["rank", "worker"]
    number: int
    """Megatron rank, or the rollout worker's number (one a node)."""
    gpu: int | None
    """Index into the GPUs that the node was given; None for a rollout worker."""


@dataclass(frozen=True)
class EnginePlace:
    """One SGLang server, owned by its node's rollout worker."""

    node: int
    number: int
    """Number of the engine on its node."""
    gpus: tuple[int, ...]
    """Indices into the GPUs that the node was given, one a tensor-parallel rank; empty on the CPU."""


@dataclass(frozen=True)
class Placement:
    """All tasks of a job (on every node its Megatron ranks, then its rollout worker), and the engines."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    tasks: tuple[Task, ...]
    engines: tuple[EnginePlace, ...]

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node + 1

    def engines_of(self, node: int) -> tuple[EnginePlace, ...]:
        """The engines of a node's rollout worker."""
        return tuple(e for e in self.engines if e.node == node)


def place(config: RunConfig) -> Placement:
    """The placement of a configuration.

    Raises:
        InputError: ranks and engines do not fit the GPUs of a node; the flags are named.
    """
    s, e = config.slurm, config.engine
    first_engine_gpu = _check_gpus(config)
    tasks, engines = [], []
    for node in range(s.nodes):
        for local in range(s.ranks_per_node + 1):
            index = node * (s.ranks_per_node + 1) + local
            if local < s.ranks_per_node:
                tasks.append(Task(index, node, "rank", node * s.ranks_per_node + local, local))
            else:
                tasks.append(Task(index, node, "worker", node, None))
        for number in range(e.per_node):
            start = first_engine_gpu + number * e.tensor_parallel_size
            gpus = tuple(range(start, start + e.tensor_parallel_size)) if s.gpus_per_node else ()
            engines.append(EnginePlace(node, number, gpus))
    return Placement(s.nodes, s.ranks_per_node, s.gpus_per_node, tuple(tasks), tuple(engines))


def _check_gpus(config: RunConfig) -> int:
    """Whether ranks and engines fit the GPUs of a node; returns the first GPU index that an engine gets."""
    s, e = config.slurm, config.engine
    needed = e.per_node * e.tensor_parallel_size
    engines = f"--engine.per-node {e.per_node} x --engine.tensor-parallel-size {e.tensor_parallel_size}"
    if e.placement == "shared":
        if e.gpus:
            raise InputError(
                f"--engine.gpus {e.gpus} with --engine.placement shared: engines have none of their own; allowed: 0"
            )
        if s.gpus_per_node and s.ranks_per_node != s.gpus_per_node:
            raise InputError(
                f"--slurm.ranks-per-node {s.ranks_per_node} with --slurm.gpus-per-node {s.gpus_per_node}: with "
                f"--engine.placement shared every GPU trains; allowed: equal numbers"
            )
        if s.gpus_per_node and needed > s.gpus_per_node:
            raise InputError(f"{engines} = {needed} GPUs; a node has --slurm.gpus-per-node {s.gpus_per_node}")
        return 0
    if not s.gpus_per_node:
        raise InputError("--engine.placement split needs GPUs to split: set --slurm.gpus-per-node")
    if s.ranks_per_node + e.gpus != s.gpus_per_node or not e.gpus:
        raise InputError(
            f"--engine.placement split: --slurm.ranks-per-node {s.ranks_per_node} + --engine.gpus {e.gpus} must be "
            f"--slurm.gpus-per-node {s.gpus_per_node}, and both at least 1"
        )
    if needed != e.gpus:
        raise InputError(f"{engines} = {needed} GPUs, and --engine.gpus is {e.gpus}: they must be equal")
    return s.ranks_per_node
