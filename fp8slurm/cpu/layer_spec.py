"""The transformer layer that stands in for TransformerEngine's on a CPU: Megatron's own modules, four of them ours."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules, get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer

from fp8slurm.cpu.exact_layers import (
    ExactAttention,
    ExactColumnParallelLinear,
    ExactMoELayer,
    ExactRMSNorm,
    ExactRouter,
    ExactRowParallelLinear,
)
from fp8slurm.cpu.fp8_linear import FP8ColumnParallelLinear, FP8RowParallelLinear
from fp8slurm.cpu.packed_attention import PackedDotProductAttention
from fp8slurm.cpu.rms_norm import RMSNorm


class _Backend(LocalSpecProvider):
    def __init__(self, fp8: bool, exact: bool) -> None:
        assert fp8 or not exact
        self.fp8, self.exact = fp8, exact

    def column_parallel_linear(self) -> type:
        if self.exact:
            return ExactColumnParallelLinear
        return FP8ColumnParallelLinear if self.fp8 else super().column_parallel_linear()

    def row_parallel_linear(self) -> type:
        if self.exact:
            return ExactRowParallelLinear
        return FP8RowParallelLinear if self.fp8 else super().row_parallel_linear()

    def core_attention(self) -> type:
        return ExactAttention if self.exact else PackedDotProductAttention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return ExactRMSNorm if self.exact else RMSNorm

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        fc1, fc2 = self.column_parallel_linear(), self.row_parallel_linear()
        return partial(SequentialMLP, submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2, activation_func=None))


def layer_spec(config: TransformerConfig, fp8: bool, exact: bool = False) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage; `fp8` puts emulated FP8 linears in, `exact` those with the engine's bits."""
    backend = _Backend(fp8, exact)
    norm = backend.layer_norm()
    layer = get_gpt_layer_local_submodules(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.input_layernorm = layer.pre_mlp_layernorm = norm
    attention = layer.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = backend.column_parallel_linear(), backend.row_parallel_linear()
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    attention.core_attention = backend.core_attention()
    layer.mlp = get_mlp_module_spec_for_backend(
        backend=backend, num_experts=config.num_moe_experts, moe_grouped_gemm=False
    )
    if exact and config.num_moe_experts:
        experts = MoESubmodules(experts=backend.grouped_mlp_modules(False), router=ExactRouter)
        layer.mlp = partial(ExactMoELayer, submodules=experts)
    spec = ModuleSpec(module=TransformerLayer, submodules=layer)
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=norm)
