"""What a Qwen3 is, dense or mixture of experts: read from a Hugging Face folder, checked against a parallel layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F

BLOCK = 128
"""Edge of a weight's FP8 block."""

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def _only(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{where}: {key} = {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def _size(where: str, config: Mapping[str, Any], key: str) -> int:
    """A size that every model has."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        said = f"{key} = {value!r}" if key in config else f"{key} is missing"
        raise ValueError(f"{where}: {said}; a number of at least 1 is needed")
    return value


def _object(where: str, key: str, value: Any) -> Mapping[str, Any]:
    """The value of a key that holds keys itself; nothing is as good as no keys."""
    if value and not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key} = {value!r} is not supported; allowed: an object, or null")
    return value or {}


@dataclass(frozen=True)
class QuantizationSpec:
    """A checkpoint's `quantization_config`, of the one kind made here: e4m3, dynamic activations, fp32 scales."""

    block: tuple[int, int] = (BLOCK, BLOCK)
    """Rows and columns of a weight block."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Modules kept in high precision, as the checkpoint names them."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> QuantizationSpec:
        """Parse the value of `quantization_config`. ValueError names what cannot be made and what can."""
        q = f"{where}: quantization_config"
        _only(q, "quant_method", config.get("quant_method"), ("fp8",))
        _only(q, "fmt", config.get("fmt", "e4m3"), ("e4m3",))
        _only(q, "activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic",))
        _only(q, "scale_fmt", config.get("scale_fmt"), (None, "float", "float32"))
        block = config.get("weight_block_size")
        _only(q, "weight_block_size", list(block) if block is not None else None, ([BLOCK, BLOCK],))
        skipped = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
        return cls(block=(BLOCK, BLOCK), modules_to_not_convert=tuple(skipped))

    def to_config(self) -> dict[str, Any]:
        """The value of `quantization_config` for a config.json."""
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one Qwen3 model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Width of the dense FFN (unused where every layer is a mixture of experts)."""
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_experts: int = 0
    """0: dense."""
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    quantization: QuantizationSpec | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @classmethod
    def from_hf_dir(cls, path: str | Path) -> ModelSpec:
        """Read PATH/config.json. FileNotFoundError without one; ValueError as `from_hf_config`."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; --model.hf-checkpoint must be a Hugging Face folder")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(config, dict):
            raise ValueError(f"{file}: not a JSON object")
        return cls.from_hf_config(config, str(file))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """Parse the dictionary of a config.json, in the spelling of transformers 4 or 5.

        ValueError, naming `where` and the key: a model that is not a plain Qwen3, or a size that is missing or none.
        """
        architecture = (config.get("architectures") or [None])[0]
        _only(where, "architectures[0]", architecture, ARCHITECTURES)
        key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        rope = _object(where, key, config.get(key))
        _only(where, "rope type", rope.get("rope_type", rope.get("type", "default")), ("default",))
        _only(where, "hidden_act", config.get("hidden_act", "silu"), ("silu",))
        _only(where, "attention_bias", config.get("attention_bias", False), (False,))
        _only(where, "use_sliding_window", config.get("use_sliding_window", False), (False,))
        moe: dict[str, Any] = {}
        if architecture == "Qwen3MoeForCausalLM":
            _only(where, "decoder_sparse_step", config.get("decoder_sparse_step", 1), (1,))
            _only(where, "mlp_only_layers", config.get("mlp_only_layers") or [], ([],))
            local = (
                "num_local_experts"
                if config.get("num_local_experts") and not config.get("num_experts")
                else "num_experts"
            )
            moe = {
                "num_experts": _size(where, config, local),
                "experts_per_token": _size(where, config, "num_experts_per_tok"),
                "moe_ffn_hidden_size": _size(where, config, "moe_intermediate_size"),
                "norm_topk_prob": config.get("norm_topk_prob", False),
            }
        quantization = _object(where, "quantization_config", config.get("quantization_config"))
        hidden, heads = _size(where, config, "hidden_size"), _size(where, config, "num_attention_heads")
        return cls(
            architecture=architecture,
            vocab_size=_size(where, config, "vocab_size"),
            hidden_size=hidden,
            num_layers=_size(where, config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_size(where, config, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
            head_dim=_size(where, config, "head_dim") if config.get("head_dim") else hidden // heads,
            ffn_hidden_size=_size(where, config, "intermediate_size"),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            max_position_embeddings=config.get("max_position_embeddings", 32768),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            quantization=QuantizationSpec.from_config(quantization, where) if quantization else None,
            **moe,
        )

    def transformer_config_arguments(self) -> dict[str, Any]:
        """The arguments of Megatron's TransformerConfig that follow from the model alone."""
        arguments: dict[str, Any] = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_kv_heads,
            "kv_channels": self.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": self.rms_norm_eps,
            "qk_layernorm": True,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        if self.is_moe:
            arguments |= {
                "num_moe_experts": self.num_experts,
                "moe_router_topk": self.experts_per_token,
                "moe_ffn_hidden_size": self.moe_ffn_hidden_size,
                "moe_router_score_function": "softmax",
                # Top-k of a softmax over all experts, or a softmax over the top k: the latter is the renormalized one.
                "moe_router_pre_softmax": not self.norm_topk_prob,
                "moe_router_load_balancing_type": "none",
                "moe_aux_loss_coeff": 0.0,
                "moe_router_dtype": "fp32",
            }
        return arguments


def _divides(what: str, value: int, size: int, flag: str) -> None:
    if value % size:
        allowed = [d for d in range(1, value + 1) if value % d == 0]
        shown = ", ".join(map(str, allowed[:12])) + (", ..." if len(allowed) > 12 else "")
        raise ValueError(f"{flag} {size} does not divide the model's {what} ({value}); allowed: {shown}")


def _whole_blocks(what: str, value: int, size: int, flag: str) -> None:
    if value % (BLOCK * size):
        allowed = [d for d in range(1, value // BLOCK + 1) if value % (BLOCK * d) == 0]
        fix = f"allowed with FP8: {', '.join(map(str, allowed))}" if allowed else "no size is"
        raise ValueError(
            f"{flag} {size} cuts the model's {what} ({value}) inside a {BLOCK}-wide FP8 block; {fix}"
            f"{'' if allowed else ' allowed with FP8'}; or --fp8.backend off"
        )


def check_layout(spec: ModelSpec, parallel: Any, fp8: bool, world_size: int | None = None) -> None:
    """Refuse a parallel layout that this model cannot have.

    `parallel` is a config.schema.ParallelSection; `fp8` says whether the trainer multiplies in FP8; `world_size`, if
    given, is the number of Megatron ranks. ValueError names the value, what is allowed and the flag.
    """
    tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    ep, etp = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    tp_flag, pp_flag = "--parallel.tensor-parallel-size", "--parallel.pipeline-parallel-size"
    ep_flag, etp_flag = "--parallel.expert-parallel-size", "--parallel.expert-tensor-parallel-size"
    _divides("key-value heads", spec.num_kv_heads, tp, tp_flag)  # first: its sizes divide the attention heads, too
    _divides("attention heads", spec.num_heads, tp, tp_flag)
    _divides("vocabulary", spec.vocab_size, tp, tp_flag)
    _divides("layers", spec.num_layers, pp, pp_flag)
    if spec.is_moe:
        _divides("experts", spec.num_experts, ep, ep_flag)
        _divides("expert FFN width", spec.moe_ffn_hidden_size, etp, etp_flag)
        if tp > 1 and not parallel.sequence_parallel:
            raise ValueError(
                f"{tp_flag} {tp} with experts needs --parallel.sequence-parallel (Megatron trains no MoE without it)"
            )
    else:
        _divides("FFN width", spec.ffn_hidden_size, tp, tp_flag)
        for flag, size in ((ep_flag, ep), (etp_flag, etp)):
            if size != 1:
                raise ValueError(f"{flag} {size}: the model has no experts; allowed: 1")
    if parallel.sequence_parallel and tp == 1:
        raise ValueError(f"--parallel.sequence-parallel needs {tp_flag} of at least 2; it is 1")
    if world_size is not None:
        if world_size % (tp * pp):
            raise ValueError(
                f"{world_size} ranks cannot be shared out over {tp_flag} {tp} x {pp_flag} {pp}; "
                f"allowed: a multiple of {tp * pp} (--slurm.nodes, --slurm.ranks-per-node)"
            )
        if world_size % (ep * etp * pp):
            raise ValueError(
                f"{world_size} ranks cannot be shared out over {ep_flag} {ep} x {etp_flag} {etp} x {pp_flag} {pp}; "
                f"allowed: a multiple of {ep * etp * pp}"
            )
    if not fp8:
        return
    if spec.head_dim % BLOCK:
        # Megatron's fused qkv interleaves q, k and v by query group: a tile would hold rows of two of them, and the
        # trainer would multiply with other codes than the engine, which quantizes q, k and v apart.
        raise ValueError(
            f"head_dim {spec.head_dim}: FP8 needs a multiple of {BLOCK}, else a block of the fused qkv holds rows of "
            f"both k and v; use another model or --fp8.backend off"
        )
    if spec.is_moe:
        _whole_blocks("expert FFN width", spec.moe_ffn_hidden_size, etp, etp_flag)
    else:
        _whole_blocks("FFN width", spec.ffn_hidden_size, tp, tp_flag)
    if spec.hidden_size % 16:
        raise ValueError(f"hidden_size {spec.hidden_size}: FP8 GEMMs need a multiple of 16; or --fp8.backend off")
