"""Qwen2 and Qwen2.5, dense: a bias on q, k and v, no norm over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8slurm.models.config_json import ConfigJson
from fp8slurm.models.entries import Entry, attention, dense_ffn
from fp8slurm.models.families.family import Family

if TYPE_CHECKING:
    from fp8slurm.models.spec import ModelSpec


def _read(c: ConfigJson) -> dict[str, Any]:
    c.only("use_sliding_window", False)
    # SGLang would take the head's size, or another attention, from these
    c.only("original_num_attention_heads", None)
    c.only("dual_chunk_attention_config", None)
    heads = c.size("num_attention_heads")
    head_dim = c.size("hidden_size") // heads
    c.only("head_dim", head_dim)  # another one is not SGLang's (0.5.21) on the CPU
    return c.decoder(max_positions=32768, rope=("default", "yarn")) | {
        "num_kv_heads": c.size("num_key_value_heads", 32, null=heads),
        "head_dim": head_dim,
    }


def _layer(spec: ModelSpec, layer: int) -> Iterator[Entry]:
    yield from attention(spec, layer, bias=True)
    yield from dense_ffn(spec, layer)


def _megatron(spec: ModelSpec) -> dict[str, Any]:
    return {"qk_layernorm": False, "add_qkv_bias": True}


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", "sglang.srt.models.qwen2", _read, _layer, _megatron)
