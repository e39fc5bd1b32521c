"""Which samples of a group are trained on, and whether the group has anything to say."""

from __future__ import annotations

from typing import Literal

from fp8slurm.core.types import SampleGroup


def has_signal(group: SampleGroup) -> bool:
    """Whether the rewards of the samples that are trained on differ at all."""
    rewards = [s.reward for s in group.samples if s.train]
    return len(rewards) > 1 and max(rewards) != min(rewards)


def apply_truncation_policy(groups: list[SampleGroup], truncated: Literal["mask", "penalize", "keep"]) -> None:
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
