"""Figures of all samples of a step: rollout workers sum, and the ranks have the means (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fp8slurm.core.types import Sample, SampleGroup

Figure = tuple[str, float]
"""(key of a metric, its value for one sample)."""
REWARD, LENGTH, TRUNCATED = "reward/mean", "rollout/response_length", "rollout/truncated"
SHORT = {REWARD: "reward", LENGTH: "response_length", TRUNCATED: "truncated"}
"""Behind source/NAME/, of samples of one data source."""


def figures_of(groups: list[SampleGroup]) -> list[Figure]:
    """What counts of each sample, or of each conversation: before its group is dropped and before rollout.truncated
    takes its reward."""
    out: list[Figure] = []
    for group in groups:
        for branches in ([group.samples[i] for i in numbers] for numbers in group.rollouts):
            s, turns = branches[-1], [turn for branch in branches for turn in branch.turns]
            said = generated_tokens(branches)
            of_sample = {REWARD: s.reward, LENGTH: said, TRUNCATED: int(s.finish_reason == "length")}
            out += of_sample.items()
            if s.rollout is not None:
                given = sum(len(branch.response_ids) for branch in branches) - said
                out += [("rollout/turns", len(turns)), ("rollout/given_tokens", given)]
                out += [("rollout/branches", len(branches)), ("rollout/failed", int(s.finish_reason == "error"))]
            if group.prompt.source:
                out += ((f"source/{group.prompt.source}/{SHORT[key]}", value) for key, value in of_sample.items())
            out += ((f"reward/parts/{name}", part) for name, part in s.parts.items())
    return out


def generated_tokens(branches: list[Sample]) -> int:
    """Tokens of a response, or of all turns of a conversation."""
    return sum(end - start for branch in branches for start, end in branch.turns)


class Tally:
    """Sums and counts by key, in the order in which samples come: a deterministic run adds the same floats."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {key: [0, 0] for key in (REWARD, LENGTH, TRUNCATED)}
        """[sum, samples] of each key."""
        self.lengths: list[int] = []
        """Of all responses."""

    def add(self, figures: Iterable[Figure]) -> None:
        for key, value in figures:
            entry = self.sums.setdefault(key, [0, 0])
            entry[0] += value
            entry[1] += 1
            if key == LENGTH:
                self.lengths.append(int(value))


def percentiles(lengths: list[int]) -> dict[str, float]:
    """The lengths that 50, 90 and 99% of all responses do not exceed (nearest rank); nothing of none."""
    ordered = sorted(lengths)
    ranks = {p: -(-p * len(ordered) // 100) for p in (50, 90, 99)}
    return {f"{LENGTH}_p{p}": float(ordered[rank - 1]) for p, rank in ranks.items() if ordered}


def means(answers: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The mean of each key over the tallies of all rollout workers, and rollout/tokens, the sum of all lengths."""
    total: dict[str, list[float]] = {}
    for sums in answers:
        for key, (value, count) in sums.items():
            entry = total.setdefault(key, [0, 0])
            entry[0] += value
            entry[1] += count
    return {key: value / max(1, count) for key, (value, count) in total.items()} | {"rollout/tokens": total[LENGTH][0]}
