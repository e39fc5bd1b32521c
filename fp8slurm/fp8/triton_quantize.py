"""The weight quantizer on CUDA: one program a 128x128 tile, every element read once and written once.

Imported only when a CUDA tensor is quantized (or by the GPU test): Triton is not needed anywhere else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8slurm.fp8.block import BLOCK, E4M3_MAX, BlockFP8

NUM_WARPS = 8


@triton.jit
def _quantize_tile(
    w_ptr, data_ptr, scale_inv_ptr, bad_ptr, n, k, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row_block, column_block = tl.program_id(0), tl.program_id(1)
    rows = row_block.to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = column_block * TILE + tl.arange(0, TILE)
    at = rows[:, None] * k + columns[None, :]
    if EVEN:
        w = tl.load(w_ptr + at).to(tl.float32)
    else:
        inside = (rows < n)[:, None] & (columns < k)[None, :]
        w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)

    # magnitudes order like their bits, NaN above infinity: one integer maximum finds amax and anything not finite
    amax_bits = tl.max(tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full((), E4M3_LARGEST, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    unusable = (amax_bits == 0) | (amax_bits >= 0x7F800000)
    scale = tl.where(unusable, 1.0, scale)
    if POWER_OF_TWO:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    scale_inv = tl.div_rn(tl.full((), 1.0, tl.float32), scale)

    codes = (w * scale).to(tl.float8e4nv)
    if EVEN:
        tl.store(data_ptr + at, codes)
    else:
        tl.store(data_ptr + at, codes, mask=inside)
    tl.store(scale_inv_ptr + row_block.to(tl.int64) * tl.num_programs(1) + column_block, scale_inv)
    if amax_bits >= 0x7F800000:
        tl.store(bad_ptr, 1)


def launch(
    w: torch.Tensor, out: BlockFP8, bad: torch.Tensor, power_of_two: bool = False, num_warps: int = NUM_WARPS
) -> None:
    """Fill `out` from w [N, K] contiguous bf16|fp16|fp32; sets bad (int32 [1]) to 1 if w holds a NaN or infinity.

    Asynchronous, nothing is allocated: this is the part to time.
    """
    n, k = w.shape
    assert w.is_contiguous() and out.data.is_contiguous() and out.scale_inv.is_contiguous()
    if w.numel() == 0:
        return
    _quantize_tile[(triton.cdiv(n, BLOCK), triton.cdiv(k, BLOCK))](
        w, out.data, out.scale_inv, bad, n, k,
        LARGEST=torch.finfo(w.dtype).max, E4M3_LARGEST=E4M3_MAX, POWER_OF_TWO=power_of_two,
        EVEN=n % BLOCK == 0 and k % BLOCK == 0, TILE=BLOCK, num_warps=num_warps,
    )  # fmt: skip


def quantize_into(w: torch.Tensor, out: BlockFP8, power_of_two: bool = False) -> bool:
    """`launch`, and wait: whether all of w was finite."""
    bad = torch.zeros(1, dtype=torch.int32, device=w.device)
    launch(w, out, bad, power_of_two)
    return int(bad) == 0
