"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, steps: int, lr: float, min_lr: float = 0.0, warmup_steps: int = 0,
    schedule: Literal["constant", "cosine", "linear"] = "constant",
) -> float:  # fmt: skip
    """Learning rate of update `step` (from 0) out of `steps`.

    Linear warm-up: update i of the first `warmup_steps` gets lr * (i + 1) / (warmup_steps + 1), so the first is above 0
    and the one after them gets lr. Then lr, or a cosine or straight line down to min_lr at the last update.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, steps - 1 - warmup_steps))
    weight = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_lr + (lr - min_lr) * weight
