"""Groups under way on one node: each sample is asked for by itself and scored when it ends, and a group is ready when
its samples are.

    prompt asked -> samples end, each is scored -> signal:    ready, until a step takes it
                                                -> no signal: dropped; the next prompt is asked in its place,
                                                   rollout.max_replacements times at most
    stopped      -> the tokens so far are kept; `begin` goes on from them, under the weights of that time

Everything but `Positions` runs in the loop of engine/completions.py. Deterministic runs have rounds of whole batches
instead (worker.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fp8slurm.config.schema import RolloutSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.engine.client import Generation
from fp8slurm.engine.completions import continued, joined
from fp8slurm.rollout.engines import EngineSet
from fp8slurm.rollout.groups import apply_truncation_policy, has_signal
from fp8slurm.rollout.sampler import Sampler
from fp8slurm.rollout.tally import Figure, figures_of

BLOCK = 64
"""Prompts of this worker that are looked up at a time."""


class Positions:
    """The positions in the data that a rollout worker asks: those that are open (asked before and not taken), then from
    the cursor on. Worker W of n has those with position % n == W, so that workers need not agree on anything."""

    def __init__(self, order: Any, cursor: int, open_: Iterable[int], number: int, workers: int) -> None:
        self.order, self.number, self.workers = order, number, workers
        self.cursor = cursor
        """Behind the last one that was asked; own positions from here on were not."""
        self.open = sorted(p for p in open_ if p % workers == number)
        self._next = cursor + (number - cursor) % workers
        self._indices: dict[int, int] = {}

    def take(self) -> tuple[int, int]:
        """(the next position, which prompt that is)."""
        if self.open:
            position = self.open.pop(0)
        else:
            position, self._next = self._next, self._next + self.workers
            self.cursor = max(self.cursor, position + 1)
        if position not in self._indices:
            span = BLOCK * self.workers
            self._indices = dict(zip(range(position, position + span), self.order.take(position, span)[0]))
        return position, self._indices[position]


@dataclass(eq=False)
class Slot:
    """A place in a step: a prompt that is asked, and others in its place where its samples say nothing."""

    position: int
    prompt: Prompt
    samples: list[Sample | None]
    """Those that are finished and scored."""
    parts: list[Generation | None]
    """What there is of those that were stopped."""
    group: SampleGroup | None = None
    over: bool = False
    """The group is ready, or there is none."""
    replaced: int = 0
    dropped: int = 0
    """Groups without signal."""
    lost: list[Figure] = field(default_factory=list)
    """Of all samples of its dropped groups, as they were scored."""
    figures: list[Figure] = field(default_factory=list)
    """Of the samples of its group."""
    asked_again: bool = False
    """Samples were too old, and were asked again: it is waited for, so that no prompt starves."""

    def oldest(self, k: int) -> int | None:
        """Version of the oldest token that there is of sample k."""
        one = self.samples[k] or self.parts[k]
        return min(one.weight_versions, default=None) if one is not None else None


class Scorer:
    """Scores what ends, in another thread: all that has ended meanwhile, at once."""

    def __init__(self, rewards: Any, heartbeat: Callable[[], None]) -> None:
        self.rewards, self.heartbeat = rewards, heartbeat
        self._waiting: list[tuple[SampleGroup, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def score(self, group: SampleGroup) -> None:
        """Fill in the rewards of the samples in it. RewardError."""
        scored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, scored))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        await scored

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            error: BaseException | None = None
            try:
                await asyncio.to_thread(self.rewards.score, [group for group, _ in batch], self.heartbeat)
            except Exception as failed:
                error = failed
            for _, scored in batch:
                if not scored.done():
                    scored.set_result(None) if error is None else scored.set_exception(error)


class Flow:
    """The slots of one node, in the order in which they were asked."""

    def __init__(
        self, rollout: RolloutSection, sampler: Sampler, engines: EngineSet, scorer: Scorer, prompts: Sequence[Prompt],
        positions: Positions, keep_all: bool = False,
    ) -> None:  # fmt: skip
        """keep_all: groups without signal are ready, too."""
        self.rollout, self.sampler, self.engines, self.scorer = rollout, sampler, engines, scorer
        self.prompts, self.positions = prompts, positions
        self.keep_all = keep_all or not rollout.drop_no_signal
        self.slots: list[Slot] = []
        self._tasks: dict[Slot, asyncio.Task[None]] = {}

    # -- slots ---------------------------------------------------------------------------------------------------

    def new_slot(self) -> Slot:
        """A slot for the next position."""
        position, index = self.positions.take()
        empty = self.rollout.n_samples
        return Slot(position, self.prompts[index], [None] * empty, [None] * empty)

    async def begin(self, slots: Iterable[Slot]) -> None:
        """Have them asked, behind those that are under way."""
        for slot in slots:
            self.slots.append(slot)
            self._tasks[slot] = asyncio.create_task(self._follow(slot))

    async def enough(self, count: int) -> None:
        """Wait until `count` groups are ready and nothing is missing that has to be waited for, or nothing runs."""
        while True:
            running = [task for task in self._tasks.values() if not self._is_done(task)]
            missing = any(slot.asked_again and not slot.over for slot in self.slots)
            if not running or (sum(slot.group is not None for slot in self.slots) >= count and not missing):
                return
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def extend(self, count: int) -> None:
        """Have so many further slots asked."""
        await self.begin([self.new_slot() for _ in range(count)])

    async def first(self, count: int) -> None:
        """Wait until the first `count` slots are over."""
        while True:
            running = [task for task in self._tasks.values() if not self._is_done(task)]
            if all(slot.over for slot in self.slots[:count]):
                return
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    async def rest(self) -> None:
        """Wait for all."""
        await asyncio.gather(*self._tasks.values())

    async def cancel(self) -> None:
        """Give everything up."""
        for task in self._tasks.values():
            task.cancel()

    def remove(self, slots: Iterable[Slot]) -> None:
        """Those that a step has taken, or that there is nothing of."""
        for slot in slots:
            self.slots.remove(slot)
            self._tasks.pop(slot, None)

    def _is_done(self, task: asyncio.Task[None]) -> bool:
        if task.done():
            task.result()  # what went wrong
        return task.done()

    # -- one of them ---------------------------------------------------------------------------------------------

    async def _follow(self, slot: Slot) -> None:
        """Until it is over, or stopped."""
        while not slot.over:
            missing = [k for k, sample in enumerate(slot.samples) if sample is None]
            await asyncio.gather(*(self._sample(slot, k) for k in missing))
            samples = [sample for sample in slot.samples if sample is not None]
            if len(samples) < len(slot.samples):
                return
            await self._judge(slot, SampleGroup(slot.prompt, samples))

    async def _sample(self, slot: Slot, k: int) -> None:
        request = self.sampler.request(slot.position, slot.prompt, k)
        so_far = slot.parts[k]
        number = slot.position * self.rollout.n_samples + k
        whole = await self.engines.complete(continued(request, so_far), number)
        if so_far is not None:
            whole = joined(so_far, whole)
        if whole.finish_reason == "abort" and self.engines.completions.stopping:
            slot.parts[k] = whole if whole.token_ids else None
            return
        sample = self.sampler.sample_of(request, whole)
        if not self.scorer.rewards.takes_groups(slot.prompt.source):
            await self.scorer.score(SampleGroup(slot.prompt, [sample], first=k))
        slot.samples[k], slot.parts[k] = sample, None

    async def _judge(self, slot: Slot, group: SampleGroup) -> None:
        if self.scorer.rewards.takes_groups(slot.prompt.source):
            await self.scorer.score(group)
        figures = figures_of([group])
        apply_truncation_policy([group], self.rollout.truncated)
        if self.keep_all or has_signal(group):
            slot.group, slot.figures, slot.over = group, figures, True
            return
        slot.dropped, slot.lost = slot.dropped + 1, slot.lost + figures
        if slot.replaced == self.rollout.max_replacements:
            slot.over = True
            return
        slot.replaced += 1
        fresh = self.new_slot()
        slot.position, slot.prompt, slot.samples, slot.parts = fresh.position, fresh.prompt, fresh.samples, fresh.parts


def ask_again(slots: Iterable[Slot], oldest: int) -> tuple[int, int]:
    """Forget samples with tokens of versions before `oldest`: their groups are asked again. (samples, tokens)."""
    samples = tokens = 0
    for slot in slots:
        for k in range(len(slot.samples)):
            version = slot.oldest(k)
            if version is not None and version < oldest:
                one = slot.samples[k] or slot.parts[k]
                assert one is not None
                samples, tokens = samples + 1, tokens + len(one.weight_versions)
                slot.samples[k] = slot.parts[k] = None
                slot.group, slot.over, slot.asked_again = None, False, True
    return samples, tokens


def mask_older(groups: Iterable[SampleGroup], version: int) -> None:
    """Leave tokens that other weights than those of `version` generated out of the loss."""
    for sample in (s for g in groups for s in g.samples):
        if any(v != version for v in sample.weight_versions):
            mask = sample.loss_mask or [True] * len(sample.response_ids)
            sample.loss_mask = [m and v == version for m, v in zip(mask, sample.weight_versions, strict=True)]
