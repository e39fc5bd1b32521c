"""How far the trainer is from the engine, in log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384)
"""Where ranges of positions in a response begin, each of which has a gap of its own."""


def gap_metrics(trainer: Tensor, rollout: Tensor) -> dict[str, float]:
    """How far the trainer's log-probabilities of the sampled tokens are from the engine's; both [N], same tokens.

    With d = trainer - rollout: mean |d|, its 99th percentile (nearest rank) and maximum; and two estimates of
    KL(engine || trainer), the tokens being the engine's samples: k1 = mean(-d), k3 = mean(exp(d) - d - 1). Computed in
    float64. No tokens give no metrics.
    """
    assert trainer.shape == rollout.shape and trainer.dim() == 1, (trainer.shape, rollout.shape)
    if trainer.numel() == 0:
        return {}
    d = trainer.double() - rollout.double()
    absolute = d.abs()
    rank = -(-99 * d.numel() // 100)
    return {
        "gap/mean_abs": absolute.mean().item(),
        "gap/p99": absolute.kthvalue(rank).values.item(),
        "gap/max": absolute.max().item(),
        "gap/k1": -d.mean().item(),
        "gap/k3": (d.exp() - d - 1).mean().item(),
    }


def gap_sums(trainer: Tensor, rollout: Tensor, positions: Tensor) -> Tensor:
    """float64 [len(POSITIONS), 2]: the sum of |trainer - rollout| in every range of positions, and how many there are.

    trainer, rollout: log-probabilities [N] of the same tokens; positions: int64 [N], in their responses."""
    ranges = torch.bucketize(positions, torch.tensor(POSITIONS), right=True) - 1
    absolute = (trainer.double() - rollout.double()).abs()
    sums = torch.bincount(ranges, absolute, minlength=len(POSITIONS))
    return torch.stack([sums, torch.bincount(ranges, minlength=len(POSITIONS)).double()], 1)


def gap_by_position(sums: Tensor) -> dict[str, float]:
    """The mean gap of every range that has tokens, from `gap_sums`, by the position where it begins."""
    return {f"gap_position/{begin}": (s / n).item() for begin, (s, n) in zip(POSITIONS, sums) if n}
