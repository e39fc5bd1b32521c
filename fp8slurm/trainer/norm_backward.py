"""The backward pass of RMSNorm on CUDA, for norms whose forward is the engine's (trainer/exact_layer.py).

One kernel for hidden states and for heads inside a fused matrix. Programs take equal runs of rows and sum their share
of the weight's gradient in that order, so a repetition gives the same bits. Imported only where CUDA tensors are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
"""Elements of a tile: as many rows of a narrow norm as fit."""
PROGRAMS = 512


@triton.jit
def _backward(
    grad_ptr, x_ptr, weight_ptr, more_ptr, out_ptr, grad_weight_ptr, rows, tiles, heads, per_group, more_row, x_token,
    x_group, out_token, out_group, eps, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    real = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0) * tiles + tile) * HEIGHT + tl.arange(0, HEIGHT)
        inside = (row < rows)[:, None] & real[None, :]
        token, head = (row // heads).to(tl.int64), row % heads
        group, within = head // per_group, (head % per_group) * WIDTH
        x_at = (token * x_token + group * x_group + within)[:, None] + columns[None, :]
        x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(tl.float32)
        flat = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        grad = tl.load(grad_ptr + flat, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
        normed = x * factor[:, None]
        scaled = grad * weight[None, :]
        share = tl.sum(scaled * normed, axis=1) / WIDTH
        out = (scaled - normed * share[:, None]) * factor[:, None]
        if MORE:
            more_at = row.to(tl.int64)[:, None] * more_row + columns[None, :]
            out += tl.load(more_ptr + more_at, mask=inside, other=0.0).to(tl.float32)
        out_at = (token * out_token + group * out_group + within)[:, None] + columns[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=inside)
        grad_weight += tl.sum(grad * normed, axis=0)
    tl.store(grad_weight_ptr + tl.program_id(0) * WIDTH + columns, grad_weight, mask=real)


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor,
    more: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Fill `out` with the gradient of x under y = weight * x / sqrt(mean(x^2) + eps), and return the weight's.

    x and out are [T, groups, per_group, W] views with any strides for the first two axes (hidden states: [T, 1, 1, W]);
    grad is contiguous with as many elements; `more` [rows, W], which is added to x's gradient, has contiguous rows;
    weight [W]. Returns fp32 [W]. With n = x / sqrt(mean(x^2) + eps) and g = grad * weight:
    dx = (g - n * mean(g n)) / sqrt(mean(x^2) + eps), and dweight = sum of grad * n over the rows.
    """
    tokens, groups, per_group, width = x.shape
    assert x.stride()[2:] == out.stride()[2:] == (width, 1) and x.shape == out.shape, (x.stride(), out.stride())
    assert grad.is_contiguous() and (more is None or more.stride(-1) == 1)
    rows, columns = tokens * groups * per_group, triton.next_power_of_2(width)
    height = max(1, TILE // columns)
    programs = min(PROGRAMS, triton.cdiv(rows, height))
    tiles = triton.cdiv(rows, programs * height)
    grad_weight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward[(programs,)](
        grad, x, weight, grad if more is None else more, out, grad_weight, rows, tiles, groups * per_group, per_group,
        0 if more is None else more.stride(0), x.stride(0), x.stride(1), out.stride(0), out.stride(1), eps,
        WIDTH=width, COLUMNS=columns, HEIGHT=height, MORE=more is not None, num_warps=8,
    )  # fmt: skip
    return grad_weight.sum(0)
