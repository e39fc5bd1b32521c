"""What the trainer's tests share: tiny models, packs, and transformers as the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fp8slurm.config.schema import RunConfig
from fp8slurm.core.types import PackedBatch

SIZES = {
    "vocab_size": 192, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 128, "intermediate_size": 512, "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
    "hidden_act": "silu", "attention_bias": False, "rope_theta": 1000000.0,
}  # fmt: skip
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 512}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
YARN = {
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}
"""As Qwen3's own pages have it for 131,072 positions."""
SHORT_YARN = {"rope_scaling": YARN["rope_scaling"] | {"original_max_position_embeddings": 16}}  # type: ignore[operator]
"""One that short packs go beyond."""
NARROW = {"intermediate_size": 192}
"""A model whose FFN cuts a block."""
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip

LENGTHS = ([13, 27, 20], [5, 41, 2], [30, 30], [1, 64, 3, 3])
"""Segments of the four packs that the scenarios train on."""
LR = 1e-3
AUX_LOSS = 0.3
"""Coefficient of the load-balancing loss where it is tested: large, so that it shows in the gradient."""


def write_model(path: Path, seed: int = 0, tie: bool = True, moe: bool = False, **changes: Any) -> Path:
    """A random model in Hugging Face form, written without transformers; norms are not 1, so that a mix-up shows."""
    from safetensors.torch import save_file

    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec

    config: dict[str, Any] = dict(SIZES) | {"tie_word_embeddings": tie, "torch_dtype": "float32"}
    config |= {"architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"]}
    config |= {"model_type": "qwen3_moe" if moe else "qwen3"} | (MOE if moe else {}) | changes
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, t in NameTable(ModelSpec.from_hf_config(config)).hf_tensors().items():
        x = torch.randn(t.shape, generator=g)
        tensors[name] = 1 + 0.1 * x if "norm" in name else x * (0.3 if name.endswith("gate.weight") else 0.05)
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


def routing(batch: PackedBatch) -> torch.Tensor:
    """Experts for every token and layer of a pack, uint8 [T, layers, k]: random, but the same for the same tokens."""
    g = torch.Generator().manual_seed(int(batch.tokens[: batch.cu_seqlens[1]].sum()))
    order = torch.rand(256, SIZES["num_hidden_layers"], MOE["num_experts"], generator=g).argsort(-1)
    return order[: len(batch.tokens), :, : MOE["num_experts_per_tok"]].to(torch.uint8)


def fuse_experts(source: Path, path: Path) -> Path:
    """A copy of a folder with its experts in transformers 5's form: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    from safetensors.torch import load_file, save_file

    path.mkdir()
    (path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    out = {n: t for n, t in tensors.items() if ".experts." not in n}
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        each = [[tensors[f"{prefix}{e}.{x}_proj.weight"] for x in ("gate", "up", "down")] for e in range(4)]
        out[prefix + "gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        out[prefix + "down_proj"] = torch.stack([down for _, _, down in each])
    save_file(out, path / "model.safetensors", metadata={"format": "pt"})
    return path


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


def replayed_logprobs(model: Any, batch: PackedBatch) -> torch.Tensor:
    """As reference_logprobs, every token sent to the experts of `routing`, weighted by the model's own logits."""
    chosen, cu, out = routing(batch).long(), batch.cu_seqlens.tolist(), []
    forwards = []
    for i, layer in enumerate(model.model.layers):
        gate = layer.mlp.gate
        forwards.append(gate.forward)

        def forward(x: torch.Tensor, gate: Any = gate, i: int = i) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits, here = F.linear(x, gate.weight), chosen[start:end, i]
            weights = logits.softmax(-1).gather(1, here)
            return logits, weights / weights.sum(-1, keepdim=True), here

        gate.forward = forward
    for start, end in zip(cu, cu[1:]):
        logits = model(batch.tokens[None, start:end]).logits[0]
        out.append(F.log_softmax(logits, -1).gather(1, batch.labels[start:end, None]).squeeze(1))
    for layer, forward in zip(model.model.layers, forwards):
        layer.mlp.gate.forward = forward
    return torch.cat(out)


