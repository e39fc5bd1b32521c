"""A loss of your own: PPO's surrogate for tokens that trainer and engine agree on, and nothing for the others.

make train-tiny-fp8 ARGS="--algorithm.loss examples.loss:two_sided --algorithm.tis-cap 0"
"""

import torch
from torch import Tensor

from fp8slurm.rl.objectives import LossInput

LOW, HIGH = 0.5, 2.0


def two_sided(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Masks a token whose probability under the trainer is not within LOW to HIGH times the engine's (IcePop, Ling
    Team 2025, arXiv 2510.18855); the other tokens have PPO's clipped surrogate."""
    ratio = (x.logprobs - x.old_logprobs).exp()
    low, high = 1 - x.settings.clip_low, 1 + x.settings.clip_high
    values = -torch.minimum(ratio * x.advantages, ratio.clamp(low, high) * x.advantages)
    engine_ratio = (x.old_logprobs - x.rollout_logprobs).exp()
    kept = (engine_ratio > LOW) & (engine_ratio < HIGH)
    return values * kept, {"masked": ~kept}
