"""Weights for engines on GPUs of their own: straight from the rank that has them into every engine's memory.

For every source (sync/stream.py) there is one group: the source is its rank 0, the ranks of all engines of all nodes
follow.

    rank 0   prepare         rollout workers have their engines join the groups while the sources make their end
    source   fills a bucket, one broadcast to all engine ranks           (NCCL; gloo without GPUs)
    rollout worker    tells its engines what comes next, all of them at once      (HTTP)

A broadcast whose members are not all there never ends. So whoever fails says so under direct/G/failed, and everybody
who waits in generation G of the groups looks there: sources give their groups up, rollout workers restart their
engines, which may hold half an update. Then generation G + 1 is made with all engines, and the update is sent again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.errors import InputError
from fp8slurm.engine.server import EngineError
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.delta import Announced, LastSent
from fp8slurm.sync.groups import TIMEOUT
from fp8slurm.sync.receiver import Engines, PastTheHost, Source, in_turn
from fp8slurm.sync.stream import Ask, HostCopy, Sender, WeightStream
from fp8slurm.sync.transport import Transport, engine_group

log = logging.getLogger(__name__)

POLL_S = 0.05
"""How often somebody who waits looks whether another one failed; what it waits for is noticed at once."""


class Broken(Exception):
    """A member of this generation of the groups failed."""


class GroupGeneration:
    """One generation of the groups, as everybody sees it in the job's store."""

    def __init__(self, store: dist.Store, number: int) -> None:
        self.store, self.number = store, number

    def group(self, source: str) -> str:
        """The name that the group of a source has in the engines."""
        return f"fp8slurm-{self.number}-{source}"

    def fail(self, why: str) -> None:
        """Tell everybody; the first reason is the one that counts."""
        if not self.failed():
            log.warning("weight groups, generation %d: %s", self.number, why)
            self.store.set(f"direct/{self.number}/failed", why)

    def failed(self) -> bool:
        return self.store.check([f"direct/{self.number}/failed"])

    def wait(self, future: Future) -> Any:
        """The future's result. Raises what it raises, or Broken as soon as anybody failed."""
        while not future.done():
            try:
                return future.result(timeout=POLL_S)
            except TimeoutError:
                if not future.done() and self.failed():
                    raise Broken(f"another member of the weight groups failed (generation {self.number})") from None
        return future.result()


