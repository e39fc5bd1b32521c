"""A rollout worker's end of an update: what every path's has, and the one of the broadcasts from the sources."""

from __future__ import annotations

import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fp8slurm.engine.inside import delta
from fp8slurm.sync.bucket import WeightBucket, WeightSpec, payload_bytes
from fp8slurm.sync.delta import Announced
from fp8slurm.sync.groups import Group
from fp8slurm.sync.transport import Transport

Buckets = Sequence[tuple[str, tuple[WeightSpec, ...]]]
Source = tuple[str, Group, Sequence[tuple[WeightSpec, ...]]]
"""Name, the group whose rank 0 is the source, and its buckets."""


def in_turn(plan: Buckets) -> list[tuple[str, int, tuple[WeightSpec, ...]]]:
    """(source, number of the bucket among the source's, its tensors) for all buckets of an update, in order."""
    turns: Counter[str] = Counter()
    out = []
    for source, specs in plan:
        out.append((source, turns[source], specs))
        turns[source] += 1
    return out


class CorruptUpdate(RuntimeError):
    """A bucket did not arrive as it was sent."""


def checksum(payload: torch.Tensor) -> int:
    """CRC-32 of a payload (uint8 [n], any device)."""
    return zlib.crc32(payload.cpu().numpy().data)


def publish_checksums(store: dist.Store, number: int, source: str, checksums: list[int]) -> None:
    """Tell the rollout workers what the buckets of update `number` were when `source` sent them."""
    store.set(f"sync/checksums/{number}/{source}", json.dumps(checksums))


def forget_checksums(store: dist.Store, number: int, source: str) -> None:
    """Delete what publish_checksums told."""
    store.delete_key(f"sync/checksums/{number}/{source}")


class Engines(Protocol):
    """The engines of a node, as far as a path may have to do with them before an update."""

    @property
    def transports(self) -> Sequence[Transport]:
        """How each of them is told."""

    def restart_dead(self) -> None:
        """Restart those whose process has ended."""

    def tell(self, call: Callable[[Transport, int], None]) -> None:
        """call(transport, number of the engine) for all at once; those for which it raises EngineError are restarted.
        EngineError: one failed too often."""


