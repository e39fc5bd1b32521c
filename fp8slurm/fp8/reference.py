"""The definition of block FP8 quantization in plain torch: slow, obvious, on any device.

Formula of TransformerEngine's Float8BlockQuantizer (common/transpose/quantize_transpose_square_blockwise.cu for
128x128 blocks, quantize_transpose_vector_blockwise.cu for 1x128), with epsilon 0.
"""

from __future__ import annotations

import torch

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, E4M3_MAX, BlockFP8, scale_from_amax, scale_shape


def quantize_reference(
    w: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK), power_of_two: bool = False
) -> BlockFP8:
    """[N, K] bf16|fp16|fp32 -> BlockFP8 in blocks of `block`; edge blocks count only what is there.

    Like TransformerEngine's kernel it ignores NaN in a block's amax, keeps NaN as NaN and saturates the rest.
    """
    n, k = w.shape
    rows, cols = scale_shape((n, k), block)
    padded = torch.zeros(rows * block[0], cols * block[1], dtype=torch.float32, device=w.device)
    padded[:n, :k] = w.to(torch.float32)
    tiles = padded.view(rows, block[0], cols, block[1])
    amax = (
        tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=(1, 3))
        if w.numel()
        else padded.new_zeros(rows, cols)
    )
    scale = scale_from_amax(amax, w.dtype, power_of_two)
    codes = (tiles * scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).view_as(padded)[:n, :k].to(E4M3)
    return BlockFP8(codes.contiguous(), 1.0 / scale, block)


def dequantize_reference(q: BlockFP8) -> torch.Tensor:
    """BlockFP8 [N, K] -> fp32 [N, K]: code times scale_inv, rounded once."""
    n, k = q.data.shape
    spread = q.scale_inv.repeat_interleave(q.block[0], 0)[:n].repeat_interleave(q.block[1], 1)[:, :k]
    return q.data.to(torch.float32) * spread


def quantize_rowwise_reference(
    x: torch.Tensor, length: int = BLOCK, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] -> codes [T, K] and scale_inv [T, ceil(K / length)]: one scale for `length` neighbours in a row."""
    q = quantize_reference(x, (1, length), power_of_two)
    return q.data, q.scale_inv


def quantize_columnwise_reference(
    x: torch.Tensor, length: int = BLOCK, power_of_two: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, K] -> codes [T, K] and scale_inv [ceil(T / length), K]: one scale for `length` neighbours in a column."""
    q = quantize_reference(x, (length, 1), power_of_two)
    return q.data, q.scale_inv