class DirectSender(Sender):
    """A training rank's end; every rank makes one, also those that are the source of nothing."""

    def __init__(
        self, store: Any, sources: Sequence[str], engine_ranks: int, address: str, last: LastSent | None = None
    ) -> None:
        """store: the job's (sync/signed_store.py). sources: names of what this rank sends, in the order of the plan.
        engine_ranks: of all engines together. address: where gloo listens. last: with sync.delta."""
        super().__init__(last)
        self.store, self.sources, self.size, self.address = store, list(sources), 1 + engine_ranks, address
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.cuda.current_device() if self.on_gpu else None
        self.generation = GroupGeneration(store, 0)
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._pool: ThreadPoolExecutor | None = None

    def link(self, number: int) -> None:
        """Leave the groups there are, and make those of generation `number`, while the engines join."""
        self.close()
        self.generation = GroupGeneration(self.store, number)
        self._groups = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weight-groups")
        for source in self.sources:
            try:
                self._groups[source] = self.generation.wait(self._pool.submit(self._make, source))
            except Broken:
                return
            except RuntimeError as error:  # torch's, from the rendezvous
                self.generation.fail(f"the group of {source} could not be made: {error}")
                return

    def _make(self, source: str) -> dist.ProcessGroup:
        plain = self.store.plain.clone()  # the engines know no key: only addresses of peers stand there, as Megatron's
        backend = "nccl" if self.on_gpu else "gloo"
        return engine_group(plain, self.generation.group(source), self.size, backend, self.address, TIMEOUT)

    def prepare(self, ask: Ask) -> None:
        """Have all engines in the sources' groups; where one is missing (the start, a restart), all make new ones."""
        number = self.generation.number
        while not all(answer["linked"] for answer in ask("prepare", generation=number, join=False)):
            number += 1
            ask("prepare", partial(self.link, number), generation=number, join=True)
        super().prepare(ask)

    def send(self, number: int, version: int, stream: WeightStream, to_hosts: HostCopy, verify: bool) -> None:
        """A broken group does not end it: then the engines say that they lost their weights."""

        def start(source: str, bucket: WeightBucket) -> _UnderWay:
            copying = to_hosts(source, bucket) if verify else None
            change = self.changes(number, source, bucket).delta
            payload = bucket.payload if change is None else change.payload
            if self.on_gpu:
                torch.cuda.current_stream().synchronize()  # the payload is finished: another stream reads it
            sending = None
            if self._pool is not None and not self.generation.failed():
                sending = self._pool.submit(self._broadcast, source, payload)
            return _UnderWay(self, sending, copying)

        stream.send(version, start)

    def _broadcast(self, source: str, payload: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        group = self._groups[source]
        if not self.on_gpu:
            group.broadcast([payload], options).wait()
            return
        torch.cuda.set_device(self.device)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            group.broadcast([payload], options).wait()
        stream.synchronize()

    def wait(self, sending: Future) -> None:
        """Until a broadcast is done, or the groups are broken."""
        try:
            self.generation.wait(sending)
        except Broken:
            self.close()
        except RuntimeError as error:  # gloo's or NCCL's
            self.generation.fail(f"a broadcast failed: {error}")
            self.close()

    def close(self) -> None:
        """Give the groups up, with whatever is under way in them."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        if self.on_gpu:
            for group in self._groups.values():
                group.abort()
        self._groups = {}


class _UnderWay:
    """A bucket on its way; its payload may be overwritten after wait()."""

    def __init__(self, sender: DirectSender, sending: Future | None, copying: Any) -> None:
        self.sender, self.sending, self.copying = sender, sending, copying

    def wait(self) -> None:
        if self.copying is not None:
            self.copying.wait()
        if self.sending is not None and not self.sending.cancelled():
            self.sender.wait(self.sending)


@dataclass
class DirectBucket(WeightBucket):
    """A bucket that goes past the rollout worker. The payload is empty, or a copy to compare with."""

    source: str = ""


class DirectReceiver(PastTheHost):
    """A rollout worker's end: what comes, in the order in which it comes."""

    def __init__(
        self, store: Any, sources: Sequence[Source], node: int, nodes: int, engine_ranks: int, delta: bool = False
    ) -> None:
        """store: the job's (sync/signed_store.py). engine_ranks: of one engine. delta: with sync.delta."""
        super().__init__(store, sources)
        self.delta = delta
        self.store, self.node, self.nodes, self.engine_ranks = store, node, nodes, engine_ranks
        self.sources = list(dict.fromkeys(name for name, _ in self.plan))

    def prepare(self, engines: Engines, asked: dict[str, Any]) -> dict[str, Any]:
        """Asked with join False: whether the node's engines are in this generation, and nobody in it has failed. True:
        have them join it.

        An engine that died unnoticed is restarted first: in an update it would take the others with it. So are those
        that do not join. EngineError: one failed engine.max_restarts + 1 times in a row.

        Asked with base (sync.delta): whether all engines of the node have that update. InputError: they take no
        changes alone.
        """
        if "base" in asked:
            return {"has": self._have(engines.transports, asked["base"])}
        there = GroupGeneration(self.store, asked["generation"])
        if not asked["join"]:
            engines.restart_dead()
            joined = [_direct(transport).generation for transport in engines.transports]
            return {"linked": all(g is not None and g.number == there.number and not g.failed() for g in joined)}
        plain, each = self.store.plain, len(engines.transports)
        size = 1 + self.nodes * each * self.engine_ranks

        def joining(transport: Transport, number: int) -> None:
            first = 1 + (self.node * each + number) * self.engine_ranks
            try:
                _direct(transport).join(there, self.sources, plain.host, plain.port, first, size)
            except EngineError as error:
                there.fail(f"engine {number} of node {self.node} did not join: {error}")
                raise

        engines.tell(joining)
        return {}

    def _have(self, transports: Sequence[Transport], base: int) -> bool:
        if any(transport.number != base for transport in transports):
            return False
        refused = [why for transport in transports for why in transport.changes_refused()]
        if refused:
            raise InputError(f"--sync.delta: the engine cannot take changes alone: {refused[0]}; --sync.no-delta")
        return True

    def receive(self, version: int, number: int, verify: bool) -> Iterator[WeightBucket]:
        """As Receiver.receive; without verify the buckets have no payloads."""
        payloads = self.payloads(version, number, verify)
        told = Announced(self.store, number) if self.delta else None
        for name, turn, specs in in_turn(self.plan):
            payload = next(payloads)
            change = told.bucket(name, turn, specs) if told else None
            yield DirectBucket(version, specs, payload, number, change, source=name)
        next(payloads, None)
        self.figures = told.figures() if told else {}


class DirectTransport(Transport):
    """An engine's end: it is told what comes and takes part in the broadcast."""

    def __init__(self, backend: str) -> None:
        """backend: nccl where the engine has GPUs, else gloo."""
        super().__init__()
        self.backend = backend
        self.generation: GroupGeneration | None = None
        """The groups that the engine is a member of."""
        self._sources: tuple[str, ...] = ()

    def join(
        self, generation: GroupGeneration, sources: Sequence[str], address: str, port: int, first: int, size: int
    ) -> None:
        """Have the engine leave its groups and join those of `generation`, one for every source, as ranks `first` and
        following of `size`. address and port are the job store's. Raises EngineError."""
        assert self._client is not None, "open() comes first"
        client, self._sources = self._client, tuple(sources)
        if self.generation is not None:
            for source in self._sources:
                self._wait(generation, self._pool.submit(client.leave_group, self.generation.group(source)))
        self.generation = None
        for source in self._sources:
            name = generation.group(source)
            joining = self._pool.submit(client.join_group, name, port, size, self.backend, address, first)
            self._wait(generation, joining)
        self.generation = generation

    def _wait(self, generation: GroupGeneration, future: Future) -> None:
        try:
            generation.wait(future)
        except Broken as error:
            raise EngineError(str(error)) from None

    def start(self, bucket: WeightBucket) -> None:
        assert self._client is not None and self.generation is not None, "open() and join() come first"
        assert isinstance(bucket, DirectBucket), type(bucket)
        group = self.generation.group(bucket.source)
        change = bucket.delta
        assert change is None or change.base == self.number, "prepare() has asked whether this engine has the base"
        forms = self.announce(bucket.specs) if change is None else self.announce_changes(bucket.specs, change)
        self._began = time.perf_counter()
        self._loading = self._pool.submit(self._client.receive_bucket, group, forms)

    def finish(self) -> None:
        assert self.generation is not None
        self._wait(self.generation, self._loading)
        self.seconds["load"] += (
            time.perf_counter() - self._began
        )  # the broadcast and the load: the server tells no boundary

    def close(self, engine_answers: bool) -> None:
        super().close(engine_answers)
        self.generation = None

    def failed(self, why: str) -> None:
        if self.generation is not None:
            self.generation.fail(why)


def _direct(transport: Transport) -> DirectTransport:
    assert isinstance(transport, DirectTransport), type(transport)
    return transport
