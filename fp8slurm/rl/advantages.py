"""Group-relative advantages, and which samples and groups are worth training on."""

from __future__ import annotations

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.types import SampleGroup

STD_EPSILON = 1e-6


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
