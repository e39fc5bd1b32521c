"""Where training prompts come from: one file, or several sources that are mixed by weight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from fp8slurm.config.schema import DataSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import Prompt
from fp8slurm.data import reasoning_gym
from fp8slurm.data.endless import EndlessPrompts, InOrder
from fp8slurm.data.prompts import PromptOrder, load_prompts

LOOKED_AT = 1000
"""Prompts of a source without end that are made before a job is queued."""
LONGEST_CYCLE = 10_000
"""Prompts after which the pattern of sources begins anew, at most."""


@dataclass(frozen=True)
class Source:
    """One file of training prompts, and how it is read and scored."""

    name: str
    """"" where there is only data.train."""
    flag: str
    """Where the file is named."""
    path: Path
    data: DataSection
    """With the keys of this source."""
    reward: str
    """Kind of its reward."""
    weight: Fraction

    def load(
        self, tokenizer: Any, label_error: Callable[[str, str], str | None], limit: int | None = None
    ) -> Sequence[Prompt]:
        """Its prompts, as load_prompts; label_error is asked with the kind of reward and the label."""
        if self.path.suffix == reasoning_gym.SUFFIX and self.path.is_file():
            task = reasoning_gym.read_task(self.path)
            if task.size is None:
                endless = EndlessPrompts(task, self.data, tokenizer, self.name)
                return endless if limit is None else endless[: min(limit, LOOKED_AT)]
        found = load_prompts(self.data, tokenizer, self.path, limit, partial(label_error, self.reward))
        return [replace(p, source=self.name) for p in found] if self.name else found


def training_sources(data: DataSection, reward: str) -> list[Source]:
    """data.train as the only source, or those of data.sources; none where neither is set. InputError: both are.

    reward: reward.kind, of sources that name none.
    """
    if data.train is not None and data.sources:
        raise InputError(
            f"--data.train {data.train} and data.sources ({', '.join(data.sources)}): a source has a name, or is the "
            f"only one; allowed: one of the two, with --data.train None the sources"
        )
    if data.train is not None:
        return [Source("", "--data.train", data.train, data, reward, Fraction(1))]
    out = []
    for name, s in data.sources.items():
        keys = {"prompt_key": s.prompt_key or data.prompt_key}
        keys["label_key"] = data.label_key if s.label_key is None else s.label_key
        own = data.model_copy(update=keys)
        weight = Fraction(str(s.weight))
        out.append(Source(name, f"--data.sources {name}.file", s.file, own, s.reward or reward, weight))
    return out


class MixedOrder:
    """The endless order in which prompts of several sources are taken: a function of the cursor alone.

    The source at every position follows from the weights, spread evenly (smooth weighted round-robin), and repeats
    after a cycle in which each source has as many positions as its weight says, exactly. Within a source the order is
    PromptOrder's, at the number of prompts that were taken of it.
    """

    def __init__(
        self, sizes: list[int], weights: list[Fraction], seed: int, shuffle: bool = True, endless: Sequence[int] = ()
    ) -> None:
        """sizes: prompts of each source; endless: numbers of those that have no end. InputError: weights whose cycle is
        too long."""
        self.orders: list[PromptOrder | InOrder] = [
            InOrder() if source in endless else PromptOrder(n, seed, shuffle, source) for source, n in enumerate(sizes)
        ]
        self.first = [sum(sizes[:i]) for i in range(len(sizes))]
        self.cycle = cycle_of(weights)
        self.per_cycle = Counter(self.cycle)

    def take(self, cursor: int, k: int) -> tuple[list[int], int]:
        """(k positions among the prompts of all sources, one source after the other, from `cursor` on; next cursor)."""
        rounds, start = divmod(cursor, len(self.cycle))
        begun = Counter(self.cycle[:start])
        sources = [self.cycle[(start + i) % len(self.cycle)] for i in range(k)]
        taken = {
            s: iter(self.orders[s].take(rounds * self.per_cycle[s] + begun[s], n)[0])
            for s, n in Counter(sources).items()
        }
        return [self.first[s] + next(taken[s]) for s in sources], cursor + k


def order_of(prompts: Sequence[Sequence[Prompt]], sources: list[Source], seed: int, shuffle: bool) -> Any:
    """PromptOrder of the only source (InOrder where it has no end), MixedOrder of several; prompts: of each source."""
    sizes = [len(p) for p in prompts]
    endless = [n for n, p in enumerate(prompts) if isinstance(p, EndlessPrompts)]
    if len(sources) == 1:
        return InOrder() if endless else PromptOrder(sizes[0], seed, shuffle)
    return MixedOrder(sizes, [s.weight for s in sources], seed, shuffle, endless)


def cycle_of(weights: list[Fraction]) -> list[int]:
    """The shortest pattern of sources with these shares. InputError: it is longer than LONGEST_CYCLE."""
    scale = math.lcm(*(w.denominator for w in weights))
    whole = [int(w * scale) for w in weights]
    shares = [n // math.gcd(*whole) for n in whole]
    if sum(shares) > LONGEST_CYCLE:
        raise InputError(
            f"data.sources: weights {', '.join(f'{float(w):g}' for w in weights)} are the shares "
            f"{', '.join(map(str, shares))}, a pattern of {sum(shares)} prompts; allowed: {LONGEST_CYCLE} at most, "
            f"such as weights 3 and 1"
        )
    owed, pattern = [0] * len(shares), []
    for _ in range(sum(shares)):
        owed = [o + n for o, n in zip(owed, shares)]
        source = owed.index(max(owed))
        owed[source] -= sum(shares)
        pattern.append(source)
    return pattern
