"""The weight quantizer on CUDA: one program a row of 128x128 tiles, every element read once and written once.

Imported only when a CUDA tensor is quantized (or by the GPU test): Triton is not needed anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fp8slurm.fp8.block import BLOCK, E4M3_MAX, BlockFP8


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched; none of it changes a byte. Defaults: the fastest on an H200 (docs/perf.md)."""

    tiles: int = 1
    """Tiles, side by side, that a program works through."""
    num_warps: int = 16
    num_stages: int = 1
    """Loads in flight when a program has several tiles."""


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

        # magnitudes order like their bits, NaN above infinity: one integer maximum finds amax and what is not finite
        amax_bits = tl.max(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
        amax = amax_bits.to(tl.float32, bitcast=True)
        scale = tl.div_rn(tl.full((), E4M3_LARGEST, tl.float32), amax)
        scale = tl.where(scale == float("inf"), LARGEST, scale)
        scale = tl.where((amax_bits == 0) | (amax_bits >= 0x7F800000), 1.0, scale)
        if POWER_OF_TWO:
            scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)

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
