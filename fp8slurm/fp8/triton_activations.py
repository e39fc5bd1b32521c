"""The activation quantizer on CUDA, one scale for 128 neighbours along a row, in TransformerEngine's formula.

    scale = 448 / amax (1 where amax is 0 or not finite), scale_inv = 1 / scale, code = e4m3(x * scale)

both divisions rounded to nearest, as in transformer_engine/common/transpose/quantize_transpose_vector_blockwise.cu
with epsilon 0. The codes and scales are those of TransformerEngine and of fp8/reference.py to the bit; SGLang's own
kernel multiplies by a rounded 1/448 and divides approximately, and so differs in the last bits of more than half of all
scales. Imported only where a CUDA tensor is quantized."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, E4M3_MAX

ROWS = 16
"""Rows of a program: with more the GPU is idle at the batch sizes of a decoder."""


@triton.jit
def _quantize_rows(
    x_ptr, codes_ptr, scale_inv_ptr, m, k, scale_stride, LARGEST: tl.constexpr, E4M3_LARGEST: tl.constexpr,
    EDGE: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    rows = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    columns = group * EDGE + tl.arange(0, EDGE)
    at = rows.to(tl.int64)[:, None] * k + columns[None, :]
    inside = (rows < m)[:, None]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # magnitudes order like their bits, NaN above infinity: one integer maximum finds amax and what is not finite
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.full(amax.shape, E4M3_LARGEST, tl.float32), amax)
    scale = tl.where(scale == float("inf"), LARGEST, scale)
    scale = tl.where((amax_bits == 0) | (amax_bits >= 0x7F800000), 1.0, scale)
    tl.store(codes_ptr + at, (x * scale[:, None]).to(tl.float8e4nv), mask=inside)
    scale_inv = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    tl.store(scale_inv_ptr + group.to(tl.int64) * scale_stride + rows, scale_inv, mask=rows < m)


def empty_outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `quantize_into` fills for x [M, K]: codes e4m3 [M, K], scale_inv fp32 [M, K / 128].

    The scales lie column by column, each column on 16 bytes: DeepGEMM reads them so.
    """
    m, k = x.shape
    columns = torch.empty(k // BLOCK, -(-m // 4) * 4, dtype=torch.float32, device=x.device)
    return torch.empty(m, k, dtype=E4M3, device=x.device), columns.t()[:m]


def quantize_into(x: torch.Tensor, codes: torch.Tensor, scale_inv: torch.Tensor) -> None:
    """Quantize x [M, K], contiguous bf16|fp16|fp32, K a multiple of 128, into tensors as `empty_outputs` makes them."""
    m, k = x.shape
    assert x.is_contiguous() and codes.is_contiguous() and scale_inv.stride(0) == 1 and k % BLOCK == 0
    if m:
        _quantize_rows[(triton.cdiv(m, ROWS), k // BLOCK)](
            x, codes, scale_inv, m, k, scale_inv.stride(1), LARGEST=torch.finfo(x.dtype).max, E4M3_LARGEST=E4M3_MAX,
            EDGE=BLOCK, HEIGHT=ROWS, num_warps=4,
        )  # fmt: skip


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_into` of new tensors: (codes, scale_inv)."""
    codes, scale_inv = empty_outputs(x)
    quantize_into(x, codes, scale_inv)
    return codes, scale_inv
