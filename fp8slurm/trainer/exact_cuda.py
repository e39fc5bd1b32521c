"""The kernels of a layer that says the engine's bits, on a Hopper GPU (trainer/exact_layer.py calls them).

Forward, they are the engine's own: SGLang's norms and SwiGLU, FlashAttention 3 without splits, DeepGEMM's block FP8
products, and TransformerEngine's activation quantizer, whose formula the engine is given for such runs
(engine/inside/exact.py). Each gives a row the same bits whatever the rows beside it, which is why a packed forward can
repeat what was decoded token by token. The fused rope and the output layer are Megatron's: their bits are the engine's
already (docs/exact.md).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3
from fp8slurm.fp8.quantize import quantize
from fp8slurm.fp8.triton_activations import quantize_rows
from fp8slurm.trainer.exact_layer import added
from fp8slurm.trainer.norm_backward import norm_backward as norm_backward

Tensor = torch.Tensor


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Kernels.norm: what SGLang's RMSNorm calls for the first layer's input."""
    from sgl_kernel import rmsnorm

    return rmsnorm(x, weight, eps)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Kernels.add_norm: what it calls for all others, in place."""
    from sgl_kernel import fused_add_rmsnorm

    total = residual.clone()
    fused_add_rmsnorm(x, total, weight, eps)
    return x, total


def norm_heads(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """Kernels.norm_heads: what its Qwen3 calls before the rotary embedding."""
    from sglang.kernels.ops.layernorm.norm import fused_inplace_qknorm

    fused_inplace_qknorm(q, k, q_weight, k_weight, eps)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
    """Kernels.attention; kept is the logarithm of every softmax's sum, fp32 [heads, T]."""
    from sgl_kernel.flash_attn import flash_attn_varlen_func

    out, sums, *_ = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True, num_splits=1,
        return_softmax_lse=True,
    )  # fmt: skip
    return out, sums


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor, cu_seqlens: Tensor, longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Kernels.attention_backward: cuDNN's, from FlashAttention 3's output and sums; SGLang ships its forward only.

    Not cuDNN's "deterministic" algorithm, which asks for hundreds of GiB here (cuDNN 9.24); repetitions of this one
    gave the same bits (docs/exact.md).
    """
    from transformer_engine.pytorch.cpp_extensions.fused_attn import FusedAttnBackend, fused_attn_bwd

    sums = kept.t().unsqueeze(-1).contiguous()  # [T, heads, 1], as cuDNN keeps them
    generator = torch.zeros(2, dtype=torch.int64, device=q.device)  # of a dropout that there is none of
    dq, dk, dv, *_ = fused_attn_bwd(
        longest, longest, cu_seqlens, cu_seqlens, q, k, v, out, grad, q.dtype, [sums, generator],
        FusedAttnBackend["F16_arbitrary_seqlen"], cu_seqlens, cu_seqlens, attn_scale=scale, qkv_layout="thd_thd_thd",
        o_format="thd", do_format="thd", dqkv_layout="thd_thd_thd", attn_mask_type="padding_causal",
        window_size=(-1, 0),
    )  # fmt: skip
    return dq, dk, dv


def swiglu(x: Tensor) -> Tensor:
    """Kernels.swiglu: SGLang's, which takes another exponential than Megatron's."""
    from sglang.kernels.ops.activation.activation import silu_and_mul

    return silu_and_mul(x)


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Kernels.swiglu_backward: Megatron's."""
    from megatron.core.fusions.fused_bias_swiglu import swiglu_back

    return swiglu_back(grad, x)


class QuantizedWeight:
    """The codes of a weight [N, K], with which forward and data gradient multiply."""

    def __init__(self, weight: Tensor) -> None:
        q = quantize(weight.detach())
        self.forward: tuple[Tensor, Tensor] = q.data, q.scale_inv
        self._transposed: tuple[Tensor, Tensor] | None = None

    @property
    def transposed(self) -> tuple[Tensor, Tensor]:
        """Codes [K, N] and scales of the transpose: a block of 128x128 has one scale either way."""
        if self._transposed is None:
            codes, scale_inv = self.forward
            self._transposed = codes.view(torch.uint8).t().contiguous().view(E4M3), scale_inv.t().contiguous()
        return self._transposed


