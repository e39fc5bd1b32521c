"""How far the trainer is from the engine, in log-probabilities."""

from __future__ import annotations

from torch import Tensor


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
