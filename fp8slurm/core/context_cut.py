"""How context parallelism cuts a pack of sequences among its ranks: the cut of TransformerEngine and Megatron.

A sequence is padded to a multiple of twice the number of ranks and cut into that many chunks; rank r has chunks r and
2 * size - 1 - r of each. So under causal attention all ranks have the same work, whatever a sequence's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def own_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """int64 [T / size]: where in their pack a rank's tokens stand, in the order in which the rank has them.

    cu_seqlens: [S + 1], 0 ... T, every segment a multiple of 2 * size long.
    """
    starts = cu_seqlens[:-1].long()
    chunks = (cu_seqlens[1:] - cu_seqlens[:-1]).long() // (2 * size)
    own = torch.repeat_interleave(2 * chunks)  # the segment of each of the rank's tokens
    first = (2 * chunks).cumsum(0) - 2 * chunks
    at, chunk = torch.arange(len(own), device=own.device) - first[own], chunks[own]
    return starts[own] + torch.where(at < chunk, at + rank * chunk, at + (2 * size - 2 - rank) * chunk)


@dataclass(frozen=True)
class ContextCut:
    """One rank's part of a pack of T tokens that is P tokens long when its sequences are padded."""

    source: Tensor
    """int64 [P / size]: the place in the pack of each of the rank's tokens; padding repeats its sequence's last one."""
    position_ids: Tensor
    """int64 [P / size], in the token's sequence."""
    gathered: Tensor
    """int64 [T]: where a token of the pack stands in all ranks' tokens laid end to end."""
    cu_seqlens: Tensor
    """int32 of the padded sequences, 0 ... P; one more than before where the pack's end is padded."""

    @staticmethod
    def of(cu_seqlens: Tensor, rank: int, size: int, multiple: int = 1) -> ContextCut:
        """cu_seqlens [S + 1] of the pack as it is, 0 ... T; each rank gets a multiple of `multiple` tokens."""
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        padded = -(-lengths // (2 * size)) * (2 * size)
        tail = -int(padded.sum()) % math.lcm(2 * size, multiple * size)
        if tail:
            lengths, padded = torch.cat([lengths, lengths.new_zeros(1)]), torch.cat([padded, padded.new_tensor([tail])])
        ends = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        segment = torch.repeat_interleave(padded)
        position = torch.arange(len(segment), device=segment.device) - ends[:-1][segment]
        real = position < lengths[segment]
        place = (lengths.cumsum(0) - lengths)[segment] + torch.minimum(position, lengths[segment] - 1)
        ranks = torch.stack([own_positions(ends, r, size) for r in range(size)])
        order = torch.empty_like(position)
        order[ranks.flatten()] = torch.arange(len(order), device=order.device)
        return ContextCut(place[ranks[rank]], position[ranks[rank]], order[real], ends.int())
