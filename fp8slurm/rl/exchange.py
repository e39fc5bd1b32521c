"""A training rank's end of rollout/dealing.py: it gets the tokens of its own samples, and of no others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from fp8slurm.core.types import SampleGroup
from fp8slurm.rl.packing import Deal
from fp8slurm.rl.recompute import ranks_values
from fp8slurm.rl.weights import EngineWeights
from fp8slurm.rollout.dealing import fill_in


class SampleExchange:
    """All ranks make the same calls in the same order."""

    def __init__(self, weights: EngineWeights, trainer: Any) -> None:
        self.weights, self.trainer = weights, trainer
        self._trainers: list[list[int]] = []
        """The ranks of each data-parallel rank: those that cut one model all need its samples."""

    def fetch(
        self, groups: list[SampleGroup], deals: Sequence[Deal], also: Sequence[int] = (), texts: bool = False
    ) -> dict[str, float]:
        """Replace the descriptions of this rank's samples by the samples; metrics: bytes by who gets them. On rank 0
        `also` those of these numbers. texts: with the responses' text."""
        if all(s.here for g in groups for s in g.samples):
            return {}
        size = self.trainer.data_parallel_size
        if not self._trainers:
            owners = ranks_values(self.trainer.data_parallel_rank)
            self._trainers = [[rank for rank, owner in enumerate(owners) if owner == d] for d in range(size)]
        wanted = [sorted(n for deal in deals for batch in deal.batches[d] for n in batch) for d in range(size)]
        to = [*self._trainers]
        if also:
            (of_first,) = (d for d in range(size) if 0 in to[d])
            wanted.append(sorted(set(also) - set(wanted[of_first])))
            to.append([0])
        channel = self.weights.channel
        by_worker = [0] * channel.workers
        for group in groups:
            by_worker[group.worker] += len(group.samples)
        first = [0, *accumulate(by_worker)][:-1]
        answers = [a for a, _ in channel.call("deal", wanted=wanted, first=first, to=to, texts=texts)]
        got = iter(channel.receive(answers, to))
        for numbers, ranks in zip(wanted, to, strict=True):
            if self.trainer.rank in ranks:
                fill_in(groups, numbers, next(got))
        sizes = [sum(answer["parts"][d] for answer in answers) for d in range(size)]
        return {"data/rank_bytes": float(max(sizes)), "data/all_bytes": float(sum(sizes))}
