"""Two tensor-parallel ranks in one process, without a group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import QuantizationSpec
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.stream import Cut, WeightStream


def laid_together(table: NameTable, held_by: Callable[[int], dict[str, Any]]) -> Iterator[WeightBucket]:
    """The buckets of an update in which rank 1's messages are put where they would arrive. held_by: a rank's parameters."""
    streams = []
    for rank in range(2):
        held = held_by(rank)
        streams.append(
            WeightStream(
                table, lambda held=held: iter(held.items()), QuantizationSpec(), 2**20, torch.bfloat16, Cut(rank, 2)
            )
        )
        streams[-1]._bind()
    first, second = (s._lanes[0] for s in streams)
    for specs, fill, other in zip(first.source.buckets, first.fills, second.fills, strict=True):
        other.first.run(streams[1].seconds)
        if other.outgoing is not None:
            fill.incoming[0].copy_(other.outgoing)
        fill.first.run(streams[0].seconds)
        fill.then.run(streams[0].seconds)
        yield WeightBucket(1, specs, fill.payload)
