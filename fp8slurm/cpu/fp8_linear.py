"""Megatron's parallel linears with TransformerEngine's blockwise FP8 emulated: quantized values, multiplied in fp32.

Which copy each of the three products uses (TransformerEngine, pytorch/module/linear.py with Float8BlockScaling):

    forward  y  = x  . W^T    x in 1x128 groups along its rows, W in 128x128 blocks
    dgrad    dx = dy . W      dy in 1x128 groups along its rows, W as in the forward
    wgrad    dW = dy^T . x    dy and x in 128x1 groups along the tokens, both from the high-precision tensor

A real FP8 GEMM accumulates scaled products in fp32 and casts once; so does this one. Tensor parallelism is Megatron's:
gathered input, summed or scattered gradients, all in high precision, so that a rank sees the values of one rank alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.distributed import ProcessGroup

from fp8slurm.cpu.primary_fp8 import PrimaryFP8
from fp8slurm.fp8.quantize import dequantize, fake_quantize_1x128, fake_quantize_128x1, fake_quantize_block


class FP8Matmul(torch.autograd.Function):
    """y [T, N] = x [T, K] . W [N, K]^T in emulated blockwise FP8, in the dtype of x.

    `quantized` [N, K] in FP32 is what the forward multiplies with, `for_dgrad` what the data gradient does: the same
    values. `group` is the tensor-parallel group of a column-parallel linear and None otherwise. With
    `sequence_parallel` x is this rank's [T / size, K] and is gathered; its gradient is scattered. Without, it is summed
    over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        quantized: torch.Tensor,
        for_dgrad: torch.Tensor,
        group: ProcessGroup | None,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        ctx.group, ctx.sequence_parallel, ctx.weight, ctx.quantized = group, sequence_parallel, weight, for_dgrad
        ctx.save_for_backward(x)
        whole = gather_sequence(x, group) if sequence_parallel else x
        flat = whole.reshape(-1, whole.shape[-1])
        y = fake_quantize_1x128(flat) @ quantized.t()
        return y.to(x.dtype).view(*whole.shape[:-1], quantized.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        dx = (fake_quantize_1x128(flat_grad) @ ctx.quantized).to(x.dtype)
        if ctx.sequence_parallel:
            dx = scatter_sequence(dx.view(*grad.shape[:-1], -1), ctx.group)
        else:
            dx = dx.view(x.shape)
            if ctx.group is not None:
                torch.distributed.all_reduce(dx, group=ctx.group)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        whole = gather_sequence(x, ctx.group) if ctx.sequence_parallel else x
        flat = whole.reshape(-1, whole.shape[-1])
        dw = fake_quantize_128x1(flat_grad).t() @ fake_quantize_128x1(flat)
        return dx, _accumulate(ctx.weight, dw), None, None, None, None


def _accumulate(weight: torch.Tensor, dw: torch.Tensor) -> torch.Tensor:
    """Add dw (fp32) to Megatron's gradient buffer as the fused GEMM does, without a detour through weight.dtype.

    Returns the gradient for autograd: a placeholder that Megatron's hook ignores, or dw itself outside its DDP.
    """
    if not hasattr(weight, "main_grad"):
        return dw.to(weight.dtype)
    weight.main_grad.add_(dw)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty(1, dtype=weight.dtype).expand(weight.shape)


def gather_sequence(x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
    """The parts [T / size, ...] of all ranks of the group, [T, ...]."""
    assert group is not None, "sequence parallelism without a group"
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    torch.distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def scatter_sequence(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """This rank's part [T / size, ...] of the sum of all ranks' [T, ...]."""
    part = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    torch.distributed.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


class _EmulatedFP8:
    """Mixin for Megatron's linears: the same parameter, the product in emulated FP8.

    The quantized weight (fp32) is made once and used for every micro-batch until `weights_changed` is called.
    """

    _quantized: tuple[torch.Tensor, torch.Tensor] | None = None

    def weights_changed(self) -> None:
        """Forget the quantized weight; to be called after every change of the parameter."""
        self._quantized = None

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        allreduce_dgrad: bool = False,
        sequence_parallel: bool = False,
        tp_group: ProcessGroup | None = None,
        **megatron: Any,
    ) -> torch.Tensor:
        assert not megatron.get("gradient_accumulation_fusion")
        if self._quantized is None:
            if isinstance(weight, PrimaryFP8):
                values = dequantize(weight.block_fp8())
                self._quantized = values, weight.for_data_gradient() if weight.requires_grad else values
            else:
                self._quantized = (fake_quantize_block(weight, name=type(self).__name__),) * 2
        group = tp_group if allreduce_dgrad or sequence_parallel else None
        y = FP8Matmul.apply(input, weight, *self._quantized, group, sequence_parallel)
        return y if bias is None else y + bias


class FP8ColumnParallelLinear(_EmulatedFP8, ColumnParallelLinear):
    """Column-parallel linear (linear_qkv, linear_fc1) in emulated FP8."""


class FP8RowParallelLinear(_EmulatedFP8, RowParallelLinear):
    """Row-parallel linear (linear_proj, linear_fc2) in emulated FP8."""