def load_balancing_loss(model: Any, step: list[PackedBatch]) -> torch.Tensor:
    """Switch Transformer's loss (eq. 4, without its coefficient), sum over layers, mean over the packs' tokens."""
    total, tokens = torch.zeros(()), sum(len(b.tokens) for b in step)
    for batch in step:
        cu = batch.cu_seqlens.tolist()
        segments = [model(batch.tokens[None, s:e], output_router_logits=True).router_logits for s, e in zip(cu, cu[1:])]
        for logits in (torch.cat(layer) for layer in zip(*segments)):
            p = logits.softmax(-1)
            share = F.one_hot(logits.topk(2).indices, 4).sum((0, 1)) / (2 * len(logits))
            total = total + 4 * (share * p.mean(0)).sum() * len(batch.tokens) / tokens
    return total


def with_ends_repeated(batch: PackedBatch, multiple: int) -> PackedBatch:
    """Tokens and segments of a pack whose segments are padded to a multiple by repeats of their last tokens: what the
    experts see of it with context parallelism. Everything else is as it was."""
    cu, tokens = batch.cu_seqlens.tolist(), []
    for s, e in zip(cu, cu[1:]):
        tokens.append(torch.cat([batch.tokens[s:e], batch.tokens[e - 1].expand(-(e - s) % multiple)]))
    segments = torch.tensor([0, *map(len, tokens)]).cumsum(0).to(torch.int32)
    return replace(batch, tokens=torch.cat(tokens), cu_seqlens=segments)


def packs(seed: int, pad_multiple: int = 1) -> list[PackedBatch]:
    """The four packs that a step of all data-parallel ranks trains on."""
    return [pack(lengths, 10 * seed + i, pad_multiple) for i, lengths in enumerate(LENGTHS)]


Logprobs = Callable[[Any, PackedBatch], torch.Tensor]


def expected_training(
    folder: Path,
    logprobs: Logprobs = reference_logprobs,
    further_loss: Callable[..., Any] | None = None,
    steps: int = 3,
) -> dict[str, Any]:
    """What the scenarios' `train` has to return for a model, by transformers and torch.optim.AdamW.

    `further_loss`(model, number of the step) is added to what is differentiated, not to what is reported.
    """
    model = transformers_model(folder)
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        before = [logprobs(model, b) for b in packs(0)]
    history = []
    for seed in range(steps):
        adam.zero_grad()
        loss = sum(cross_entropy(logprobs(model, b), None, b)[0] for b in packs(seed))
        (loss + (further_loss(model, seed) if further_loss else 0.0)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        history.append([loss.item(), float(norm), float(sum(b.loss_mask.sum() for b in packs(seed)))])
    with torch.no_grad():
        after = [logprobs(model, b) for b in packs(0)]
    return {"before": before, "steps": history, "after": after}


def check(got: dict[str, Any], wanted: dict[str, Any], share: slice = slice(None), after: float = 2e-4) -> None:
    """Log-probabilities and first loss within 1e-5, and `after` three steps within what AdamW makes of that: its first
    steps are as large for a gradient that is next to nothing, whose sign is a matter of rounding."""
    for mine, theirs in zip(got["before"], wanted["before"][share], strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs, atol=1e-5, rtol=0)
    for mine, alone in zip(got["first"], got["before"], strict=True):
        assert torch.equal(mine, alone), "the step's own forward is the separate one to the bit"
    assert abs(got["steps"][0][0] - wanted["steps"][0][0]) < 1e-5
    assert got["steps"][0][1] == pytest.approx(wanted["steps"][0][1], rel=1e-5)
    for mine, theirs in zip(got["steps"], wanted["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)
    for mine, theirs in zip(got["after"], wanted["after"][share], strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs, atol=after, rtol=0)


def check_continued(got: dict[str, Any], wanted: dict[str, Any], share: slice = slice(None)) -> None:
    """Two steps after a checkpoint in another layout: the same steps, from the same optimizer state."""
    assert {entry[0] for entry in got["adam"]} == {4.0}
    for mine, theirs in zip(got["steps"], wanted["steps"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    for mine, theirs in zip(got["after"], wanted["after"][share], strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs[: len(mine)], atol=2e-4, rtol=0)
