"""Who runs where: a pure value computed from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fp8slurm.config import RunConfig


@dataclass(frozen=True)
class Task:
    """One process of the job."""

    index: int
    """Number of the task in the job; Slurm deals tasks to nodes in blocks."""
    node: int
    role: Literal["rank", "agent"]
    number: int
    """Megatron rank, or the agent's number (one a node)."""
    gpu: int | None
    """Index into the GPUs that the node was given; None for an agent."""


@dataclass(frozen=True)
class Placement:
    """All tasks of a job: on every node `ranks_per_node` Megatron ranks, then the node's agent."""

    nodes: int
    ranks_per_node: int
    tasks: tuple[Task, ...]

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def tasks_per_node(self) -> int:
        return self.ranks_per_node + 1


def place(config: RunConfig) -> Placement:
    """The placement of a configuration."""
    nodes, ranks = config.slurm.nodes, config.slurm.ranks_per_node
    tasks = []
    for node in range(nodes):
        for local in range(ranks + 1):
            index = node * (ranks + 1) + local
            if local < ranks:
                tasks.append(Task(index, node, "rank", node * ranks + local, local))
            else:
                tasks.append(Task(index, node, "agent", node, None))
    return Placement(nodes, ranks, tuple(tasks))
