"""A random, tiny checkpoint in Hugging Face form, with its tokenizer: small enough for a CPU, fit for FP8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Raised whenever the same seed gives other bytes, so that an older checkpoint is made anew."""

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, "<think>", "</think>")
VOCAB_SIZE = 320

# Qwen's split: digits come one by one, a line break is never part of a word.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words that become one token, made left to right; the list fills the vocabulary exactly. The order matters: an earlier
# word's pair is merged first in a later word, too.
WORDS = tuple("plus are with user assistant system think answer digits number sum reverse what tens is the".split())

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif -%}"
    "{%- endif -%}"
)

OTHERS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 512,  # always the heads' together
        "tie_word_embeddings": False,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rope_theta": 500000.0,
    },
}
"""What config.json of another family has otherwise than a dense Qwen3's."""


def model_config(moe: bool = False, family: str = "qwen3") -> dict[str, Any]:
    """config.json: hidden 256, 2 layers, 4 heads and 2 key-value heads of 128, so that every fused matrix splits at a
    128-block boundary at TP 1 and 2; feed-forward 512, or 8 experts of 256 with 2 for each token."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 256,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 1024,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB_SIZE,
    }
    if moe:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
            "tie_word_embeddings": False,  # SGLang's Qwen3-MoE ignores tying and leaves lm_head unloaded
        }
    else:
        config["max_window_layers"] = config["num_hidden_layers"]
    return config | OTHERS.get(family, {})


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face names (per expert, where there are any) and shapes of every tensor, in a fixed order."""
    hidden, head = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (q, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv, hidden)
        if config["model_type"] == "qwen2":
            shapes |= {f"{prefix}self_attn.{x}_proj.bias": (n,) for x, n in (("q", q), ("k", kv), ("v", kv))}
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, q)
        if config["model_type"].startswith("qwen3"):
            shapes[prefix + "self_attn.q_norm.weight"] = (head,)
            shapes[prefix + "self_attn.k_norm.weight"] = (head,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if "num_experts" in config:
            shapes[prefix + "mlp.gate.weight"] = (config["num_experts"], hidden)
            mlps = [f"mlp.experts.{e}." for e in range(config["num_experts"])]
            inner = config["moe_intermediate_size"]
        else:
            mlps, inner = ["mlp."], config["intermediate_size"]
        for mlp in mlps:
            shapes[prefix + mlp + "gate_proj.weight"] = (inner, hidden)
            shapes[prefix + mlp + "up_proj.weight"] = (inner, hidden)
            shapes[prefix + mlp + "down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """bf16 tensors: norms 1, everything else normal with standard deviation `initializer_range`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weights[name] = (torch.randn(shape, generator=generator) * config["initializer_range"]).to(torch.bfloat16)
    return weights


def _word_merges() -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for i in range(1, len(word)):
            merges.setdefault((word[:i], word[i]))
    return list(merges)


def tokenizer_json() -> str:
    """tokenizer.json: byte-level BPE with Qwen's split; ids 0-255 are bytes, then special tokens, then words."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in SPECIAL_TOKENS:
        vocab[token] = len(vocab)
    merges = _word_merges()
    for left, right in merges:
        vocab[left + right] = len(vocab)
    assert len(vocab) == VOCAB_SIZE, f"{len(vocab)} tokens, not {VOCAB_SIZE}: change WORDS"
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS[:3]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPECIAL_TOKENS[3:]])
    return str(tokenizer.to_str(pretty=True))


def write_model(folder: Path, seed: int = 0, moe: bool = False, family: str = "qwen3") -> None:
    """Write the whole checkpoint into an existing folder; the same seed gives the same bytes."""
    from safetensors.torch import save_file

    config = model_config(moe, family)
    documents = {
        "config.json": config,
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "do_sample": True,
            "eos_token_id": [config["eos_token_id"], config["pad_token_id"]],
            "pad_token_id": config["pad_token_id"],
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "additional_special_tokens": [IM_START, IM_END],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "model_max_length": config["max_position_embeddings"],
            "pad_token": END_OF_TEXT,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer_json() + "\n", encoding="utf-8")
    save_file(random_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