class Receiver(ABC):
    """A rollout worker's end of one path."""

    held: Sequence[WeightBucket] = ()
    """The last update where it is kept and has wholly arrived, else nothing."""
    figures: dict[str, float] = {}
    """Of the last update, with sync.delta: Announced.figures."""

    def prepare(self, engines: Engines, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to what the path's sender asks before an update (Sender.prepare); most ask nothing."""
        raise AssertionError(f"{type(self).__name__}: no sender asks {asked}")

    @abstractmethod
    def receive(self, version: int, number: int, verify: bool) -> Iterator[WeightBucket]:
        """The buckets of update `number`, which gets `version`. Each is good until the next but one is asked for; with
        verify all of them last, and at the end they are compared with what the sources say they sent
        (CorruptUpdate)."""


class HostReceiver(Receiver):
    """Takes updates through this process; while a bucket is worked on, the next one arrives."""

    def __init__(self, store: dist.Store, sources: Sequence[Source], keep: bool, delta: bool = False) -> None:
        """keep: hold the last update in host memory (the bytes of all buckets together) instead of three buckets.
        delta: with sync.delta; changes are made to the update that is held."""
        assert keep or not delta, "there is nothing to make changes to"
        self.store, self.sources, self.keep, self.delta = store, sources, keep, delta
        sizes = [payload_bytes(specs) for _, _, plan in sources for specs in plan]
        self._payloads = self._allocate(sizes) if keep else []
        self._turns: list[torch.Tensor] = []
        self._sizes = sizes

    @staticmethod
    def _allocate(sizes: Sequence[int]) -> list[torch.Tensor]:
        return [torch.empty(n, dtype=torch.uint8) for n in sizes]

    def prepare(self, engines: Engines, asked: dict[str, Any]) -> dict[str, Any]:
        """Asked with base (sync.delta): whether that is the update that is held. Engines that have another one get
        whole buckets from here."""
        return {"has": bool(self.held) and self.held[0].number == asked["base"]}

    def receive(self, version: int, number: int, verify: bool) -> Iterator[WeightBucket]:
        """As Receiver.receive."""
        self.held = []
        if self.keep:
            payloads = self._payloads
        elif verify:
            payloads = self._allocate(self._sizes)
        else:
            self._turns = self._turns or self._allocate([max(self._sizes)] * 3)
            payloads = [self._turns[i % 3][:n] for i, n in enumerate(self._sizes)]
        order = [(group, specs) for _, group, plan in self.sources for specs in plan]
        buckets = [WeightBucket(version, specs, payload, number) for (_, specs), payload in zip(order, payloads)]
        if self.delta:
            yield from self._with_changes(buckets, Announced(self.store, number))
        else:
            arriving = order[0][0].start_broadcast(payloads[0], 0)
            for i, bucket in enumerate(buckets):
                arriving.wait()
                if i + 1 < len(buckets):
                    arriving = order[i + 1][0].start_broadcast(payloads[i + 1], 0)
                yield bucket
        if verify:
            self._compare(number, buckets)
        if self.keep:
            self.held = buckets

    def _with_changes(self, buckets: list[WeightBucket], told: Announced) -> Iterator[WeightBucket]:
        """The buckets, whose payloads hold the update before, as they arrive: whole or changed in place."""
        groups = {name: group for name, group, _ in self.sources}
        order = in_turn([(name, specs) for name, _, plan in self.sources for specs in plan])

        def take(bucket: WeightBucket, source: str, turn: int) -> WeightBucket:
            change = told.bucket(source, turn, bucket.specs)
            groups[source].broadcast(bucket.payload if change is None else change.payload, 0)
            if change is None:
                return bucket
            if delta.checksum(change.payload) != change.checksum:
                raise CorruptUpdate(f"the changes to bucket {turn} of {source} are not what was sent (checksum)")
            delta.apply(change.payload, change.changed, bucket.payload)
            return replace(bucket, delta=change)

        with ThreadPoolExecutor(1, thread_name_prefix="changes") as pool:
            arriving: deque[Future[WeightBucket]] = deque()
            for bucket, (source, turn, _) in zip(buckets, order, strict=True):
                arriving.append(pool.submit(take, bucket, source, turn))
                if len(arriving) > 1:
                    yield arriving.popleft().result()
            yield arriving.popleft().result()
        self.figures = told.figures()

    def _compare(self, number: int, buckets: list[WeightBucket]) -> None:
        rest = iter(buckets)
        for name, _, plan in self.sources:
            sent = json.loads(self.store.get(f"sync/checksums/{number}/{name}"))
            for i, (crc, bucket) in enumerate(zip(sent, (next(rest) for _ in plan), strict=True)):
                if checksum(bucket.payload) != crc:
                    raise CorruptUpdate(
                        f"bucket {i} of {name} ({bucket.specs[0].name} and {len(bucket.specs) - 1} more) is not what "
                        f"was sent: its CRC-32 is {checksum(bucket.payload):08x}, {crc:08x} when it left the trainer"
                    )


class PastTheHost(Receiver):
    """An end that weights do not pass through, but for copies to compare with: it holds no update."""

    def __init__(self, store: dist.Store, sources: Sequence[Source]) -> None:
        self.plan = [(name, specs) for name, _, plan in sources for specs in plan]
        self._host = HostReceiver(store, sources, keep=False)

    def payloads(self, version: int, number: int, verify: bool) -> Iterator[torch.Tensor]:
        """For each bucket in turn an empty payload, or with verify a copy, which lasts; taken once more, compares."""
        if verify:
            yield from (bucket.payload for bucket in self._host.receive(version, number, True))
        while not verify:
            yield torch.empty(0, dtype=torch.uint8)
