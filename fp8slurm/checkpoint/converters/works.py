"""What is done to a tensor on its way: copied, or quantized into codes and scales. Rows in, rows out."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo
from fp8slurm.checkpoint.formats.sources import SCALE_SUFFIX, Source, scratch
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, BlockFP8, scale_shape
from fp8slurm.fp8.quantize import quantize
from fp8slurm.fp8.reference import quantize_reference

Written = tuple[str, int, torch.Tensor]
"""Name of an output, byte offset in it, and a contiguous tensor to write there."""
ReadBack = Callable[[str, int, int], torch.Tensor]
"""(output name, byte offset, bytes) -> uint8 tensor, read from the finished file."""


@dataclass(frozen=True)
class Work(ABC):
    """One input tensor and how its outputs are made."""

    source: Source
    info: TensorInfo
    align: ClassVar[int] = 1
    """Pieces start at multiples of so many rows."""

    @property
    def rows(self) -> int:
        return self.info.rows

    @property
    def row_bytes(self) -> int:
        """Input bytes of a row."""
        return self.info.row_bytes

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorInfo, ...]: ...

    @abstractmethod
    def produce(self, start: int, stop: int) -> Iterator[Written]:
        """The outputs of input rows [start, stop); the tensors last until the next call in the same thread."""

    @abstractmethod
    def check(self, read_back: ReadBack) -> None:
        """Compare a sample of what was written with the input by other means; BadCheckpoint if they differ."""


class Copy(Work):
    """A tensor that stays as it is."""

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (self.info,)

    def produce(self, start: int, stop: int) -> Iterator[Written]:
        yield self.info.name, start * self.info.row_bytes, self.source.read(self.info.name, start, stop)

    def check(self, read_back: ReadBack) -> None:
        if self.info.nbytes == 0:
            return
        row = zlib.crc32(self.info.name.encode()) % self.info.rows
        got = read_back(self.info.name, row * self.info.row_bytes, self.info.row_bytes)
        expected = self.source.read(self.info.name, row, row + 1).contiguous().view(-1).view(torch.uint8)
        if not torch.equal(got, expected):
            raise BadCheckpoint(f"{self.info.name}: row {row} does not read back as it was in the input")


@dataclass(frozen=True)
class Quantize(Work):
    """A matrix that becomes block FP8: X.weight [N, K] -> X.weight e4m3 and X.weight_scale_inv fp32."""

    power_of_two: bool = False
    align: ClassVar[int] = BLOCK

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        return (
            TensorInfo(self.info.name, E4M3, self.info.shape),
            TensorInfo(self.info.name + SCALE_SUFFIX, torch.float32, scale_shape(self.info.shape)),
        )

    def produce(self, start: int, stop: int) -> Iterator[Written]:
        codes, scale = self.outputs
        rows, k = stop - start, self.info.columns
        scales = scratch.take("scale", torch.float32, *scale_shape((rows, k)))
        out = BlockFP8(scratch.take("codes", E4M3, rows, k), scales)
        w = self.source.read(self.info.name, start, stop)
        quantize(w, name=self.info.name, power_of_two=self.power_of_two, out=out, first_row=start)
        yield codes.name, start * codes.row_bytes, out.data
        yield scale.name, start // BLOCK * scale.row_bytes, out.scale_inv

    def check(self, read_back: ReadBack) -> None:
        """One 128x128 block, chosen by the name, against the plain definition."""
        codes, scale = self.outputs
        if self.info.nbytes == 0:
            return
        number = zlib.crc32(self.info.name.encode()) % (scale.rows * scale.columns)
        r, c = divmod(number, scale.columns)
        rows = slice(r * BLOCK, min((r + 1) * BLOCK, self.info.rows))
        columns = slice(c * BLOCK, (c + 1) * BLOCK)
        expected = quantize_reference(
            self.source.read(self.info.name, rows.start, rows.stop)[:, columns], power_of_two=self.power_of_two
        )
        got = read_back(codes.name, rows.start * codes.row_bytes, (rows.stop - rows.start) * codes.row_bytes)
        same = torch.equal(got.view(-1, codes.columns)[:, columns], expected.data.view(torch.uint8))
        at = (r * scale.columns + c) * 4
        same = same and torch.equal(read_back(scale.name, at, 4), expected.scale_inv.view(-1).view(torch.uint8))
        if not same:
            raise BadCheckpoint(f"{self.info.name}: block ({r}, {c}) does not read back as the input quantizes")
