"""Updates of which only the bytes that changed travel (sync.delta).

    before an update   the rollout workers are asked whether what all their engines hold is what was sent last
    source             fills a bucket, compares it with what it sent last, encodes what changed (engine/inside/delta.py)
                       delta/N/SOURCE/B = what comes: how many bytes changed, or the whole bucket     (the job's store)
    through the host   the rollout worker changes its copy of the last update; an engine gets the changes, or, where it
                       has been restarted meanwhile, the bucket as it is now
    straight           the engines take part in the broadcast of the changes

A bucket travels whole where there is nothing to compare it with, where an engine has not got what was sent last, and
where more changed than pays.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.engine.inside import delta
from fp8slurm.sync.bucket import Delta, WeightBucket, WeightSpec, payload_bytes
from fp8slurm.sync.plan import FP8, SCALE

MOST = 1 / 4
"""Of a bucket's bytes, as changes: more than that, and it goes whole. That many cost a CPU's core some 4 ns a byte of
the bucket to find, encode and apply, as much as sending it takes at 2 Gbit/s."""
POLL_S = 0.001
KINDS = ("codes", "scales", "other")


class LastSent:
    """What a rank sent last: of every bucket that it is the source of the payload, on its device."""

    def __init__(self, store: Any) -> None:
        """store: the job's."""
        self.store = store
        self.number: int | None = None
        """The update that all engines have; None where they may have another."""
        self.seconds = 0.0
        """Of the last update: comparing, encoding and keeping."""
        self._kept: dict[tuple[str, int], torch.Tensor] = {}
        self._base: int | None = None
        self._published: list[str] = []
        self._turns: dict[str, int] = {}

    def begin(self, there: bool) -> None:
        """An update begins; there: whether all engines have update `number`."""
        self._base = self.number if there else None
        self.number, self.seconds, self._turns = None, 0.0, {}

    def changes(self, number: int, source: str, bucket: WeightBucket) -> WeightBucket:
        """The source's next bucket of update `number`, with what is to be sent in its place, if anything is; and say so
        to the rollout workers."""
        start = time.perf_counter()
        turn = self._turns[source] = self._turns.get(source, -1) + 1
        kept, payload = self._kept.get((source, turn)), bucket.payload
        told: dict[str, Any] = {"base": None, "sent": payload.numel(), "elements": None}
        if kept is None or kept.shape != payload.shape:
            kept = self._kept[source, turn] = torch.empty_like(payload)
        elif self._base is not None:
            at = delta.positions(kept, payload, int(MOST * payload.numel()) // 3)
            if at is None:
                told["elements"] = _compare(bucket.specs, kept, payload)
            else:
                encoded = delta.encode(at, payload)
                change = Delta(self._base, at.numel(), delta.checksum(encoded), encoded)
                bucket = replace(bucket, delta=change)
                told |= {"base": change.base, "sent": encoded.numel(), "elements": elements_at(bucket.specs, at)}
                told |= {"changed": change.changed, "checksum": change.checksum}
        kept.copy_(payload)
        self._published.append(_key(number, source, turn))
        self.store.set(self._published[-1], json.dumps(told))
        self.seconds += time.perf_counter() - start
        return bucket

    def done(self, number: int, arrived: bool) -> None:
        """The rollout workers have answered update `number`; arrived: whether all engines have it."""
        for key in self._published:
            self.store.delete_key(key)
        self._published = []
        self.number = number if arrived else None


class Announced:
    """What a rollout worker is told of the buckets of one update."""

    def __init__(self, store: dist.Store, number: int) -> None:
        self.store, self.number = store, number
        self.bytes = self.sent = 0
        self.elements: Counter[str] = Counter()
        self.changed: Counter[str] | None = Counter()
        """None where a bucket had nothing to be compared with."""

    def bucket(self, source: str, turn: int, specs: tuple[WeightSpec, ...]) -> Delta | None:
        """The source's next bucket: the changes, with an empty payload of their length, or None for all of it. Waits
        for the source."""
        key = _key(self.number, source, turn)
        while not self.store.check([key]):  # a blocking get would keep this task's other threads from the store
            time.sleep(POLL_S)
        told = json.loads(self.store.get(key))
        self.bytes, self.sent = self.bytes + payload_bytes(specs), self.sent + told["sent"]
        for spec in specs:
            self.elements[_kind(spec)] += spec.nbytes // spec.dtype.itemsize
        if told["elements"] is None or self.changed is None:
            self.changed = None
        else:
            self.changed.update(told["elements"])
        if told["base"] is None:
            return None
        return Delta(told["base"], told["changed"], told["checksum"], torch.empty(told["sent"], dtype=torch.uint8))

    def figures(self) -> dict[str, float]:
        """Metrics: the bytes of all buckets, those that were sent, and the shares of codes, scales and other weights
        that changed."""
        figures = {"sync/bytes": float(self.bytes), "sync/sent_bytes": float(self.sent)}
        if self.changed is not None:
            shares = {kind: self.changed[kind] / n for kind, n in self.elements.items()}
            figures |= {f"sync/changed_{kind}": share for kind, share in shares.items()}
        return figures


def elements_at(specs: Sequence[WeightSpec], at: torch.Tensor) -> dict[str, int]:
    """How many codes, scales and other weights of a bucket lie at these bytes (int64, ascending)."""
    columns = torch.tensor([[s.offset, s.dtype.itemsize, KINDS.index(_kind(s))] for s in specs], device=at.device)
    begins, sizes, kinds = (column.contiguous() for column in columns.T)
    spec = torch.searchsorted(begins, at, right=True) - 1
    first_byte = at - (at - begins[spec]) % sizes[spec]
    new = torch.ones_like(at, dtype=torch.bool)
    new[1:] = first_byte[1:] != first_byte[:-1]
    counts = torch.bincount(kinds[spec[new]], minlength=len(KINDS)).tolist()
    return dict(zip(KINDS, counts, strict=True))


def _compare(specs: Sequence[WeightSpec], old: torch.Tensor, new: torch.Tensor) -> dict[str, int]:
    """The same where too many differ for a list of them."""
    counts = dict.fromkeys(KINDS, 0)
    for spec in specs:
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[spec.dtype.itemsize]
        a, b = (t[spec.offset : spec.offset + spec.nbytes].view(integer) for t in (old, new))
        counts[_kind(spec)] += int((a != b).sum())
    return counts


def _kind(spec: WeightSpec) -> str:
    return "codes" if spec.dtype == FP8 else "scales" if spec.name.endswith(SCALE) else "other"


def _key(number: int, source: str, turn: int) -> str:
    return f"delta/{number}/{source}/{turn}"
