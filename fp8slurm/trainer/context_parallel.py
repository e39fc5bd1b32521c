"""What a rank's model is given of a micro-batch, and its answers put together again (core/context_cut.py has the cut).

Ranks of a context-parallel group are given the same micro-batch, as those of a tensor-parallel group are. Each computes
its cut; then log-probabilities and entropies, two numbers a token, are gathered, so that every rank has the loss of
whole sequences: losses by sequence, masks and metrics know nothing of the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.context_cut import ContextCut
from fp8slurm.core.types import PackedBatch


@dataclass(frozen=True)
class ModelInput:
    """A micro-batch without context parallelism, else this rank's cut of it, on the device: N tokens."""

    tokens: torch.Tensor  # int64 [N]
    labels: torch.Tensor  # int64 [N]
    position_ids: torch.Tensor  # int64 [N]
    cu_seqlens: torch.Tensor  # int32, of the whole micro-batch, its sequences padded where it is cut
    longest: int  # of those sequences
    routing: torch.Tensor | None  # uint8 or int16 [N, layers, k]
    gathered: torch.Tensor | None = None  # ContextCut.gathered

    @staticmethod
    def of(batch: PackedBatch, group: dist.ProcessGroup, multiple: int) -> ModelInput:
        """group: the context-parallel ranks; each gets a multiple of `multiple` tokens where the batch is cut."""
        longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
        if group.size() == 1:
            return ModelInput(batch.tokens, batch.labels, batch.position_ids, batch.cu_seqlens, longest, batch.routing)
        cut = ContextCut.of(batch.cu_seqlens, group.rank(), group.size(), multiple)
        longest = int((cut.cu_seqlens[1:] - cut.cu_seqlens[:-1]).max())
        routing = None if batch.routing is None else batch.routing[cut.source]
        tokens, labels = batch.tokens[cut.source], batch.labels[cut.source]
        return ModelInput(tokens, labels, cut.position_ids, cut.cu_seqlens, longest, routing, cut.gathered)


class _AllGather(torch.autograd.Function):
    """[N] of every rank -> [size * N]. All ranks compute one loss from it, so its gradient is the rank's own part."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.own = slice(group.rank() * len(part), (group.rank() + 1) * len(part))
        whole = part.new_empty(group.size() * len(part))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[ctx.own], None


def whole(part: torch.Tensor, given: ModelInput, group: dist.ProcessGroup) -> torch.Tensor:
    """A value of each of this rank's tokens [N] -> of each token of the micro-batch [T], the same on all ranks."""
    return part if given.gathered is None else _AllGather.apply(part, group)[given.gathered]
