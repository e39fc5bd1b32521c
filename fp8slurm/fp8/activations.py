"""Quantizers with one scale for 128 neighbours, for activations and gradients: along a row (1x128) or a column (128x1).

TransformerEngine quantizes them row-wise for the forward and the data gradient, column-wise, from the high-precision
tensor, for the weight gradient (common/transpose/quantize_transpose_vector_blockwise.cu). A NaN or infinity is no
error here: it stays in the codes and shows in the loss.
"""

from __future__ import annotations

import torch

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, BlockFP8
from fp8slurm.fp8.decode import decode, decode_scaled
from fp8slurm.fp8.panels import PANEL_ELEMENTS, NotFinite, buffer, checked, scaled, scales
from fp8slurm.fp8.reference import dequantize_reference, quantize_reference


def _strips(n: int, k: int) -> list[slice]:
    height = max(BLOCK, PANEL_ELEMENTS // max(k, 1) // BLOCK * BLOCK)
    return [slice(r, min(r + height, n)) for r in range(0, n, height)]


def quantize_1x128(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] bf16|fp16|fp32 -> (codes e4m3 [..., K], scale_inv fp32 [..., ceil(K / 128)])."""
    flat = checked(x.reshape(-1, x.shape[-1]), "activation")
    n, k = flat.shape
    groups = -(-k // BLOCK)
    if flat.device.type != "cpu":
        q = quantize_reference(flat, (1, BLOCK), power_of_two)
        return q.data.view(x.shape), q.scale_inv.view(*x.shape[:-1], groups)
    codes = torch.empty(n, k, dtype=E4M3)
    scale_inv = torch.empty(n, groups)
    try:
        for strip in _strips(n, k):
            scale = scales(flat[strip], rows=False, columns=True, power_of_two=power_of_two)
            codes[strip].copy_(scaled(flat[strip], scale))
            scale_inv[strip] = scale.reciprocal()
    except NotFinite:
        q = quantize_reference(flat, (1, BLOCK), power_of_two)
        codes, scale_inv = q.data, q.scale_inv
    return codes.view(x.shape), scale_inv.view(*x.shape[:-1], groups)


def dequantize_1x128(codes: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes [..., K], scale_inv [..., ceil(K / 128)] -> code * scale_inv in fp32, cast to `dtype` [..., K]."""
    spread = scale_inv.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]
    return decode(codes).mul_(spread).to(dtype)


def _fake(x: torch.Tensor, rows: bool, power_of_two: bool) -> torch.Tensor:
    flat = checked(x.reshape(-1, x.shape[-1]), "activation")
    block = (BLOCK, 1) if rows else (1, BLOCK)
    if flat.device.type != "cpu":
        return dequantize_reference(quantize_reference(flat, block, power_of_two)).view(x.shape)
    out = torch.empty(flat.shape)
    try:
        for strip in _strips(*flat.shape):
            part = flat[strip]
            scale = scales(part, rows=rows, columns=not rows, power_of_two=power_of_two)
            codes = buffer("codes", E4M3, *part.shape).copy_(scaled(part, scale))
            decode_scaled(codes, scale.reciprocal(), out[strip])
    except NotFinite:
        q: BlockFP8 = quantize_reference(flat, block, power_of_two)
        out = dequantize_reference(q)
    return out.view(x.shape)


def fake_quantize_1x128(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """[..., K] -> fp32 [..., K]: what 1x128 codes and scales stand for (row-wise copy), to the bit."""
    return _fake(x, rows=False, power_of_two=power_of_two)


def fake_quantize_128x1(x: torch.Tensor, power_of_two: bool = False) -> torch.Tensor:
    """[..., K] -> fp32 [..., K]: quantized along the rows, all leading axes as one (column-wise copy), to the bit."""
    return _fake(x, rows=True, power_of_two=power_of_two)
