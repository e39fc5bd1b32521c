"""The quantizer that everybody calls: on the CPU in cache-sized panels, on CUDA with the Triton kernel.

Its bytes are those of `reference`; only the order of the work differs.
"""

from __future__ import annotations

import torch

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.activations import dequantize_1x128, fake_quantize_1x128, fake_quantize_128x1, quantize_1x128
from fp8slurm.fp8.block import E4M3, BlockFP8, scale_shape
from fp8slurm.fp8.decode import decode_scaled, has_nan
from fp8slurm.fp8.panels import NotFinite, buffer, checked, not_finite_error, panels, scaled, scales
from fp8slurm.fp8.reference import dequantize_reference

__all__ = [
    "dequantize",
    "dequantize_1x128",
    "fake_quantize_1x128",
    "fake_quantize_128x1",
    "fake_quantize_block",
    "quantize",
    "quantize_1x128",
]


def quantize(
    weight: torch.Tensor, *, name: str = "", power_of_two: bool = False, out: BlockFP8 | None = None, first_row: int = 0
) -> BlockFP8:
    """[N, K] bf16|fp16|fp32 -> BlockFP8 in 128x128 blocks, with the bytes of TransformerEngine's weight quantizer.

    `out` (same shapes, contiguous, same device) is filled and returned instead of new tensors. On the CPU nothing but
    `out` and about 3 MiB of scratch a thread is allocated, whatever the size. `first_row`: number of row 0 where weight
    is cut from a larger tensor, for the error. Raises ValueError for another dtype or rank, TransientInputError, naming
    `name` and the first bad element, for a NaN or infinity."""
    w = checked(weight, name)
    if out is None:
        data = torch.empty(w.shape, dtype=E4M3, device=w.device)
        out = BlockFP8(data, torch.empty(scale_shape(w.shape), dtype=torch.float32, device=w.device))
    elif out.data.shape != w.shape or out.block != (BLOCK, BLOCK) or not out.data.is_contiguous():
        raise ValueError(f"{name or 'weight'} {list(w.shape)}: out holds {list(out.data.shape)} in blocks {out.block}")
    if w.is_cuda:
        from fp8slurm.fp8 import triton_quantize  # Triton exists only where CUDA does

        if not triton_quantize.quantize_into(w, out, power_of_two):
            raise not_finite_error(w, name, first_row)
        return out
    try:
        for rows, columns in panels(*w.shape):
            panel = w[rows, columns]
            scale = scales(panel, rows=True, columns=True, power_of_two=power_of_two)
            out.data[rows, columns].copy_(scaled(panel, scale))
            r, c = rows.start // BLOCK, columns.start // BLOCK
            out.scale_inv[r : r + scale.shape[0], c : c + scale.shape[1]] = scale.reciprocal()
    except NotFinite:
        raise not_finite_error(w, name, first_row) from None
    return out


def dequantize(q: BlockFP8, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
    """BlockFP8 [N, K] -> fp32 code * scale_inv, rounded once, then cast to `dtype` [N, K] (or into `out`).

    Any block size and any fp32 scale is accepted; NaN codes give NaN.
    """
    if out is None:
        out = torch.empty(q.data.shape, dtype=dtype, device=q.data.device)
    if q.data.device.type != "cpu" or q.block != (BLOCK, BLOCK):
        return out.copy_(dequantize_reference(q))
    for rows, columns in panels(*q.data.shape):
        codes = q.data[rows, columns]
        r, c = rows.start // BLOCK, columns.start // BLOCK
        height, width = scale_shape(codes.shape)
        scale_inv = q.scale_inv[r : r + height, c : c + width]
        into = out[rows, columns]
        values = into if out.dtype == torch.float32 else buffer("scaled", torch.float32, *codes.shape)
        if has_nan(codes):
            values.copy_(dequantize_reference(BlockFP8(codes, scale_inv)))
        else:
            decode_scaled(codes, scale_inv, values)
        if values is not into:
            into.copy_(values)
    return out


def fake_quantize_block(w: torch.Tensor, power_of_two: bool = False, name: str = "") -> torch.Tensor:
    """[N, K] bf16|fp16|fp32 -> fp32 [N, K]: dequantize(quantize(w)) to the bit, in one pass."""
    w = checked(w, name)
    if w.is_cuda:
        return dequantize(quantize(w, name=name, power_of_two=power_of_two))
    out = torch.empty(w.shape, dtype=torch.float32)
    try:
        for rows, columns in panels(*w.shape):
            panel = w[rows, columns]
            scale = scales(panel, rows=True, columns=True, power_of_two=power_of_two)
            codes = buffer("codes", E4M3, *panel.shape).copy_(scaled(panel, scale))
            decode_scaled(codes, scale.reciprocal(), out[rows, columns])
    except NotFinite:
        raise not_finite_error(w, name) from None
    return out
