"""Bytes, buckets and messages of one weight update for any layout, without a GPU, a process group or a weight.

The same quantities are counted while an update runs: `WeightStream.counts` and `EngineLink.counts`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fp8slurm.fp8.block import scale_shape
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import QuantizationSpec
from fp8slurm.sync.bucket import payload_bytes
from fp8slurm.sync.plan import SourcePlan, source_plans, stage_names


@dataclass
class RankTraffic:
    """One training rank's part in an update. Ranks that are not listed have none."""

    stage: int
    position: int
    """Rank within the stage: Megatron numbers tensor-parallel ranks first, then expert- and data-parallel ones."""
    gathered: int = 0
    """Bytes that it hands to the source of its group."""
    gathers: int = 0
    """Messages that those bytes travel in."""
    broadcast: int = 0
    """Bytes that it sends to the engines (to the rollout workers, where those relay)."""
    buckets: int = 0
    """Broadcasts that those bytes travel in."""


@dataclass
class Traffic:
    """One whole update."""

    ranks: list[RankTraffic]
    """In the order of stage and position."""
    payload: int
    """Bytes of all buckets: what a rollout worker receives and may keep, and what every engine rank is handed."""
    buckets: int
    gathers: int
    """Messages to sources, of all ranks together."""
    loaded: int
    """Bytes handed to each tensor-parallel rank of an engine; its loader keeps its slice of them."""
    largest_bucket: int
    """Bytes; a source and a relaying rollout worker hold two at a time."""
    bf16: int
    """Bytes of the same tensors in BF16."""
    quantized: int
    """Bytes of the quantized matrices, scales included."""
    quantized_bf16: int
    """Bytes of those matrices in BF16."""
    gather_bf16: int
    """Bytes handed to sources if everything that is cut were gathered in BF16."""
    methods: dict[str, int] = field(default_factory=dict)
    """Number of tensors by method."""
    unaligned: list[str] = field(default_factory=list)
    """Tensors whose cut falls inside a block: gathered in the trainer's dtype."""

    @property
    def ratio(self) -> float:
        """Payload by its size in BF16."""
        return self.payload / self.bf16

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def traffic(
    table: NameTable,
    quantization: QuantizationSpec | None,
    bucket_bytes: int,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    trainer_dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """What one update moves.

    quantization: of the engine's checkpoint, None for BF16. dtype: the engine's for what is not quantized;
    trainer_dtype: the trainer's parameters'. Sizes as in ParallelSection; each has to divide what it cuts (InputError).
    """
    result = Traffic([], 0, 0, 0, 0, 0, 0, 0, 0, 0)
    for stage, names in enumerate(stage_names(table, pipeline_parallel_size)):
        ranks: dict[int, RankTraffic] = {}

        def add(source: SourcePlan, first: int, size: int) -> None:
            members = [ranks.setdefault(i, RankTraffic(stage, i)) for i in range(first, first + size)]
            _add(result, source, members, dtype, trainer_dtype)

        for expert_rank in range(expert_parallel_size if table.spec.is_moe else 1):
            held = [n for n in names if table.expert_rank(table[n], expert_parallel_size) in (None, expert_rank)]
            dense, experts = source_plans(
                table, held, f"stage{stage}", quantization, dtype, bucket_bytes,
                tensor_parallel_size, expert_tensor_parallel_size, expert_rank,
            )  # fmt: skip
            if expert_rank == 0:
                add(dense, 0, tensor_parallel_size)
            if experts is not None:
                add(experts, expert_rank * expert_tensor_parallel_size, expert_tensor_parallel_size)
        result.ranks += [ranks[i] for i in sorted(ranks)]
    result.loaded = result.payload
    return result


def _add(
    total: Traffic, source: SourcePlan, members: list[RankTraffic], dtype: torch.dtype, trainer_dtype: torch.dtype
) -> None:
    for bucket, specs in enumerate(source.buckets):
        size = payload_bytes(specs)
        members[0].broadcast += size
        members[0].buckets += 1
        total.payload += size
        total.buckets += 1
        total.largest_bucket = max(total.largest_bucket, size)
        pieces = source.pieces(bucket, dtype, trainer_dtype)
        for member in members[1:] if pieces else ():
            member.gathered += payload_bytes(pieces)
            member.gathers += 1
            total.gathers += 1
    for p in source.planned:
        elements = math.prod(p.shape)
        total.bf16 += 2 * elements
        total.methods[p.method] = total.methods.get(p.method, 0) + 1
        if p.method != "local":
            total.gather_bf16 += 2 * elements * (len(p.slices) - 1) // len(p.slices)
        if p.quantized:
            total.quantized_bf16 += 2 * elements
            total.quantized += elements + 4 * math.prod(scale_shape(p.shape))
        if p.method == "gather-quantize":
            total.unaligned.append(p.name)
