"""Group-relative advantages, and which samples and groups are worth training on."""

from __future__ import annotations

from typing import Literal

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.rl.types import SampleGroup

STD_EPSILON = 1e-6


def settle_truncated(groups: list[SampleGroup], truncated: Literal["mask", "penalize", "keep"]) -> None:
    """Decide on samples that hit max_tokens (`rollout.truncated`); after scoring, before advantages.

    mask: out of the loss and out of the group's mean (DAPO's overlong filtering, arXiv 2503.14476 section 3.4, masks
    the loss). penalize: reward 0. keep: as any other. An aborted sample is never trained on.
    """
    for group in groups:
        for sample in group.samples:
            if sample.finish_reason == "abort" or (sample.finish_reason == "length" and truncated == "mask"):
                sample.train = False
            elif sample.finish_reason == "length" and truncated == "penalize":
                sample.reward = 0.0


def has_signal(group: SampleGroup) -> bool:
    """Whether the rewards of the samples that are trained on differ at all."""
    rewards = [s.reward for s in group.samples if s.train]
    return len(rewards) > 1 and max(rewards) != min(rewards)


def group_relative(rewards: list[float], divide_by_std: bool) -> list[float]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-6 if asked for.

    GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; std is the sample standard deviation (n - 1), as torch.std.
    Without the division: Dr. GRPO (arXiv 2503.20783).
    """
    if not rewards:
        return []
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if not divide_by_std or len(rewards) == 1:
        return centred
    std = (sum(c * c for c in centred) / (len(rewards) - 1)) ** 0.5
    return [c / (std + STD_EPSILON) for c in centred]


def advantages(groups: list[SampleGroup], algorithm: AlgorithmSection) -> list[list[float]]:
    """One advantage for every sample of every group; 0 for samples that are not trained on, which no mean counts."""
    result = []
    for group in groups:
        trained = iter(group_relative([s.reward for s in group.samples if s.train], algorithm.divide_by_std))
        result.append([next(trained) if s.train else 0.0 for s in group.samples])
    return result
