"""Qwen3, mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8slurm.models.config_json import ConfigJson
from fp8slurm.models.entries import Entry, attention, experts
from fp8slurm.models.families.family import Family

if TYPE_CHECKING:
    from fp8slurm.models.spec import ModelSpec


def _read(c: ConfigJson) -> dict[str, Any]:
    c.only("attention_bias", False)
    c.only("use_sliding_window", False)
    c.only("decoder_sparse_step", 1)
    c.only("mlp_only_layers", None, [])
    names = [key for key in ("num_experts", "num_local_experts") if key in c.fields] or ["num_experts"]
    c.only(names[-1], c.fields.get(names[0]))
    return c.decoder(max_positions=32768, rope=("default", "yarn")) | {
        "num_kv_heads": c.size("num_key_value_heads", 4),
        "head_dim": c.size("head_dim", c.size("hidden_size") // c.size("num_attention_heads")),
        "num_experts": c.size(names[0]),
        "experts_per_token": c.size("num_experts_per_tok"),
        "moe_ffn_hidden_size": c.size("moe_intermediate_size"),
        "norm_topk_prob": c.field("norm_topk_prob", False),
    }


def _layer(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    yield from attention(spec, layer, qk_norm=True)
    yield from experts(spec, layer)


def _megatron(spec: ModelSpec) -> dict[str, Any]:
    return {
        "qk_layernorm": True,
        "add_qkv_bias": False,
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
        "moe_router_score_function": "softmax",
        # Top-k of a softmax over all experts, or a softmax over the top k: the latter is the renormalized one.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
    }


QWEN3_MOE = Family("Qwen3MoeForCausalLM", "qwen3_moe", "sglang.srt.models.qwen3_moe", _read, _layer, _megatron)