class _Product(torch.autograd.Function):
    """y [T, N] = x [T, K] . W [N, K]^T in block FP8; T, N and K are multiples of 128.

    forward and dgrad by DeepGEMM, wgrad by cuBLAS, which is faster there and adds into Megatron's FP32 gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: torch.nn.Parameter, quantized: QuantizedWeight, needs_backward: bool
    ) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        if needs_backward:
            both = _quantize_both_ways(flat)
            codes, scale_inv = _row_wise(both)
            both.update_usage(rowwise_usage=False)  # wgrad takes the transpose
            ctx.x, ctx.weight, ctx.quantized = both, weight, quantized
        else:
            codes, scale_inv = quantize_rows(flat)
        return _multiply(codes, scale_inv, *quantized.forward).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        both = _quantize_both_ways(grad.reshape(-1, grad.shape[-1]).contiguous())
        dx = _multiply(*_row_wise(both), *ctx.quantized.transposed).view(*grad.shape[:-1], -1)
        x, ctx.x = ctx.x, None
        return dx, _weight_gradient(ctx.weight, x, both) if ctx.needs_input_grad[1] else None, None, None


def _multiply(codes: Tensor, scale_inv: Tensor, w_codes: Tensor, w_scale_inv: Tensor) -> Tensor:
    """bf16 [M, N]: codes [M, K] with scales [M, K / 128], columns contiguous, by w_codes [N, K] in 128x128 blocks."""
    import deep_gemm

    y = torch.empty(codes.shape[0], w_codes.shape[0], dtype=torch.bfloat16, device=codes.device)
    deep_gemm.fp8_gemm_nt((codes, scale_inv), (w_codes, w_scale_inv), y)
    return y


def _quantize_both_ways(x: Tensor) -> Any:
    """TransformerEngine's codes and scales of x [M, K] and of its transpose, in one pass over x."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=True, force_pow_2_scales=False, block_scaling_dim=1
    )
    quantizer.internal = True  # no tensor subclass: nobody but the products sees it
    return quantizer(x)


def _row_wise(q: Any) -> tuple[Tensor, Tensor]:
    """(codes [M, K], scales [M, K / 128], columns contiguous) of TransformerEngine's tensor."""
    codes = q._rowwise_data.view(E4M3)
    return codes, q._rowwise_scale_inv[: codes.shape[1] // BLOCK].t()[: codes.shape[0]]


def _weight_gradient(weight: torch.nn.Parameter, x: Any, grad: Any) -> Tensor:
    """Add grad^T . x to weight.main_grad, of TransformerEngine's tensors; the gradient for autograd."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    out = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if main_grad is None else main_grad
    general_gemm(x, grad, out_dtype=torch.float32, layout="NT", grad=True, out=out, accumulate=True)
    return out.to(weight.dtype) if main_grad is None else added(weight)


class _FP8:
    """Mixin for Megatron's linears: the same parameter, the engine's product.

    The quantized weight is made once and used for every micro-batch until `weights_changed` is called.
    """

    _quantized: QuantizedWeight | None = None

    def weights_changed(self) -> None:
        """Forget the quantized weight; to be called after every change of the parameter."""
        self._quantized = None

    def _forward_impl(self, input: Tensor, weight: torch.nn.Parameter, bias: Tensor | None = None, **_: Any) -> Tensor:
        assert bias is None
        if self._quantized is None:
            self._quantized = QuantizedWeight(weight)
        return _Product.apply(input, weight, self._quantized, torch.is_grad_enabled())


class FP8ColumnParallelLinear(_FP8, ColumnParallelLinear):
    """linear_qkv and linear_fc1."""


class FP8RowParallelLinear(_FP8, RowParallelLinear):
    """linear_proj and linear_fc2."""


column_parallel_linear, row_parallel_linear = FP8ColumnParallelLinear, FP8RowParallelLinear


def prepare() -> None:
    """Before the first layer is built: refuse a machine without these kernels, and have DeepGEMM keep what it compiles
    where SGLang has it kept. InputError names what is missing."""
    missing = [name for name in ("sglang", "sgl_kernel", "deep_gemm") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--model.exact: the trainer computes with the engine's kernels, and {', '.join(missing)} cannot be "
            f"imported here; allowed: SGLang installed beside the trainer (docs/install.md), or --model.no-exact"
        )
    capability = torch.cuda.get_device_capability()
    if capability[0] != 9:
        raise InputError(
            f"--model.exact on a GPU of compute capability {capability[0]}.{capability[1]}: FlashAttention 3 and these "
            f"block FP8 products are Hopper's; allowed: 9.0, or --model.no-exact"
        )
    from sglang.srt.environ import envs

    os.environ.setdefault("DG_JIT_CACHE_DIR", envs.SGLANG_DG_CACHE_DIR.get())
