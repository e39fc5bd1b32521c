"""The trainer's end of a weight update: shards -> HF names -> block FP8 -> buckets -> rollout workers or engines.

Everything that does not change between updates is decided once (sync/plan.py) and bound once to the memory it works on:
views of the parameters, of two payload buffers that take turns, and of the buffers that slices travel in. An update
then runs lists of ready operations: no names are matched, nothing about the tensors is exchanged, nothing is allocated.

One bucket, on the ranks that share its tensors:

    every rank      quantizes or copies its slices (the source straight into the payload, wherever they fit); a weight
                    that the trainer holds in block FP8 is copied, codes and scales
    not the source  one message to the source with all of them
    source          puts the slices of the others into place, quantizes what had to be gathered first, sends the bucket

While a bucket travels the next one is filled; before a buffer is filled again its bucket has arrived.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fp8slurm.core.errors import InputError
from fp8slurm.core.gpu_memory import mappable
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.panels import not_finite_error
from fp8slurm.fp8.quantize import quantize
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import QuantizationSpec
from fp8slurm.sync.bucket import WeightBucket, WeightSpec, payload_bytes
from fp8slurm.sync.delta import LastSent
from fp8slurm.sync.plan import SCALE, Planned, SourcePlan, plan, source_plans

__all__ = ["Cut", "Planned", "WeightStream", "parse_description", "plan"]

BUFFERS = 2
PARTS = ("quantize", "copy", "gather", "wait")
Parameter = torch.Tensor | BlockFP8
"""What a trainer holds of one parameter: a tensor, or codes and scales where the weight itself is in block FP8."""


class Pending(Protocol):
    """Something under way."""

    def wait(self) -> Any:
        """Block until it is done; raises what went wrong."""


@dataclass(frozen=True)
class Cut:
    """The ranks that share a stage's matrices, or its experts' matrices."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    takes_part: bool = True
    """False on all but one of the replicas (data-parallel ranks)."""


@dataclass
class _Write:
    """One piece of a parameter on its way into a buffer: quantized if there is a scale to be written, else copied."""

    source: torch.Tensor
    target: torch.Tensor
    scale: torch.Tensor | None = None
    name: str = ""

    def run(self, seconds: dict[str, float]) -> None:
        start = time.perf_counter()
        if self.scale is None:
            self.target.copy_(self.source)
            seconds["copy"] += time.perf_counter() - start
        else:
            weight = self.source.reshape(self.target.shape)
            quantize(weight, name=self.name, out=BlockFP8(self.target, self.scale))
            seconds["quantize"] += time.perf_counter() - start


class _Writes:
    """Operations made together, in order: on a GPU all copies in one call, then all matrices in one launch."""

    def __init__(self, writes: list[_Write]) -> None:
        self.one_by_one = writes
        self.copies: list[_Write] = []
        self.grouped: list[_Write] = []
        self._group: Any = None
        if writes and writes[0].target.is_cuda:
            from fp8slurm.fp8 import triton_quantize  # Triton exists only where CUDA does

            self.copies = [w for w in writes if w.scale is None and w.target.numel()]
            quantized = [w for w in writes if w.scale is not None and w.target.numel()]
            self.grouped = [w for w in quantized if triton_quantize.fits_group(w.source, w.target)]
            self.one_by_one = [w for w in quantized if not triton_quantize.fits_group(w.source, w.target)]
            if self.grouped:
                outs = [BlockFP8(w.target, w.scale) for w in self.grouped if w.scale is not None]
                self._group = triton_quantize.GroupedLaunch(
                    [(w.source, out) for w, out in zip(self.grouped, outs, strict=True)]
                )

    def run(self, seconds: dict[str, float]) -> None:
        """Raises TransientInputError for a weight that is not finite, by name."""
        start = time.perf_counter()
        if self.copies:
            torch._foreach_copy_([w.target for w in self.copies], [w.source for w in self.copies])
            seconds["copy"] += time.perf_counter() - start
        if self._group is not None:
            start = time.perf_counter()
            self._group.launch()
            bad = self._group.first_bad()
            if bad is not None:
                write = self.grouped[bad]
                raise not_finite_error(write.source.reshape(write.target.shape), write.name)
            seconds["quantize"] += time.perf_counter() - start
        for write in self.one_by_one:
            write.run(seconds)


