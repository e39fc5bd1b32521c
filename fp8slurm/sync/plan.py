"""What is sent how: decided once, from the name table, the parallel layout and the engine's quantization alone.

Every source sends one list of buckets: `stageS` the tensors of pipeline stage S, `stageS.expertsE` those experts of the
stage that expert-parallel rank E holds (mixture-of-experts models only). The source is the first rank that holds them,
so experts are quantized where they lie and never pass through another rank. For every tensor one of four methods is
used:

    local        the source has the whole tensor; it is copied, or quantized into the bucket
    shard-fp8    every tensor-parallel rank quantizes its slice; codes and scales are gathered (half the bytes of BF16)
    gather       not quantized: the slices are gathered in the engine's dtype
    gather-quantize   the cut falls inside a block: gathered in the trainer's dtype, then quantized
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import scale_shape
from fp8slurm.fp8.policy import decide
from fp8slurm.models.entries import Entry, SliceSpec
from fp8slurm.models.kv_scales import is_scale
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import QuantizationSpec
from fp8slurm.sync.bucket import TensorForm, WeightSpec, layout

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Planned:
    """One HF tensor of a source."""

    entry: Entry
    part: int
    """Which of the entry's HF tensors."""
    name: str
    shape: tuple[int, ...]
    quantized: bool
    method: str
    reason: str
    slices: tuple[SliceSpec, ...]
    """One for every rank that the tensor is cut over; a single one where it is not cut."""

    def forms(self, dtype: torch.dtype) -> list[TensorForm]:
        """What goes into the bucket for it; `dtype` is the engine's for what is not quantized."""
        if is_scale(self.name):
            return [(self.name, torch.float32, self.shape)]
        if not self.quantized:
            return [(self.name, dtype, self.shape)]
        return [(self.name, FP8, self.shape), (self.name + SCALE, torch.float32, scale_shape(self.shape))]

    def piece_forms(self, dtype: torch.dtype, trainer_dtype: torch.dtype) -> list[TensorForm]:
        """What each rank hands to the source for it: nothing unless it is cut."""
        if self.method == "local":
            return []
        shape = self.slices[0].shape
        if self.method == "shard-fp8":
            return [(self.name, FP8, shape), (self.name + SCALE, torch.float32, scale_shape(shape))]
        return [(self.name, dtype if self.method == "gather" else trainer_dtype, shape)]


def plan(
    table: NameTable,
    names: Iterable[str],
    tensor_parallel_size: int,
    quantization: QuantizationSpec | None,
    expert_tensor_parallel_size: int = 1,
) -> list[Planned]:
    """How each HF tensor made of the Megatron parameters `names` (global, of one stage) is sent, in model order."""
    held = set(names)
    out = []
    for entry in table:
        if entry.name not in held:
            continue
        world = tensor_parallel_size if entry.expert is None else expert_tensor_parallel_size
        world = world if entry.tp_dim is not None else 1
        by_rank = [entry.slices(r, world) for r in range(world)]
        for part, tensor in enumerate(entry.tensors):
            slices = tuple(ranks[part] for ranks in by_rank)
            fp8, why = False, "the engine's checkpoint is not quantized"
            if quantization is not None:
                decision = decide(tensor.name, tensor.shape, quantization.modules_to_not_convert)
                fp8, why = decision.quantize, decision.reason
            if world == 1:
                method, reason = "local", f"{why}; not cut"
            elif not fp8:
                method, reason = "gather", why
            elif all(s.on_block_boundary() for s in slices):
                method, reason = "shard-fp8", f"{why}; every cut is a block boundary"
            else:
                method, reason = "gather-quantize", f"{why}; a cut at {slices[0].length} is inside a {BLOCK} block"
            out.append(Planned(entry, part, tensor.name, tensor.shape, fp8, method, reason, slices))
    return out


def source_names(stages: int, expert_ranks: int = 0) -> list[str]:
    """All sources of a run, in the order in which a rollout worker takes their buckets; expert_ranks: 0 if dense."""
    out = []
    for stage in range(stages):
        out.append(f"stage{stage}")
        out += [f"stage{stage}.experts{e}" for e in range(expert_ranks)]
    return out


def stage_names(table: NameTable, stages: int) -> list[list[str]]:
    """Megatron names that each pipeline stage sends (a tied output layer is the embedding, and not sent again)."""
    return [[e.name for e in table if table.stage(e, stages) == stage] for stage in range(stages)]


@dataclass(frozen=True)
class SourcePlan:
    """One source's tensors and buckets."""

    name: str
    planned: tuple[Planned, ...]
    buckets: tuple[tuple[WeightSpec, ...], ...]

    @classmethod
    def of(cls, name: str, planned: Sequence[Planned], dtype: torch.dtype, bucket_bytes: int) -> SourcePlan:
        """Deal the tensors into buckets of at most bucket_bytes."""
        return cls(name, tuple(planned), tuple(layout([p.forms(dtype) for p in planned], bucket_bytes)))

    def items(self, bucket: int) -> list[Planned]:
        """The tensors of one bucket, in model order."""
        names = {s.name for s in self.buckets[bucket]}
        return [p for p in self.planned if p.name in names]

    def pieces(self, bucket: int, dtype: torch.dtype, trainer_dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        """What each rank hands over for one bucket, as one flat payload; () where nothing in it is cut."""
        forms = [f for p in self.items(bucket) for f in p.piece_forms(dtype, trainer_dtype)]
        return layout([forms], 2**62)[0] if forms else ()


def source_plans(
    table: NameTable,
    names: Iterable[str],
    stage: str,
    quantization: QuantizationSpec | None,
    dtype: torch.dtype,
    bucket_bytes: int,
    tensor_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    expert_rank: int = 0,
) -> tuple[SourcePlan, SourcePlan | None]:
    """(everything but experts, the experts or None) among `names`, the parameters that one rank holds."""
    planned = plan(table, names, tensor_parallel_size, quantization, expert_tensor_parallel_size)
    dense = [p for p in planned if p.entry.expert is None]
    experts = [p for p in planned if p.entry.expert is not None]
    return (
        SourcePlan.of(stage, dense, dtype, bucket_bytes),
        SourcePlan.of(f"{stage}.experts{expert_rank}", experts, dtype, bucket_bytes) if experts else None,
    )
