"""The trainer's end of a weight update: shards -> HF names -> block FP8 -> buckets -> agents.

Everything that does not change between updates is decided once, in `plan`: what is quantized, where, into which bucket
at which offset. For every tensor of a pipeline stage one of four ways is taken:

    local        this stage's first tensor-parallel rank has the whole tensor; it is copied, or quantized into the bucket
    shard-fp8    every tensor-parallel rank quantizes its slice; codes and scales are gathered (half the bytes of BF16)
    gather       not quantized: the slices are gathered in the trainer's dtype
    gather-quantize   the cut falls inside a block: gathered in the trainer's dtype, then quantized

The ranks of data-parallel rank 0 take part; the first tensor-parallel rank of each stage, the stage's source,
broadcasts the finished buckets to the agents over a group of its own.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.policy import decide
from fp8slurm.fp8.quantize import quantize
from fp8slurm.models.names import Entry, NameTable, SliceSpec
from fp8slurm.models.qwen3 import QuantizationSpec
from fp8slurm.sync.bucket import TensorForm, WeightBucket, WeightSpec, layout, payload_bytes

FP8 = torch.float8_e4m3fn
SCALE = "_scale_inv"


@dataclass(frozen=True)
class Planned:
    """One HF tensor of the stage."""

    entry: Entry
    part: int
    """Which of the entry's HF tensors."""
    name: str
    shape: tuple[int, ...]
    quantized: bool
    way: str
    reason: str
    slices: tuple[SliceSpec, ...]
    """One for every tensor-parallel rank; a single one where the tensor is not cut."""

    def forms(self, dtype: torch.dtype) -> list[TensorForm]:
        """What goes into the bucket for it."""
        if not self.quantized:
            return [(self.name, dtype, self.shape)]
        n, k = self.shape
        return [(self.name, FP8, self.shape), (self.name + SCALE, torch.float32, (-(-n // 128), -(-k // 128)))]


def plan(
    table: NameTable, names: Sequence[str], tensor_parallel_size: int, quantization: QuantizationSpec | None
) -> list[Planned]:
    """How each HF tensor made of the Megatron parameters `names` (global, those of one stage) is sent, in model order."""
    held = set(names)
    out = []
    for entry in table:
        if entry.name not in held:
            continue
        world = tensor_parallel_size if entry.tp_dim is not None else 1
        by_rank = [entry.slices(r, world) for r in range(world)]
        for part, tensor in enumerate(entry.tensors):
            slices = tuple(ranks[part] for ranks in by_rank)
            fp8, why = False, "the engine's checkpoint is not quantized"
            if quantization is not None:
                decision = decide(tensor.name, tensor.shape, quantization.modules_to_not_convert)
                fp8, why = decision.quantize, decision.reason
            if world == 1:
                way, reason = "local", f"{why}; not cut"
            elif not fp8:
                way, reason = "gather", why
            elif all(s.on_block_border() for s in slices):
                way, reason = "shard-fp8", f"{why}; every cut is a block border"
            else:
                way, reason = "gather-quantize", f"{why}; a cut at {slices[0].length} is inside a 128 block"
            out.append(Planned(entry, part, tensor.name, tensor.shape, fp8, way, reason, slices))
    return out


class WeightStream:
    """One rank's part in every update. Ranks outside data-parallel rank 0 make one too; their `send` does nothing."""

    def __init__(
        self,
        table: NameTable,
        shards: Callable[[], Iterator[tuple[str, torch.Tensor]]],
        quantization: QuantizationSpec | None,
        bucket_bytes: int,
        dtype: torch.dtype,
        tensor_parallel_rank: int = 0,
        tensor_parallel_size: int = 1,
        tensor_parallel_group: dist.ProcessGroup | None = None,
        takes_part: bool = True,
    ) -> None:
        """`shards` yields (global Megatron name, this rank's parameter [any float dtype]); `dtype` is that of the engine's
        tensors that are not quantized; tensor_parallel_group as in Megatron."""
        self.shards, self.takes_part = shards, takes_part
        self.rank, self.size, self.group = tensor_parallel_rank, tensor_parallel_size, tensor_parallel_group
        names = [name for name, _ in shards()]
        self.dtype = dtype
        self.planned = plan(table, names, tensor_parallel_size, quantization)
        self._by_name = {p.name: p for p in self.planned}
        self.specs = layout([p.forms(self.dtype) for p in self.planned], bucket_bytes)
        self.seconds: dict[str, float] = {}

    @property
    def is_source(self) -> bool:
        return self.takes_part and self.rank == 0

    def describe(self) -> str:
        """The buckets as JSON, for the agents."""
        return json.dumps(
            [
                [[s.name, str(s.dtype).removeprefix("torch."), list(s.shape), s.offset] for s in specs]
                for specs in self.specs
            ]
        )

    def buckets(self, version: int) -> Iterator[WeightBucket]:
        """This stage's finished buckets, on its source; on the other tensor-parallel ranks it yields nothing but has to be
        run to its end, because the gathers are collective."""
        if not self.takes_part:
            return
        self.seconds = {"quantize": 0.0, "gather": 0.0}
        parameters = dict(self.shards())
        for specs in self.specs:
            payload = torch.empty(payload_bytes(specs), dtype=torch.uint8)
            bucket = WeightBucket(version, specs, payload)
            self._fill(bucket, parameters)
            if self.is_source:
                yield bucket

    def _fill(self, bucket: WeightBucket, parameters: dict[str, torch.Tensor]) -> None:
        views = dict(bucket.views())
        items = [self._by_name[s.name] for s in bucket.specs if s.name in self._by_name]
        for item in items:
            shard = parameters[item.entry.name].detach()
            world = len(item.slices)
            piece = item.entry.split(shard, self.rank if world > 1 else 0, world)[item.part].data
            if item.way == "local":
                if item.quantized:
                    self._quantize(piece, item.name, views)
                else:
                    views[item.name].copy_(piece)
            elif item.way == "shard-fp8":
                start = time.perf_counter()
                block = quantize(piece.contiguous(), name=item.name)
                self.seconds["quantize"] += time.perf_counter() - start
                dim = item.slices[0].dim
                assert dim is not None
                self._gather(block.data.view(torch.uint8), views[item.name].view(torch.uint8), dim)
                self._gather(block.scale_inv, views[item.name + SCALE], dim)
            else:
                dim = item.slices[0].dim
                assert dim is not None
                if item.way == "gather":
                    piece, whole = piece.to(self.dtype), views[item.name]
                else:
                    whole = torch.empty(item.shape, dtype=piece.dtype)
                self._gather(piece.contiguous(), whole, dim)
                if item.way == "gather-quantize" and self.rank == 0:
                    self._quantize(whole, item.name, views)

    def _quantize(self, weight: torch.Tensor, name: str, views: dict[str, torch.Tensor]) -> None:
        start = time.perf_counter()
        quantize(weight.contiguous(), name=name, out=BlockFP8(views[name], views[name + SCALE]))
        self.seconds["quantize"] += time.perf_counter() - start

    def _gather(self, piece: torch.Tensor, whole: torch.Tensor, dim: int) -> None:
        start = time.perf_counter()
        parts = [torch.empty_like(piece) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(piece, parts, group=self.group, group_dst=0)
        if parts is not None:
            torch.cat(parts, dim, out=whole)
        self.seconds["gather"] += time.perf_counter() - start


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
