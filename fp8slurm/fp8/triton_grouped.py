"""Quantizers on CUDA for the rows of many experts, each expert's padded to whole tiles of 128: one launch for all.

Codes and scales are those of fp8/reference.py, hence TransformerEngine's: along a row in groups of 128 for the forward
and the data gradient, along a column for the weight gradient, where an expert's padding counts as zeros. Both are made
of a tile that is read once. Where each tile comes from and goes to stands in a table (trainer/grouped.py, Groups). The
scales lie column by column, as DeepGEMM reads them. Imported only where CUDA tensors are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, E4M3_MAX
from fp8slurm.fp8.triton_quantize import _scale as _block_scale

BF16_MAX = torch.finfo(torch.bfloat16).max
WARPS = 8
TABLE_WIDTH = 6
"""int32 a tile: its first row among those that are not padded; how many of its rows are real; the padded row at which
its expert begins in the column-wise codes; the expert's padded rows; the tile's first row within its expert; its row
of column-wise scales."""


@triton.jit
def _scales(x, AXIS: tl.constexpr, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr):
    """(scale, scale_inv) of an fp32 tile's rows (AXIS 1) or columns (AXIS 0): 448 / amax and its inverse."""
    # magnitudes order like their bits, NaN above infinity: one integer maximum finds amax and what is not finite
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, E4M3_LARGEST, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    scale = tl.where((amax_bits == 0) | (amax_bits >= 0x7F800000), 1.0, scale)
    return scale, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def _store_tile(
    x, tile, column_tile, width, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr, tiles,
    COLUMNS: tl.constexpr, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, EDGE: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Quantize an fp32 tile [EDGE, EDGE], tile `column_tile` of `width` columns, both ways."""
    i = tl.arange(0, EDGE)
    column = column_tile * EDGE + i
    row = tile.to(tl.int64) * EDGE + i
    scale, scale_inv = _scales(x, 1, LARGEST, E4M3_LARGEST)
    tl.store(rows_ptr + row[:, None] * width + column[None, :], (x * scale[:, None]).to(tl.float8e4nv))
    tl.store(rows_scale_ptr + column_tile.to(tl.int64) * (tiles * EDGE) + row, scale_inv)
    if COLUMNS:
        scale, scale_inv = _scales(x, 0, LARGEST, E4M3_LARGEST)
        entry = table_ptr + tile * TABLE
        begin = tl.load(entry + 2).to(tl.int64)
        length = tl.multiple_of(tl.load(entry + 3), EDGE)
        offset = tl.multiple_of(tl.load(entry + 4), EDGE)
        at = begin * width + column.to(tl.int64)[None, :] * length + (offset + i)[:, None]
        tl.store(columns_ptr + at, (x * scale[None, :]).to(tl.float8e4nv))
        tl.store(columns_scale_ptr + tl.load(entry + 5).to(tl.int64) * width + column, scale_inv)


@triton.jit(do_not_specialize=["tiles"])
def _quantize(
    x_ptr, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr, width, tiles, COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, EDGE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, EDGE)
    first, real = tl.load(table_ptr + tile * TABLE).to(tl.int64), tl.load(table_ptr + tile * TABLE + 1)
    at = (first + i)[:, None] * width + (column_tile * EDGE + i)[None, :]
    x = tl.load(x_ptr + at, mask=(i < real)[:, None], other=0.0).to(tl.float32)
    _store_tile(
        x, tile, column_tile, width, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr, tiles,
        COLUMNS, LARGEST, E4M3_LARGEST, EDGE, TABLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])
def _swiglu(
    x_ptr, probs_ptr, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr, width, tiles,
    COLUMNS: tl.constexpr, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, EDGE: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, EDGE)
    first, real = tl.load(table_ptr + tile * TABLE).to(tl.int64), tl.load(table_ptr + tile * TABLE + 1)
    at = (tile.to(tl.int64) * EDGE + i)[:, None] * (2 * width) + (column_tile * EDGE + i)[None, :]
    gate, up = tl.load(x_ptr + at).to(tl.float32), tl.load(x_ptr + at + width).to(tl.float32)
    prob = tl.load(probs_ptr + first + i, mask=i < real, other=0.0)
    out = (gate * tl.sigmoid(gate) * up * prob[:, None]).to(tl.bfloat16).to(tl.float32)
    _store_tile(
        out, tile, column_tile, width, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr, tiles,
        COLUMNS, LARGEST, E4M3_LARGEST, EDGE, TABLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tiles", "rows"])
def _swiglu_backward(
    grad_ptr, x_ptr, probs_ptr, grad_probs_ptr, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr,
    width, tiles, rows, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr, EDGE: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    tile, column_tile = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, EDGE)
    first, real = tl.load(table_ptr + tile * TABLE).to(tl.int64), tl.load(table_ptr + tile * TABLE + 1)
    row, column = (tile.to(tl.int64) * EDGE + i)[:, None], (column_tile * EDGE + i)[None, :]
    at = row * (2 * width) + column
    gate, up = tl.load(x_ptr + at).to(tl.float32), tl.load(x_ptr + at + width).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column).to(tl.float32)
    prob = tl.load(probs_ptr + first + i, mask=i < real, other=0.0)
    sigmoid = tl.sigmoid(gate)
    # a share for every tile of columns, summed in their order afterwards: a repetition gives the same bits
    share = tl.sum(grad * gate * sigmoid * up, axis=1)
    tl.store(grad_probs_ptr + column_tile.to(tl.int64) * rows + first + i, share, mask=i < real)
    grad = grad * prob[:, None]
    for_gate = (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(tl.bfloat16).to(tl.float32)
    _store_tile(
        for_gate, tile, column_tile, 2 * width, rows_ptr, rows_scale_ptr, columns_ptr, columns_scale_ptr, table_ptr,
        tiles, True, LARGEST, E4M3_LARGEST, EDGE, TABLE,
    )  # fmt: skip
    for_up = (grad * gate * sigmoid).to(tl.bfloat16).to(tl.float32)
    _store_tile(
        for_up, tile, column_tile + width // EDGE, 2 * width, rows_ptr, rows_scale_ptr, columns_ptr,
        columns_scale_ptr, table_ptr, tiles, True, LARGEST, E4M3_LARGEST, EDGE, TABLE,
    )  # fmt: skip


@triton.jit
def _unpad(x_ptr, out_ptr, table_ptr, width, EDGE: tl.constexpr, TABLE: tl.constexpr):
    tile = tl.program_id(0)
    i = tl.arange(0, EDGE)
    column = tl.program_id(1) * EDGE + i
    first, real = tl.load(table_ptr + tile * TABLE).to(tl.int64), tl.load(table_ptr + tile * TABLE + 1)
    inside = (i < real)[:, None]
    x = tl.load(x_ptr + (tile.to(tl.int64) * EDGE + i)[:, None] * width + column[None, :], mask=inside)
    tl.store(out_ptr + (first + i)[:, None] * width + column[None, :], x, mask=inside)


@triton.jit
def _quantize_weights(
    pointers_ptr, codes_ptr, scale_ptr, turned_ptr, turned_scale_ptr, n, k, LARGEST: tl.constexpr,
    E4M3_LARGEST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    column_tile, row_tile, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    w_ptr = tl.multiple_of(tl.load(pointers_ptr + matrix).to(tl.pointer_type(tl.bfloat16)), 16)
    row, column = row_tile.to(tl.int64) * EDGE + tl.arange(0, EDGE), column_tile * EDGE + tl.arange(0, EDGE)
    w = tl.load(w_ptr + row[:, None] * k + column[None, :]).to(tl.float32)
    _, scale = _block_scale(w, LARGEST, E4M3_LARGEST, False)
    scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    codes = (w * scale).to(tl.float8e4nv)
    begin = matrix * n * k
    tl.store(codes_ptr + begin + row[:, None] * k + column[None, :], codes)
    tl.store(turned_ptr + begin + column.to(tl.int64)[None, :] * n + row[:, None], codes)
    scales = matrix * (n // EDGE) * (k // EDGE)
    tl.store(scale_ptr + scales + row_tile * (k // EDGE) + column_tile, scale_inv)
    tl.store(turned_scale_ptr + scales + column_tile * (n // EDGE) + row_tile, scale_inv)


Pair = tuple[torch.Tensor, torch.Tensor]
"""(codes e4m3, scale_inv fp32)."""


class _Outputs:
    """Where a launch puts the codes of [tiles * 128, width], and of their columns if they are wanted."""

    def __init__(self, width: int, tiles: int, columns: bool, device: torch.device) -> None:
        rows = tiles * BLOCK
        self.rows = torch.empty(rows, width, dtype=E4M3, device=device)
        self.rows_scale = torch.empty(width // BLOCK, rows, dtype=torch.float32, device=device)
        self.columns, self.columns_scale = self.rows, self.rows_scale
        if columns:
            self.columns = torch.empty(rows * width, dtype=E4M3, device=device)
            self.columns_scale = torch.empty(tiles, width, dtype=torch.float32, device=device)
        self._both = columns

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        return self.rows, self.rows_scale, self.columns, self.columns_scale

    @property
    def pairs(self) -> tuple[Pair, Pair | None]:
        columns = (self.columns, self.columns_scale.t()) if self._both else None
        return (self.rows, self.rows_scale.t()), columns


CONSTANTS = {"LARGEST": BF16_MAX, "E4M3_LARGEST": E4M3_MAX, "EDGE": BLOCK, "TABLE": TABLE_WIDTH, "num_warps": WARPS}


def quantize(x: torch.Tensor, table: torch.Tensor, columns: bool) -> tuple[Pair, Pair | None]:
    """x bf16 [rows, width], table int32 [tiles > 0, TABLE_WIDTH] -> row-wise codes [tiles * 128, width] with scales
    [tiles * 128, width / 128]; and, if `columns`, column-wise codes, each expert's [width, its padded rows], one
    expert after another, with scales [width, tiles]."""
    assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] % BLOCK == 0, (x.shape, x.dtype)
    tiles, width = len(table), x.shape[1]
    out = _Outputs(width, tiles, columns, x.device)
    _quantize[(tiles, width // BLOCK)](x, *out.pointers, table, width, tiles, COLUMNS=columns, **CONSTANTS)
    return out.pairs


def swiglu(x: torch.Tensor, probs: torch.Tensor, table: torch.Tensor, columns: bool) -> tuple[Pair, Pair | None]:
    """`quantize` of bf16(silu(gate) * up * prob): x bf16 [tiles * 128, 2 * width] is (gate, up), probs fp32 [rows].

    The formula is Megatron's weighted_swiglu: one rounding at the end. Padding, whose probability is 0, gives 0."""
    assert x.is_contiguous() and probs.is_contiguous() and probs.dtype == torch.float32
    tiles, width = len(table), x.shape[1] // 2
    out = _Outputs(width, tiles, columns, x.device)
    _swiglu[(tiles, width // BLOCK)](x, probs, *out.pointers, table, width, tiles, COLUMNS=columns, **CONSTANTS)
    return out.pairs


def swiglu_backward(
    grad: torch.Tensor, x: torch.Tensor, probs: torch.Tensor, table: torch.Tensor
) -> tuple[Pair, Pair, torch.Tensor]:
    """grad bf16 [tiles * 128, width] of `swiglu`'s output -> codes of the gradient of x, both ways, and the gradient of
    probs, fp32 [rows]. Megatron's weighted_swiglu_back."""
    assert x.is_contiguous() and grad.is_contiguous() and probs.is_contiguous()
    tiles, width, rows = len(table), grad.shape[1], len(probs)
    out = _Outputs(2 * width, tiles, True, x.device)
    shares = torch.empty(width // BLOCK, rows, dtype=torch.float32, device=x.device)
    _swiglu_backward[(tiles, width // BLOCK)](
        grad, x, probs, shares, *out.pointers, table, width, tiles, rows, **CONSTANTS
    )
    row_wise, column_wise = out.pairs
    assert column_wise is not None
    return row_wise, column_wise, shares.sum(0)


def unpad(x: torch.Tensor, table: torch.Tensor, rows: int) -> torch.Tensor:
    """bf16 [tiles * 128, width] without the padding: [rows, width]."""
    assert x.is_contiguous() and x.shape[1] % BLOCK == 0
    out = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    _unpad[(len(table), x.shape[1] // BLOCK)](x, out, table, x.shape[1], EDGE=BLOCK, TABLE=TABLE_WIDTH, num_warps=WARPS)
    return out


def quantize_weights(weights: Sequence[torch.Tensor]) -> tuple[Pair, Pair]:
    """Matrices bf16 [N, K], N and K multiples of 128, -> (codes [G, N, K], scales [G, N / 128, K / 128]) and the same
    of the transposes. The bytes are those of fp8/quantize.py; a NaN or infinity is no error, it shows in the loss."""
    n, k = weights[0].shape
    device, many = weights[0].device, len(weights)
    for w in weights:
        assert w.shape == (n, k) and w.is_contiguous() and w.dtype == torch.bfloat16 and w.data_ptr() % 16 == 0
    pointers = torch.tensor([w.data_ptr() for w in weights], dtype=torch.int64, device=device)
    codes = torch.empty(many, n, k, dtype=E4M3, device=device)
    turned = torch.empty(many, k, n, dtype=E4M3, device=device)
    scale_inv = torch.empty(many, n // BLOCK, k // BLOCK, dtype=torch.float32, device=device)
    turned_scale_inv = torch.empty(many, k // BLOCK, n // BLOCK, dtype=torch.float32, device=device)
    _quantize_weights[(k // BLOCK, n // BLOCK, many)](
        pointers, codes, scale_inv, turned, turned_scale_inv, n, k, LARGEST=BF16_MAX, E4M3_LARGEST=E4M3_MAX,
        EDGE=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return (codes, scale_inv), (turned, turned_scale_inv)
