"""Qwen3, dense: RMSNorm over every head of q and k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8slurm.models.config_json import ConfigJson
from fp8slurm.models.entries import Entry, attention, dense_ffn
from fp8slurm.models.families.family import Family

if TYPE_CHECKING:
    from fp8slurm.models.spec import ModelSpec


def _read(c: ConfigJson) -> dict[str, Any]:
    c.only("attention_bias", False)
    c.only("use_sliding_window", False)
    return c.decoder(max_positions=32768, rope=("default", "yarn")) | {
        "num_kv_heads": c.size("num_key_value_heads", 32, null=c.size("num_attention_heads")),
        "head_dim": c.size("head_dim", 128),
    }


def _layer(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    yield from attention(spec, layer, qk_norm=True)
    yield from dense_ffn(spec, layer)


def _megatron(spec: ModelSpec) -> dict[str, Any]:
    return {"qk_layernorm": True, "add_qkv_bias": False}


QWEN3 = Family("Qwen3ForCausalLM", "qwen3", "sglang.srt.models.qwen3", _read, _layer, _megatron)
