"""The kernels of grouped experts on a Hopper GPU: DeepGEMM's grouped products and our quantizers.

`m_grouped` products (forward and data gradient) are those that SGLang runs its own experts with; `k_grouped` ones add
into FP32 matrices in place. DeepGEMM compiles each for its shape when it is first called, with nvcc (trainer/grouped.py
calls these functions)."""

from __future__ import annotations

import importlib.util
import os

import torch

from fp8slurm.core.errors import InputError
from fp8slurm.fp8 import BLOCK, triton_grouped
from fp8slurm.trainer.grouped import Groups, Pair, QuantizedWeights

Tensor = torch.Tensor


def quantize_weights(weights: list[Tensor]) -> QuantizedWeights:
    """Kernels.quantize_weights."""
    return QuantizedWeights(*triton_grouped.quantize_weights(weights))


def quantize(x: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
    """Kernels.quantize."""
    return triton_grouped.quantize(x, groups.table, columns)


def swiglu(x: Tensor, probs: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
    """Kernels.swiglu."""
    return triton_grouped.swiglu(x, probs, groups.table, columns)


def swiglu_backward(grad: Tensor, x: Tensor, probs: Tensor, groups: Groups) -> tuple[Pair, Pair, Tensor]:
    """Kernels.swiglu_backward."""
    return triton_grouped.swiglu_backward(grad, x, probs, groups.table)


def multiply(rows: Pair, weights: Pair, groups: Groups) -> Tensor:
    """Kernels.multiply."""
    import deep_gemm

    y = torch.empty(len(rows[0]), weights[0].shape[1], dtype=torch.bfloat16, device=rows[0].device)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(rows, weights, y, groups.expert)
    return y


def add_weight_gradient(grad: Pair, x: Pair, into: Tensor, groups: Groups) -> None:
    """Kernels.add_weight_gradient."""
    import deep_gemm

    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(grad, x, into, groups.padded, groups.padded_on_device, c=into)


def unpad(x: Tensor, groups: Groups) -> Tensor:
    """Kernels.unpad."""
    return triton_grouped.unpad(x, groups.table, groups.rows)


def prepare() -> None:
    """Before the first layer is built: refuse a machine without these kernels, and have DeepGEMM keep what it compiles
    where SGLang has it kept. InputError names what is missing."""
    instead = "or --fp8.grouped transformer_engine"
    missing = [name for name in ("sglang", "deep_gemm") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--fp8.grouped deep_gemm: {' and '.join(missing)} cannot be imported here; allowed: SGLang installed "
            f"beside the trainer (docs/install.md), {instead}"
        )
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        raise InputError(
            f"--fp8.grouped deep_gemm on a GPU of compute capability {capability[0]}.{capability[1]}: these products "
            f"are Hopper's; allowed: 9.0, {instead}"
        )
    from sglang.srt.environ import envs

    os.environ.setdefault("DG_JIT_CACHE_DIR", envs.SGLANG_DG_CACHE_DIR.get())
    import deep_gemm

    alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
    if BLOCK % alignment:
        raise InputError(
            f"--fp8.grouped deep_gemm: DeepGEMM {deep_gemm.__version__} wants rows of an expert in multiples of "
            f"{alignment}, here they are padded to {BLOCK}; allowed: the one of requirements/gpu.txt, {instead}"
        )
