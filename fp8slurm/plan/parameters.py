"""How Megatron shares a model out: the parameters that a rank of each pipeline stage holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fp8slurm.config.schema import ParallelSection
from fp8slurm.fp8.policy import decide
from fp8slurm.models.entries import Entry
from fp8slurm.models.names import NameTable

EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; the data-parallel ones follow from the number of ranks."""

    world: int
    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int
    sequence_parallel: bool
    context: int = 1

    @classmethod
    def of(cls, parallel: ParallelSection, world: int) -> Layout:
        """The layout of `world` ranks; check_layout has accepted it."""
        return cls(
            world, parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.expert_parallel_size,
            parallel.expert_tensor_parallel_size, parallel.sequence_parallel, parallel.context_parallel_size,
        )  # fmt: skip

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters: over them gradients are reduced and the optimizer is sharded."""
        return self.world // (self.tensor * self.pipeline)

    @property
    def data(self) -> int:
        """Groups of ranks that work on different sequences."""
        return self.replicas // self.context

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same experts."""
        return self.world // (self.expert * self.expert_tensor * self.pipeline)

    @property
    def experts_apart(self) -> bool:
        """Whether Megatron reduces the experts' gradients over a group and a buffer of their own."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    def __str__(self) -> str:
        sequence = " + sequence" if self.sequence_parallel else ""
        context = f" x context {self.context}" if self.context > 1 else ""
        text = f"tensor {self.tensor}{sequence}{context} x pipeline {self.pipeline} x data {self.data}"
        if self.expert > 1 or self.expert_tensor > 1:
            text += f"; experts: {self.expert} x tensor {self.expert_tensor} x data {self.expert_data}"
        return text


class Buffer(NamedTuple):
    """One of Megatron's contiguous buffers: parameters in the distributed optimizer, gradients always."""

    elements: int
    padded: int
    """Elements with the padding that the distributed optimizer wants."""
    data: int
    """Ranks over which it is reduced and the optimizer is sharded."""
    experts: bool
    """Experts that are reduced over a group of their own; else everything else."""


@dataclass(frozen=True)
class StageParameters:
    """The parameters of one rank of a pipeline stage; all ranks of a stage hold equally many."""

    stage: int
    layout: Layout
    entries: tuple[Entry, ...]
    layers: int
    embedding: Entry
    tied: bool
    """Whether output layer and embedding are one parameter."""

    @property
    def head_copy(self) -> Entry | None:
        """The embedding, where this is a tied model's last stage and keeps a copy of it as its output layer."""
        return self.embedding if self.tied and 0 != self.stage == self.layout.pipeline - 1 else None

    def numel(self, entry: Entry) -> int:
        """Elements of this rank's shard."""
        size = self.layout.expert_tensor if entry.expert is not None else self.layout.tensor
        return math.prod(entry.shard_shape(size))

    @cached_property
    def dense(self) -> int:
        """Elements outside the experts, the copied output layer included."""
        copy = self.numel(self.head_copy) if self.head_copy else 0
        return copy + sum(self.numel(e) for e in self.entries if e.expert is None)

    @cached_property
    def experts(self) -> int:
        """Elements in this rank's experts."""
        return sum(self.numel(e) for e in self.entries if e.expert is not None)

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @cached_property
    def quantized(self) -> int:
        """Elements of the matrices that are multiplied in FP8."""
        return sum(map(self.numel, self._quantized))

    @cached_property
    def largest_quantized(self) -> int:
        """Elements of the largest of them."""
        return max(map(self.numel, self._quantized), default=0)

    @cached_property
    def _quantized(self) -> list[Entry]:
        return [e for e in self.entries if all(decide(t.name, t.shape).quantize for t in e.tensors)]

    @cached_property
    def buffers(self) -> list[Buffer]:
        """Dense parameters, and experts where they are reduced over a group of their own.

        With the distributed optimizer parameters begin at multiples of 64 elements and buckets end at multiples of
        lcm(data-parallel size, 128) (megatron-core 0.19.2, optimizer/param_layout.py); without overlap there is one
        bucket, and one more for an embedding that two stages share.
        """
        groups: dict[bool, list[int]] = {}
        shared = []
        for entry in self.entries:
            apart = entry.expert is not None and self.layout.experts_apart
            if entry.name == EMBEDDING and self.tied and self.layout.pipeline > 1:
                shared.append(self.numel(entry))
            else:
                groups.setdefault(apart, []).append(self.numel(entry))
        if self.head_copy:
            shared.append(self.numel(self.head_copy))
        out = []
        for apart, sizes in groups.items():
            data = self.layout.expert_data if apart else self.layout.replicas
            more = [] if apart else shared
            padded = sum(_pad(n, math.lcm(data, 128)) for n in [sum(_pad(s, 64) for s in sizes), *more])
            out.append(Buffer(sum(sizes) + sum(more), padded, data, apart))
        return out


def _pad(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def stages(table: NameTable, layout: Layout) -> list[StageParameters]:
    """The parameters of a rank of each stage: equally many layers on each, an expert-parallel share of the experts."""
    held: list[list[Entry]] = [[] for _ in range(layout.pipeline)]
    for entry in table:
        if not table.expert_rank(entry, layout.expert):
            held[table.stage(entry, layout.pipeline)].append(entry)
    layers, tied = table.spec.num_layers // layout.pipeline, table.spec.tie_word_embeddings
    return [StageParameters(s, layout, tuple(e), layers, table[EMBEDDING], tied) for s, e in enumerate(held)]
