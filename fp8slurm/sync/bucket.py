"""A bucket of weights: one flat uint8 payload and the specs that say what lies where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WeightSpec:
    """One tensor in a payload, under its Hugging Face name."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the payload."""

    @property
    def form(self) -> tuple[str, str, tuple[int, ...], int]:
        """As the engine writes it down (engine/inside/recorded.py)."""
        return self.name, str(self.dtype).removeprefix("torch."), tuple(self.shape), self.offset

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


@dataclass(frozen=True)
class Delta:
    """The bytes of a bucket that are others than in update `base` (sync/delta.py)."""

    base: int
    changed: int
    """How many bytes."""
    checksum: int
    payload: torch.Tensor
    """uint8, engine/inside/delta.encode's; only the length counts where it goes past this process."""


@dataclass
class WeightBucket:
    """Tensors of update `version`: `payload` is uint8 [sum of nbytes], `specs` lie in it without gaps or overlaps."""

    version: int
    specs: tuple[WeightSpec, ...]
    payload: torch.Tensor
    number: int = 0
    """Of the update; counts what is sent, where a version can be sent twice. 0 where nobody counts."""
    delta: Delta | None = None
    """What can be sent in the bucket's place to whoever has update `delta.base`."""

    def views(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for every spec, without copying."""
        for s in self.specs:
            yield s.name, self.payload[s.offset : s.offset + s.nbytes].view(s.dtype).view(s.shape)


TensorForm = tuple[str, torch.dtype, tuple[int, ...]]


def layout(items: Sequence[Sequence[TensorForm]], bucket_bytes: int) -> list[tuple[WeightSpec, ...]]:
    """Deal items, in order, into buckets of at most bucket_bytes (a larger item gets one of its own).

    An item is what stays together: a tensor, or FP8 codes and their scales. Inside a bucket wider dtypes come first:
    the payload then has no gaps (SGLang expects none in its flattened form) and every view is still aligned for its
    dtype."""
    buckets: list[list[TensorForm]] = []
    used = bucket_bytes + 1
    for item in items:
        size = sum(WeightSpec(name, dtype, tuple(shape), 0).nbytes for name, dtype, shape in item)
        if used + size > bucket_bytes:
            buckets.append([])
            used = 0
        buckets[-1].extend(item)
        used += size
    planned = []
    for bucket in buckets:
        specs, offset = [], 0
        for name, dtype, shape in sorted(bucket, key=lambda t: -t[1].itemsize):
            specs.append(WeightSpec(name, dtype, tuple(shape), offset))
            offset += specs[-1].nbytes
        planned.append(tuple(specs))
    return planned


def payload_bytes(specs: tuple[WeightSpec, ...]) -> int:
    """Length of the payload that holds these specs."""
    return specs[-1].offset + specs[-1].nbytes
