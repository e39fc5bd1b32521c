"""The weight quantizer on CUDA: one program a 128x128 tile, every element read once and written once.

`launch` works on one matrix, `GroupedLaunch` on many with one launch. Imported only when a CUDA tensor is quantized (or
by the GPU test): Triton is not needed anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3_MAX, BlockFP8


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched; none of it changes a byte. Defaults: the fastest on an H200 (docs/perf.md)."""

    tiles: int = 1
    """Tiles, side by side, that a program works through."""
    num_warps: int = 16
    num_stages: int = 1
    """Loads in flight when a program has several tiles."""


@triton.jit
def _scale(w, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """(bits of the largest magnitude, scale) of an fp32 tile."""
    # magnitudes order like their bits, NaN above infinity: one integer maximum finds amax and what is not finite
    amax_bits = tl.max(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full((), E4M3_LARGEST, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    scale = tl.where((amax_bits == 0) | (amax_bits >= 0x7F800000), 1.0, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return amax_bits, scale


@triton.jit
def _quantize_tiles(
    w_ptr, data_ptr, scale_inv_ptr, bad_ptr, n, k, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, EVEN: tl.constexpr, EDGE: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_block = tl.program_id(0)
    rows = row_block.to(tl.int64) * EDGE + tl.arange(0, EDGE)
    column_blocks = tl.cdiv(k, EDGE)
    first = tl.program_id(1) * TILES
    for i in tl.range(0, TILES, num_stages=STAGES):
        column_block = first + i
        columns = column_block * EDGE + tl.arange(0, EDGE)
        at = rows[:, None] * k + columns[None, :]
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        if EVEN:
            w = tl.load(w_ptr + at).to(tl.float32)
        else:
            w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)

        amax_bits, scale = _scale(w, LARGEST, E4M3_LARGEST, POWER_OF_TWO)
        codes = (w * scale).to(tl.float8e4nv)
        if EVEN:
            tl.store(data_ptr + at, codes)
        else:
            tl.store(data_ptr + at, codes, mask=inside)
        scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
        scale_at = row_block.to(tl.int64) * column_blocks + column_block
        tl.store(scale_inv_ptr + scale_at, scale_inv, mask=column_block < column_blocks)
        if amax_bits >= 0x7F800000:
            tl.store(bad_ptr, 1)


def launch(
    w: torch.Tensor, out: BlockFP8, bad: torch.Tensor, power_of_two: bool = False, how: Launch = Launch()
) -> None:
    """Fill `out` from w [N, K] contiguous bf16|fp16|fp32; sets bad (int32 [1]) to 1 if w holds a NaN or infinity.

    Asynchronous, nothing is allocated: this is the part to time.
    """
    n, k = w.shape
    assert w.is_contiguous() and out.data.is_contiguous() and out.scale_inv.is_contiguous()
    if w.numel() == 0:
        return
    _quantize_tiles[(triton.cdiv(n, BLOCK), triton.cdiv(triton.cdiv(k, BLOCK), how.tiles))](
        w, out.data, out.scale_inv, bad, n, k,
        LARGEST=torch.finfo(w.dtype).max, E4M3_LARGEST=E4M3_MAX, POWER_OF_TWO=power_of_two,
        EVEN=n % BLOCK == 0 and k % (BLOCK * how.tiles) == 0, EDGE=BLOCK, TILES=how.tiles, STAGES=how.num_stages,
        num_warps=how.num_warps,
    )  # fmt: skip


def quantize_into(w: torch.Tensor, out: BlockFP8, power_of_two: bool = False) -> bool:
    """`launch`, and wait: whether all of w was finite."""
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    launch(w, out, bad, power_of_two)
    return int(bad) == 0


@triton.jit
def _quantize_group(
    table_ptr, bad_ptr, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    EVEN: tl.constexpr,
    EDGE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    entry = table_ptr + tl.program_id(0).to(tl.int64) * 8
    w_ptr = tl.load(entry).to(tl.pointer_type(DTYPE))
    data_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float8e4nv))
    scale_inv_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    w_stride, data_stride = tl.load(entry + 3), tl.load(entry + 4)
    rows, columns = tl.arange(0, EDGE).to(tl.int64), tl.arange(0, EDGE)
    if EVEN:  # GroupedLaunch has seen to it; told nothing, loads would be element by element
        w_ptr, data_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(data_ptr, 16)
        w_stride, data_stride = tl.multiple_of(w_stride, 16), tl.multiple_of(data_stride, 16)
        w = tl.load(w_ptr + (rows[:, None] * w_stride + columns[None, :])).to(tl.float32)
    else:
        n, k = tl.load(entry + 5), tl.load(entry + 6)
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        w = tl.load(w_ptr + (rows[:, None] * w_stride + columns[None, :]), mask=inside, other=0.0).to(tl.float32)
    amax_bits, scale = _scale(w, LARGEST, E4M3_LARGEST, POWER_OF_TWO)
    codes = (w * scale).to(tl.float8e4nv)
    if EVEN:
        tl.store(data_ptr + (rows[:, None] * data_stride + columns[None, :]), codes)
    else:
        tl.store(data_ptr + (rows[:, None] * data_stride + columns[None, :]), codes, mask=inside)
    tl.store(scale_inv_ptr, tl.div_rn(tl.full((), 1.0, tl.float32), scale))
    if amax_bits >= 0x7F800000:
        tl.store(bad_ptr, tl.load(entry + 7).to(tl.int32))


DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class GroupedLaunch:
    """Many matrices that are quantized again and again, in place: one launch, whatever their number.

    Where every tile lies is written down once, 64 bytes for 128x128 elements. The tensors must stay where they are
    (they are kept alive). Sources are [N, K], or [G, N/G, K] of which each part is contiguous in rows (query groups
    inside a fused matrix; N/G a multiple of 128 or G = 1)."""

    WIDTH = 8
    """Numbers a tile: address of its first element, code and scale; row strides of source and codes in elements; rows
    and columns inside the matrix; number of the matrix, from 1."""

    def __init__(self, matrices: Sequence[tuple[torch.Tensor, BlockFP8]], power_of_two: bool = False) -> None:
        """(source bf16|fp16|fp32 with rows that are contiguous, where it goes) of each; all on one GPU."""
        self.matrices, self.power_of_two = list(matrices), power_of_two
        device = self.matrices[0][0].device
        self.bad = torch.zeros(1, dtype=torch.int32, device=device)
        tables: dict[tuple[torch.dtype, bool], list[np.ndarray]] = {}
        for number, (source, out) in enumerate(self.matrices, 1):
            tiles = _tiles(source, out, number)
            aligned = ((tiles[:, 0] | tiles[:, 1]) % 16 == 0) & (tiles[:, 3] % 16 == 0) & (tiles[:, 4] % 16 == 0)
            even = aligned & (tiles[:, 5] == BLOCK) & (tiles[:, 6] == BLOCK)
            for is_even in (True, False):
                if (even == is_even).any():
                    tables.setdefault((source.dtype, is_even), []).append(tiles[even == is_even])
        self._tables = {key: torch.from_numpy(np.concatenate(t)).to(device) for key, t in tables.items()}

    def launch(self, how: Launch = Launch()) -> None:
        """Fill all of them. Asynchronous, nothing is allocated; `first_bad` waits."""
        for (dtype, even), table in self._tables.items():
            _quantize_group[(table.shape[0],)](
                table, self.bad, LARGEST=torch.finfo(dtype).max, E4M3_LARGEST=E4M3_MAX, POWER_OF_TWO=self.power_of_two,
                EVEN=even, EDGE=BLOCK, DTYPE=DTYPES[dtype], num_warps=how.num_warps,
            )  # fmt: skip

    def first_bad(self) -> int | None:
        """Wait for the launch: the number, from 0, of a matrix that holds a NaN or infinity, if one does."""
        number = int(self.bad)
        if number:
            self.bad.zero_()
        return number - 1 if number else None


def fits_group(source: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether GroupedLaunch takes this matrix as it lies; otherwise it has to be made contiguous first."""
    parts = source.shape[0] if source.dim() == 3 else 1
    return source.stride(-1) == 1 and (parts == 1 or codes.shape[0] // parts % BLOCK == 0)


def _tiles(source: torch.Tensor, out: BlockFP8, number: int) -> np.ndarray:
    """int64 [tiles, GroupedLaunch.WIDTH] of one matrix."""
    n, k = out.data.shape
    parts = source.shape[0] if source.dim() == 3 else 1
    part_rows = n // parts
    part_stride = source.stride(0) if source.dim() == 3 else 0
    if (
        source.numel() != n * k
        or source.stride(-1) != 1
        or out.data.stride(-1) != 1
        or not out.scale_inv.is_contiguous()
    ):
        raise ValueError(f"a matrix {list(source.shape)} with strides {source.stride()} for codes {[n, k]}")
    if parts > 1 and part_rows % BLOCK:
        raise ValueError(f"parts of {part_rows} rows of {source.shape}: allowed: multiples of {BLOCK}")
    rows, columns = np.meshgrid(np.arange(0, n, BLOCK), np.arange(0, k, BLOCK), indexing="ij")
    row, column = rows.ravel().astype(np.int64), columns.ravel().astype(np.int64)
    at = row // part_rows * part_stride + row % part_rows * source.stride(-2) + column
    tiles = np.empty((len(row), GroupedLaunch.WIDTH), dtype=np.int64)
    tiles[:, 0] = source.data_ptr() + at * source.element_size()
    tiles[:, 1] = out.data.data_ptr() + row * out.data.stride(0) + column
    tiles[:, 2] = out.scale_inv.data_ptr() + np.arange(len(row)) * 4
    tiles[:, 3], tiles[:, 4] = source.stride(-2), out.data.stride(0)
    tiles[:, 5], tiles[:, 6] = np.minimum(n - row, BLOCK), np.minimum(k - column, BLOCK)
    tiles[:, 7] = number
    return tiles
