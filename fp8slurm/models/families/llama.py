"""Llama 3.x, dense: rotary frequencies that may be scaled for long contexts (Grattafiori et al. 2024, The Llama 3 Herd
of Models; the formula is Megatron's and transformers' "llama3")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8slurm.core.errors import InputError
from fp8slurm.models.config_json import ConfigJson
from fp8slurm.models.entries import Entry, attention, dense_ffn
from fp8slurm.models.families.family import Family

if TYPE_CHECKING:
    from fp8slurm.models.spec import ModelSpec


def _read(c: ConfigJson) -> dict[str, Any]:
    c.only("attention_bias", False)
    c.only("mlp_bias", False)
    # SGLang would take a bias, the order of rotated pairs, and the scaling's length from these
    c.only("bias", None, False)
    c.only("rope_is_neox_style", None, True)
    c.only("original_max_position_embeddings", None)
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    if hidden % heads:
        raise InputError(f"{c.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    return c.decoder(max_positions=2048, rope=("default", "llama3")) | {
        "num_kv_heads": c.size("num_key_value_heads", heads, null=heads),
        "head_dim": c.size("head_dim", hidden // heads, null=hidden // heads),
    }


def _layer(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    yield from attention(spec, layer)
    yield from dense_ffn(spec, layer)


def _megatron(spec: ModelSpec) -> dict[str, Any]:
    return {"qk_layernorm": False, "add_qkv_bias": False}


LLAMA = Family("LlamaForCausalLM", "llama", "sglang.srt.models.llama", _read, _layer, _megatron)