@dataclass
class _Fill:
    """One bucket's operations on this rank, bound to memory."""

    payload: torch.Tensor
    outgoing: torch.Tensor | None = None
    """This rank's slices, where it is not the source."""
    incoming: list[torch.Tensor] = field(default_factory=list)
    """The slices of ranks 1, 2, ..., where it is."""
    own: list[_Write] = field(default_factory=list)
    assemble: list[_Write] = field(default_factory=list)
    first: _Writes = field(default_factory=lambda: _Writes([]))
    then: _Writes = field(default_factory=lambda: _Writes([]))
    """own and assemble, ready to run."""

    def ready(self) -> None:
        self.first, self.then = _Writes(self.own), _Writes(self.assemble)


class _Lane:
    """One source's buckets, as this rank takes part in them."""

    def __init__(self, source: SourcePlan, cut: Cut, dtype: torch.dtype) -> None:
        self.source, self.cut, self.dtype = source, cut, dtype
        self.is_source = cut.takes_part and cut.rank == 0
        self.fills: list[_Fill] = []
        self.names = {p.entry.name for p in source.planned}

    def bind(self, parameters: dict[str, Parameter]) -> None:
        """Make every view that an update needs."""
        if not self.cut.takes_part or not self.source.planned:
            return
        planned = self.source.planned
        cut_inside = next((p for p in planned if p.method == "gather-quantize"), planned[0])
        device = _data(parameters[planned[0].entry.name]).device
        trainer_dtype = _data(parameters[cut_inside.entry.name]).dtype
        pieces = [self.source.pieces(i, self.dtype, trainer_dtype) for i in range(len(self.source.buckets))]
        sizes = [payload_bytes(specs) for specs in self.source.buckets]
        piece_sizes = [payload_bytes(specs) if specs else 0 for specs in pieces]
        depth = min(BUFFERS, len(sizes))

        def buffers(n: int, size: int) -> list[torch.Tensor]:
            with mappable():
                return [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(n)]

        payloads = buffers(depth if self.is_source else 0, max(sizes))
        own = buffers(1 if self.is_source else depth, max(piece_sizes))
        others = buffers(self.cut.size - 1 if self.is_source else 0, max(piece_sizes))
        split = _Split(parameters, self.cut)
        self.fills = []
        handed = (
            0  # counts buckets with pieces: by the number of all (norms hand nothing over) a buffer came round too soon
        )
        for i, size in enumerate(piece_sizes):
            mine = own[handed % len(own)][:size]
            handed += size > 0
            if self.is_source:
                fill = _Fill(payloads[i % depth][: sizes[i]], None, [b[:size] for b in others] if size else [])
                self._bind_source(fill, i, pieces[i], mine, split, trainer_dtype)
            else:
                fill = _Fill(mine[:0], mine if size else None)
                views = dict(WeightBucket(0, pieces[i], mine).views())
                for item in self.source.items(i):
                    if item.method != "local":
                        fill.own += split.writes(item, views[item.name], views.get(item.name + SCALE))
            fill.ready()
            self.fills.append(fill)

    def _bind_source(
        self,
        fill: _Fill,
        bucket: int,
        pieces: tuple[WeightSpec, ...],
        mine: torch.Tensor,
        split: _Split,
        dtype: torch.dtype,
    ) -> None:
        whole = dict(WeightBucket(0, self.source.buckets[bucket], fill.payload).views())
        staged = dict(WeightBucket(0, pieces, mine).views()) if pieces else {}
        received = [dict(WeightBucket(0, pieces, b).views()) for b in fill.incoming]
        for item in self.source.items(bucket):
            name, data, scale = item.name, whole[item.name], whole.get(item.name + SCALE)
            if item.method == "local":
                fill.own += split.writes(item, data, scale)
                continue
            dim, length = item.slices[0].dim, item.slices[0].length
            assert dim is not None
            if item.method == "gather-quantize":  # into a matrix of its own first
                data, final = torch.empty(item.shape, dtype=dtype, device=fill.payload.device), data
            targets = [data.narrow(dim, r * length, length) for r in range(self.cut.size)]
            for part, target in zip(received, targets[1:]):
                fill.assemble.append(_Write(part[name], target))
            if item.method != "shard-fp8":
                fill.own += split.writes(item, targets[0], None)
                if item.method == "gather-quantize":
                    fill.assemble.append(_Write(data, final, scale, name))
                continue
            assert scale is not None
            blocks = -(-length // BLOCK)
            scale_targets = [scale.narrow(dim, r * blocks, blocks) for r in range(self.cut.size)]
            for part, target in zip(received, scale_targets[1:]):
                fill.assemble.append(_Write(part[name + SCALE], target))
            if targets[0].is_contiguous():
                fill.own += split.writes(item, targets[0], scale_targets[0])
            else:  # the quantizer writes whole rows
                fill.own += split.writes(item, staged[name], staged[name + SCALE])
                fill.assemble.append(_Write(staged[name], targets[0]))
                fill.assemble.append(_Write(staged[name + SCALE], scale_targets[0]))


def _data(parameter: Parameter) -> torch.Tensor:
    return parameter.data if isinstance(parameter, BlockFP8) else parameter


class _Split:
    """Cuts this rank's parameters into their HF tensors."""

    def __init__(self, parameters: dict[str, Parameter], cut: Cut) -> None:
        self.parameters, self.cut = parameters, cut

    def writes(self, item: Planned, target: torch.Tensor, scale: torch.Tensor | None) -> list[_Write]:
        """The operations that write this rank's slice of `item` into `target` (and its scales)."""
        entry, shard = item.entry, self.parameters[item.entry.name]
        if isinstance(shard, BlockFP8):
            assert scale is not None
            return _as_they_are(item, shard, target, scale)
        world = len(item.slices)
        if entry.kind != "qkv":
            piece = entry.split(shard, self.cut.rank if world > 1 else 0, world)[item.part].data
            return [_Write(piece, target, scale, item.name)]
        # q, k and v lie interleaved by query group: [groups, rows of q | rows of k | rows of v, hidden]
        groups = entry.groups // world
        rows = [t.shape[0] // entry.groups for t in entry.tensors]
        grouped = shard.reshape(groups, sum(rows), *shard.shape[1:])
        piece = grouped.narrow(1, sum(rows[: item.part]), rows[item.part])
        if scale is None:
            return (
                [_Write(piece, target.view(piece.shape), None, item.name)]
                if target.is_contiguous()
                else [_Write(piece[g], target.narrow(0, g * rows[item.part], rows[item.part])) for g in range(groups)]
            )
        if shard.is_cuda or rows[item.part] % BLOCK:  # one launch and a copy, or no way around the copy
            return [_Write(piece, target, scale, item.name)]
        n, blocks = rows[item.part], rows[item.part] // BLOCK
        return [
            _Write(piece[g], target.narrow(0, g * n, n), scale.narrow(0, g * blocks, blocks), item.name)
            for g in range(groups)
        ]


def _as_they_are(item: Planned, shard: BlockFP8, target: torch.Tensor, scale: torch.Tensor) -> list[_Write]:
    """The copies that write codes and scales of this rank's slice of `item` from a weight that is in block FP8.

    A parameter is fused along its rows: [groups, rows of the first tensor | of the second | ..., K]; gate and up are
    one group, q, k and v as many as there are key-value heads on this rank."""
    entry, world = item.entry, len(item.slices)
    groups = entry.groups // world if entry.kind == "qkv" else 1
    rows = [s.shape[0] // groups for s in entry.slices(0, world)]
    before, n = sum(rows[: item.part]), rows[item.part]

    def piece(source: torch.Tensor, into: torch.Tensor, block: int) -> _Write:
        source = source.unflatten(0, (groups, -1)).narrow(1, before // block, -(-n // block))
        return _Write(source, into.unflatten(0, (groups, -1)), None, item.name)

    return [piece(shard.data, target, 1), piece(shard.scale_inv, scale, BLOCK)]


def check_as_they_are(planned: Iterable[Planned], held: Mapping[str, Parameter]) -> None:
    """Refuse what weights in block FP8 cannot be sent as without quantizing them again; InputError names the tensor."""
    for p in planned:
        if not isinstance(held[p.entry.name], BlockFP8):
            continue
        if not p.quantized:
            raise InputError(
                f"--fp8.param-gather: the trainer holds {p.name} in FP8 only, and the engine's checkpoint does not "
                f"want it in FP8; give an FP8 --model.rollout-checkpoint (--fp8.engine fp8), or --fp8.no-param-gather"
            )
        whole = len(p.entry.tensors) == 1 or all(
            t.shape[0] // max(p.entry.groups, 1) % BLOCK == 0 for t in p.entry.tensors
        )
        if p.method == "gather-quantize" or not whole:
            raise InputError(
                f"--fp8.param-gather: the {BLOCK}x{BLOCK} blocks of the trainer's {p.entry.name} are not those of "
                f"{p.name}: a cut falls inside a block; use another tensor-parallel size, or --fp8.no-param-gather"
            )


class WeightStream:
    """One rank's part in every update. Ranks outside the first replica make one too; their part is nothing."""

    def __init__(
        self,
        table: NameTable,
        shards: Callable[[], Iterator[tuple[str, Parameter]]],
        quantization: QuantizationSpec | None,
        bucket_bytes: int,
        dtype: torch.dtype,
        cut: Cut = Cut(),
        stage: int = 0,
        expert_cut: Cut = Cut(),
        expert_rank: int = 0,
    ) -> None:
        """`shards` yields (global Megatron name, this rank's parameter [any float dtype, or BlockFP8, which is sent as
        it is]); `dtype` is that of the engine's tensors that are not quantized; `cut` and `expert_cut` are the ranks
        that share the stage's matrices and its experts'; expert_rank is this rank's expert-parallel rank."""
        self.shards = shards
        held = dict(shards())
        names = list(held)
        dense, experts = source_plans(
            table, names, f"stage{stage}", quantization, dtype, bucket_bytes, cut.size, expert_cut.size, expert_rank
        )
        self._lanes = [_Lane(dense, cut, dtype)]
        if experts is not None:
            self._lanes.append(_Lane(experts, expert_cut, dtype))
        self.planned = [p for lane in self._lanes for p in lane.source.planned]
        check_as_they_are(self.planned, held)
        self._bound: list[tuple[int, int]] = []
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Of the last update: quantize, copy, gather (slices to the source, or waiting for them), wait (for a bucket
        under way, because its buffer is needed)."""
        self.counts: dict[str, int] = {}
        """Of the last update: bytes that this rank gathered and broadcast, messages, buckets (traffic.RankTraffic)."""

    @property
    def sources(self) -> dict[str, SourcePlan]:
        """What this rank is the source of, by name: nothing, a stage, its experts, or both."""
        return {lane.source.name: lane.source for lane in self._lanes if lane.is_source}

    @property
    def shared(self) -> set[str]:
        """The sources that this rank is, or hands its slices to."""
        return {lane.source.name for lane in self._lanes if lane.cut.takes_part and lane.source.planned}

    def waiting(self) -> AbstractContextManager[None]:
        """Counts what is done inside as waiting for a bucket under way (`seconds`)."""
        return self._timed("wait")

    def describe(self, source: str) -> str:
        """The buckets of a source as JSON, for the rollout workers."""
        return json.dumps(
            [
                [[s.name, str(s.dtype).removeprefix("torch."), list(s.shape), s.offset] for s in specs]
                for specs in self.sources[source].buckets
            ]
        )

    def send(self, version: int, start: Callable[[str, WeightBucket], Pending]) -> None:
        """One update. `start(source, bucket)` begins to send a finished bucket; it may travel while the next is filled.

        Collective over the ranks that share the tensors. Raises TransientInputError for a weight that is not finite, by
        name."""
        under_way: deque[Pending] = deque()
        for source, bucket in self.buckets(version):
            if bucket is None:
                continue
            under_way.append(start(source, bucket))
            if len(under_way) == BUFFERS:
                with self._timed("wait"):
                    under_way.popleft().wait()
        with self._timed("wait"):
            for pending in under_way:
                pending.wait()

    def buckets(self, version: int) -> Iterator[tuple[str, WeightBucket | None]]:
        """(source, finished bucket) for everything that this rank is the source of; (source, None) for what it hands
        slices of to another. A bucket is good until the next but one is asked for. All ranks that share the tensors
        have to run it to its end: the gathers are collective."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.counts = dict.fromkeys(("gathered", "gathers", "broadcast", "buckets"), 0)
        self._bind()
        return self._buckets(version)

    def _buckets(self, version: int) -> Iterator[tuple[str, WeightBucket | None]]:
        for lane in self._lanes:
            sent: deque[Pending] = deque()
            for specs, fill in zip(lane.source.buckets, lane.fills):
                if lane.is_source:
                    self._fill(fill, lane.cut)
                    self.counts["broadcast"] += fill.payload.numel()
                    self.counts["buckets"] += 1
                    yield lane.source.name, WeightBucket(version, specs, fill.payload)
                elif fill.outgoing is not None:
                    if len(sent) == BUFFERS:
                        self._wait(sent.popleft())
                    fill.first.run(self.seconds)
                    work = dist.isend(fill.outgoing, group=lane.cut.group, group_dst=0)
                    assert work is not None, "this rank is no member of the group"
                    sent.append(work)
                    self.counts["gathered"] += fill.outgoing.numel()
                    self.counts["gathers"] += 1
                if not lane.is_source:
                    yield lane.source.name, None
            for pending in sent:
                self._wait(pending)

    def _bind(self) -> None:
        parameters = dict(self.shards())
        where = [
            (_data(p).data_ptr(), p.scale_inv.data_ptr() if isinstance(p, BlockFP8) else 0) for p in parameters.values()
        ]
        if where != self._bound:  # the first update, or the trainer has moved its parameters
            for lane in self._lanes:
                held = {name: p for name, p in parameters.items() if name in lane.names}
                lane.bind({name: p if isinstance(p, BlockFP8) else p.detach() for name, p in held.items()})
            self._bound = where

    def _fill(self, fill: _Fill, cut: Cut) -> None:
        receiving = [dist.irecv(b, group=cut.group, group_src=r) for r, b in enumerate(fill.incoming, 1)]
        fill.first.run(self.seconds)
        for pending in receiving:
            self._wait(pending)
        fill.then.run(self.seconds)

    def _wait(self, pending: Any) -> None:
        with self._timed("gather"):
            pending.wait()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


HostCopy = Callable[[str, WeightBucket], Pending]
"""Begins to send a source's bucket to the rollout workers."""
Ask = Callable[..., list[dict[str, Any]]]
"""ask(command, meanwhile, **arguments): the rollout workers' answers; meanwhile() is called while they work on it."""


class Sender:
    """A training rank's end of a path, and the path through the hosts. All ranks make the same calls."""

    def __init__(self, last: LastSent | None = None) -> None:
        """last: with sync.delta."""
        self.last = last

    def prepare(self, ask: Ask) -> None:
        """Before an update is announced."""
        if self.last is not None:
            number = self.last.number
            self.last.begin(number is not None and all(answer["has"] for answer in ask("prepare", base=number)))

    def send(self, number: int, version: int, stream: WeightStream, to_hosts: HostCopy, verify: bool) -> None:
        """Update `number`, under `version`. Collective over the ranks that share tensors. verify: every bucket also
        goes `to_hosts`, to be compared (here all do, always)."""
        stream.send(version, lambda source, bucket: to_hosts(source, self.changes(number, source, bucket)))

    def changes(self, number: int, source: str, bucket: WeightBucket) -> WeightBucket:
        """The bucket, with sync.delta with what changed in it."""
        return bucket if self.last is None else self.last.changes(number, source, bucket)

    def done(self, number: int, arrived: bool) -> None:
        """The rollout workers have answered update `number`; arrived: whether all engines have it."""
        if self.last is not None:
            self.last.done(number, arrived)

    def close(self) -> None:
        """Give groups and files up."""


def parse_description(text: str) -> list[tuple[WeightSpec, ...]]:
    """The inverse of WeightStream.describe; offsets and sizes are checked against each other. Raises ValueError."""
    buckets = []
    for raw in json.loads(text):
        specs = tuple(
            WeightSpec(name, getattr(torch, dtype), tuple(shape), offset) for name, dtype, shape, offset in raw
        )
        end = 0
        for s in specs:
            if s.offset != end:
                raise ValueError(f"weight plan: {s.name} begins at byte {s.offset}, the tensor before it ends at {end}")
            end += s.nbytes
        buckets.append(specs)
    return buckets
