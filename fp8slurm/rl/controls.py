"""Experiments that must fail: they show that the figures of a run measure what they say."""

from __future__ import annotations

import random

from fp8slurm.core.types import SampleGroup


def shuffle_rewards(groups: list[SampleGroup], seed: str) -> None:
    """Hand the rewards of all samples to random other samples; the same seed gives the same permutation."""
    samples = [s for g in groups for s in g.samples]
    rewards = [s.reward for s in samples]
    random.Random(seed).shuffle(rewards)
    for sample, reward in zip(samples, rewards):
        sample.reward = reward


def negate(advantages: list[list[float]]) -> list[list[float]]:
    """Every advantage with its sign turned."""
    return [[-a for a in group] for group in advantages]
