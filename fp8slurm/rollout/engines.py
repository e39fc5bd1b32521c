"""The engines of a node, as its rollout worker sees them: generate over all, load an update into all."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import write_atomic
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.completions import Completions
from fp8slurm.engine.pool import EnginePool, Member, WeightsLost, engine_errors, shares
from fp8slurm.engine.server import Engine, EngineError, EngineSettings, visible_gpus
from fp8slurm.engine.settings import engine_settings
from fp8slurm.sync import paths
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.engine_link import EngineLink, Expected
from fp8slurm.sync.fan_out import FanOut
from fp8slurm.sync.transport import Transport

log = logging.getLogger(__name__)

SILENT_SHARE = 0.5
"""An engine that has work and computes nothing for this share of watchdog.timeout_s is restarted: before the watchdog
ends the job."""


class RunEngine(Member):
    """An engine of a run, with the link that its weights come through."""

    link: EngineLink


class EngineSet(EnginePool[RunEngine]):
    """All engines of one node. start, connect, then update and generate, from one thread; stop from any;
    complete from coroutines (completions.py).

    An engine that fails is restarted and gets `held` (the last whole update) before it gets a request again, while
    the others go on. Where nothing is held it stays out until the next update; WeightsLost where all of them are out.
    """

    def __init__(
        self, config: RunConfig, model_dir: Path, attempt_dir: Path, node: int, gpus: Sequence[tuple[int, ...]],
        at_work: Callable[[], AbstractContextManager], on_progress: Callable[[], None],
    ) -> None:  # fmt: skip
        """gpus: for each engine of the node, indices into the node's GPUs (empty on the CPU). at_work: entered while an
        engine restarts, which has a deadline of its own. on_progress: called while engines compute."""
        settings = settings_of_engines(config, gpus)
        names = [f"{node}" if len(gpus) == 1 else f"{node}_{i}" for i in range(len(gpus))]
        members = [
            RunEngine(Engine(model_dir, attempt_dir / "logs", s, f"engine_{name}"), f"engine {name.replace('_', '.')}")
            for s, name in zip(settings, names)
        ]
        silent_s = SILENT_SHARE * config.watchdog.timeout_s
        super().__init__(members, config.engine, config.run.deterministic, on_progress, silent_s)
        self.config, self.at_work, self._gpus = config, at_work, list(gpus)
        self.completions = Completions(self)
        self.version = -1
        self.asleep: set[RunEngine] = set()
        self.held: Callable[[], Sequence[WeightBucket]] = lambda: ()
        self._digests = {m.title: attempt_dir / f"digests_{name}.json" for m, name in zip(members, names)}

    # -- life ----------------------------------------------------------------------------------------------------

    def connect(self, held: Callable[[], Sequence[WeightBucket]]) -> None:
        """Wait until all answer, and link up with them. held: the last whole update, or nothing. EngineError."""
        self.held = held
        self.wait_ready()
        self.restart_failed(self.each(self._link_up))

    def _link_up(self, member: RunEngine) -> None:
        e, mode = self.config.engine, self.config.sync.pause_mode
        assert member.client is not None
        transport = paths.transport(self.config, self._gpus[self.members.index(member)])
        member.link = EngineLink(
            member.client, e.tensor_parallel_size, transport, mode, expert_parallel_size=e.expert_parallel_size
        )
        member.link.open()

    def restart_once(self, member: RunEngine) -> None:
        """Restart it and give it the weights that it should have; where sync.verify is on, compared byte by byte."""
        member.link.close()
        self.asleep.discard(member)
        with self.at_work():
            super().restart_once(member)
        self._link_up(member)
        if self.held():
            self._load(member, iter(self.held()), self.config.sync.verify != "off")
        elif self.version >= 0:
            member.behind = True
            log.warning("%s is back with the weights of its checkpoint: it waits for the next update", member.title)

    def sleep(self) -> None:
        """Give the engines' GPU memory back. They have no weights then: an update comes before the next request."""

        def release(member: RunEngine) -> None:
            assert member.client is not None
            member.client.release_memory()
            self.asleep.add(member)

        with self.control:
            while awake := [m for m in self.members if m not in self.asleep]:  # one restarted here comes back awake
                self.restart_failed(self.each(release, awake))

    def wake(self) -> None:
        """Take the memory again, for an update."""

        def resume(member: RunEngine) -> None:
            assert member.client is not None
            if member not in self.asleep:
                return
            try:
                member.client.resume_memory()
            except EngineError as error:
                if "out of memory" not in member.engine.log_tail():
                    raise
                raise EngineError(
                    f"no room on its GPU when it woke: lower --engine.mem-fraction, now "
                    f"{self.config.engine.mem_fraction:g}, or see memory/kept in metrics.jsonl; {error}"
                ) from error
            self.asleep.discard(member)

        with self.control:
            self.restart_failed(self.each(resume))

    def stop(self) -> None:
        """End all of them, and what waits for them."""
        super().stop()
        self.completions.close()

    # -- what a path of the weights may ask for (sync/receiver.py, Engines) --------------------------------------

    @property
    def transports(self) -> list[Transport]:
        """How each engine is told of an update."""
        return [member.link.transport for member in self.members]

    def restart_dead(self) -> None:
        """Restart engines whose process has ended."""
        with self.control:
            self.restart_failed({m: EngineError("it is gone") for m in self.members if not m.engine.alive()})

    def tell(self, call: Callable[[Transport, int], None]) -> None:
        """call(transport, number of the engine) for all at once; one where it raises EngineError is restarted."""
        with self.control:
            self.restart_failed(self.each(lambda m: call(m.link.transport, self.members.index(m))))

    # -- weights -------------------------------------------------------------------------------------------------

    def update(self, version: int, incoming: Iterator[WeightBucket], verify: bool) -> None:
        """Load one update into all engines at once, every bucket as it arrives; `incoming` is taken to its end.

        Those that fail in it are restarted from `held` afterwards. Raises WeightsLost where no engine has the weights
        then; what `incoming` raises; EngineError: one failed engine.max_restarts + 1 times in a row.
        """
        with self.control:
            self.version = version
            fan, expected = FanOut(len(self.members)), Expected()
            if self.config.sync.pause_mode == "abort":
                self.completions.interrupted()
            with ThreadPoolExecutor(len(self.members)) as pool:
                loading = {
                    m: pool.submit(self._load_shared, m, fan, number, verify, expected)
                    for number, m in enumerate(self.members)
                }
                fan.produce(incoming)
            self.restart_failed(engine_errors(loading))
        self.completions.updated()
        if all(m.behind for m in self.members):
            raise WeightsLost

    def _load_shared(self, member: RunEngine, fan: FanOut, number: int, verify: bool, expected: Expected) -> None:
        try:
            self._load(member, fan.buckets(number), verify, expected)
        finally:
            fan.leave(number)

    def _load(
        self, member: RunEngine, buckets: Iterator[WeightBucket], verify: bool, expected: Expected | None = None
    ) -> None:
        try:
            digests = member.link.update(self.version, buckets, verify=verify, expected=expected)
        except EngineError as error:
            member.link.transport.failed(f"{member.title}: {error}")
            raise
        member.behind = False
        member.moved()
        if digests is not None:
            text = json.dumps({"version": self.version, "digests": digests}, indent=1)
            write_atomic(self._digests[member.title], text)

    @property
    def update_seconds(self) -> dict[str, float]:
        """Seconds of the last update by part (EngineLink.seconds): of the slowest engine, part by part."""
        parts = [member.link.seconds for member in self.members]
        return {key: max(p.get(key, 0.0) for p in parts) for key in dict.fromkeys(k for p in parts for k in p)}

    @property
    def update_counts(self) -> dict[str, int]:
        """Of the last update: EngineLink.counts, the same for each engine that has it."""
        return max((member.link.counts for member in self.members), key=lambda c: c.get("loaded", 0))

    # -- samples -------------------------------------------------------------------------------------------------

    async def complete(self, request: GenerateRequest, number: int | None = None) -> Generation:
        """One response, from a coroutine that `completions` runs (Completions.complete)."""
        return await self.completions.complete(request, number)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Responses in the requests' order. With run.deterministic every engine gets a fixed share as one batch."""
        if self.config.run.deterministic:
            return self._generate(requests, shares(len(requests), len(self.members)))
        return self.completions.run(self._each(requests))

    async def _each(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Before any that wait for a place."""
        return await asyncio.gather(*(self.complete(request, -1) for request in requests))

    def generate_batches(self, batches: Sequence[Sequence[GenerateRequest]]) -> list[list[Generation]]:
        """Responses to each batch. With run.deterministic a batch is computed as it is, by whichever engine is free."""
        requests = [request for batch in batches for request in batch]
        ends = [sum(map(len, batches[: i + 1])) for i in range(len(batches))]
        cut = [range(end - len(batch), end) for end, batch in zip(ends, batches)]
        if self.config.run.deterministic:
            done = self._generate(requests, [list(numbers) for numbers in cut if numbers])
        else:
            done = self.generate(requests)
        return [[done[i] for i in numbers] for numbers in cut]

    def _generate(self, requests: Sequence[GenerateRequest], work: list[list[int]]) -> list[Generation]:
        done: dict[int, Generation] = {}

        def answered(numbers: list[int], generations: list[Generation]) -> None:
            done.update(zip(numbers, generations, strict=True))

        if work:
            self.ask(work, requests.__getitem__, answered)
        return [done[number] for number in range(len(requests))]


def settings_of_engines(config: RunConfig, gpus: Sequence[tuple[int, ...]]) -> list[EngineSettings]:
    """EngineSettings of each engine of a node; gpus as for EngineSet. InputError: the node has fewer GPUs than that."""
    common = engine_settings(config)
    if not any(gpus):
        return [replace(common, share=(i, len(gpus))) for i in range(len(gpus))]
    names = visible_gpus()
    needed = 1 + max(i for indices in gpus for i in indices)
    if needed > len(names):
        raise InputError(
            f"--engine.per-node {config.engine.per_node} x --engine.tensor-parallel-size "
            f"{config.engine.tensor_parallel_size}: the engines take {needed} GPUs of a node, {len(names)} are visible"
        )
    return [
        replace(common, share=(n, len(gpus)), gpus=tuple(names[i] for i in indices)) for n, indices in enumerate(gpus)
    ]
