"""What the trainer's tests share: tiny models, packs, and transformers as the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fp8slurm.config.schema import RunConfig
from fp8slurm.rl.types import PackedBatch

SIZES = {
    "vocab_size": 192, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "intermediate_size": 512, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
    "hidden_act": "silu", "attention_bias": False, "rope_theta": 1000000.0,
}  # fmt: skip
NARROW = {"intermediate_size": 192}
"""A model whose FFN cuts a block."""
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

LENGTHS = ([13, 27, 20], [5, 41, 2], [30, 30], [1, 64, 3, 3])
"""Segments of the four packs that the scenarios train on."""


def write_model(path: Path, seed: int = 0, tie: bool = True, moe: bool = False, **changes: Any) -> Path:
    """A random Qwen3 in Hugging Face form, written without transformers; norms are not 1, so that a mix-up shows."""
    from safetensors.torch import save_file

    from fp8slurm.models.names import NameTable
    from fp8slurm.models.qwen3 import ModelSpec

    config: dict[str, Any] = dict(SIZES) | {"tie_word_embeddings": tie, "torch_dtype": "float32"}
    config |= {"architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"]}
    config |= {"model_type": "qwen3_moe" if moe else "qwen3"} | (MOE if moe else {}) | changes
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, t in NameTable(ModelSpec.from_hf_config(config)).hf_tensors().items():
        x = torch.randn(t.shape, generator=g)
        tensors[name] = (1 + 0.1 * x if "norm" in name else x * (0.3 if name.endswith("gate.weight") else 0.05))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def pack(lengths: list[int], seed: int, pad_multiple: int = 1, vocab: int = SIZES["vocab_size"]) -> PackedBatch:
    """Random segments of these lengths; the loss weights are 0.01 at every position but the segments' last."""
    g = torch.Generator().manual_seed(seed)
    pad = -sum(lengths) % pad_multiple
    tokens, labels, positions, weights = [], [], [], []
    for n in lengths + ([pad] if pad else []):
        ids = torch.randint(0, vocab, (n,), generator=g)
        tokens.append(ids)
        labels.append(torch.cat([ids[1:], torch.zeros(1, dtype=torch.int64)]))
        positions.append(torch.arange(n))
        weights.append(torch.full((n,), 0.01))
        weights[-1][-1] = 0.0
    if pad:
        weights[-1].zero_()
    segments = torch.tensor([0, *[len(t) for t in tokens]]).cumsum(0).to(torch.int32)
    total = int(segments[-1])
    w = torch.cat(weights)
    return PackedBatch(
        tokens=torch.cat(tokens), labels=torch.cat(labels), position_ids=torch.cat(positions), cu_seqlens=segments,
        loss_weights=w, rollout_logprobs=torch.zeros(total), advantages=torch.zeros(total), loss_mask=w > 0,
    )  # fmt: skip


def run_config(**sections: dict[str, Any]) -> RunConfig:
    """fp32, no FP8, AdamW without decay, unless `sections` says otherwise."""
    base: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32"},
        "fp8": {"backend": "off"},
        "optim": {"lr": 1e-3, "beta2": 0.95},
        "run": {"seed": 1},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return RunConfig.model_validate(base)


def cross_entropy(logprobs: torch.Tensor, entropy: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict]:
    """The weighted sum of -logprob; the metric counts the tokens that count."""
    return -(logprobs * batch.loss_weights).sum(), {"tokens": batch.loss_mask.sum()}


def transformers_model(path: Path) -> Any:
    """The same folder in transformers, fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logprobs(model: Any, batch: PackedBatch) -> torch.Tensor:
    """transformers' log-probabilities of the labels, one segment at a time (fp32 [T], with grad)."""
    out = []
    cu = batch.cu_seqlens.tolist()
    for start, end in zip(cu, cu[1:]):
        logits = model(batch.tokens[None, start:end]).logits[0]
        out.append(F.log_softmax(logits.float(), -1).gather(1, batch.labels[start:end, None]).squeeze(1))
    return torch.cat(out)
