"""Small random folders for the converters' tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 192, "hidden_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 512, "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "hidden_act": "silu",
    "attention_bias": False, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 512}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_scaling": {"rope_type": "llama3", **SCALING},
}
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 256, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def config(tie: bool = True, moe: bool = False, layers: int = 2, **more: Any) -> dict[str, Any]:
    """A config.json of a tiny model."""
    return CONFIG | (MOE if moe else {}) | {"tie_word_embeddings": tie, "num_hidden_layers": layers} | more


def tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random tensors by HF name; norms are not 1, so that a mix-up shows."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, t in NameTable(ModelSpec.from_hf_config(config)).hf_tensors().items():
        x = torch.randn(t.shape, generator=g)
        made[name] = (1 + 0.1 * x if "norm" in name else x * 0.05).to(dtype)
    return made


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], files: int = 1) -> Path:
    """Write an HF folder in `files` shards, with an index if there are several, and a few companion files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(weights)
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        part = {n: weights[n] for n in names[i::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(
    folder: Path, tie: bool = True, moe: bool = False, seed: int = 0, files: int = 1, layers: int = 2, **more: Any
) -> Path:
    """A whole tiny folder. more: what its config.json has otherwise, such as QWEN2's."""
    c = config(tie, moe, layers, **more)
    return write(folder, c, tensors(c, seed), files)


def make_fp8(base: Path, **kind: Any) -> tuple[Path, Path]:
    """(BF16 folder, block FP8 folder made from it by the converter) of a tiny model under `base`; for tests that need
    an FP8 checkpoint as users have it, such as loading it in an engine."""
    from fp8slurm.checkpoint import hf_to_fp8

    bf16 = make(base / "bf16", **kind)
    hf_to_fp8(bf16, base / "fp8")
    return bf16, base / "fp8"
