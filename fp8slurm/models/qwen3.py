"""What a Qwen3 is, dense or mixture of experts: read from a Hugging Face folder, checked against a parallel layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json
from fp8slurm.fp8 import BLOCK

MODEL_TYPES = {"Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3_moe"}
"""transformers chooses its config class by the type, SGLang its model by the architecture."""
LARGEST_SIZE = 2**31 - 1
MOST_MATRICES = 200_000
"""Layers times experts; 30B-A3B has 6,144. A larger number is an error in the file, and names for all would not end."""
MOST_SHARES = 1024
"""Up to here sizes that are allowed are looked for, to be named."""


def _only(where: str, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """As JSON writes it: 0 is not false, and 1.0 not 1."""
    if json.dumps(value) not in map(json.dumps, allowed):
        raise InputError(f"{where}: {key} = {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def _field(where: str, config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A key's value, of the default's very type where it is there: what transformers' strict config classes demand."""
    value = config.get(key, default)
    if type(value) is not type(default) or (isinstance(value, float) and not 0 <= value < math.inf):
        kind = {
            bool: "true or false",
            float: "a number from 0 with a point or an exponent, such as 1e-06",
            int: "a whole number",
        }
        raise InputError(f"{where}: {key} = {value!r} is not supported; allowed: {kind[type(default)]}")
    return value


def _size(where: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size that every model has. default: what transformers takes where the key is missing; None: refused then."""
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        what = f"{key} = {value!r}" if key in config else f"{key} is missing"
        raise InputError(f"{where}: {what}; a number of at least 1 is needed, and of at most {LARGEST_SIZE}")
    return value


def _object(where: str, key: str, value: Any) -> Mapping[str, Any]:
    """The value of a key that holds keys itself; nothing is as good as no keys."""
    if value is not None and not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} = {value!r} is not supported; allowed: an object, or null")
    return value or {}


def _rope_theta(where: str, config: Mapping[str, Any]) -> float:
    """The base of plain rotary embeddings; anything else is refused.

    As transformers 5 reads it (convert_rope_params_to_dict), and SGLang through it: rope_scaling where it has keys,
    else rope_parameters, whole; the rope_theta in it, else the one beside it, else 10,000.
    """
    first, second = (_object(where, key, config.get(key)) for key in ("rope_scaling", "rope_parameters"))
    key, rope = ("rope_scaling", first) if first else ("rope_parameters", second)
    for name in ("rope_type", "type"):
        _only(where, f"{key}: {name}", rope.get(name, "default"), ("default",))
    if more := sorted(set(rope) - {"rope_type", "type", "rope_theta"}):
        raise InputError(f"{where}: {key} has {more[0]!r}, which plain RoPE has not; allowed: rope_type, rope_theta")
    _only(where, "partial_rotary_factor", config.get("partial_rotary_factor"), (None, 1.0))
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if type(theta) not in (int, float) or not 0 < theta < 1e300:
        raise InputError(f"{where}: rope_theta = {theta!r} is not supported; allowed: a number above 0")
    return float(theta)


def listed_modules(config: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """modules_to_not_convert of a config.json or of its quantization_config. InputError: no list of texts."""
    key = "modules_to_not_convert" if config.get("modules_to_not_convert") else "ignored_layers"
    modules = config.get(key) or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{where}: {key} = {modules!r} is not supported; allowed: a list of modules' names, or null")
    return tuple(modules)


@dataclass(frozen=True)
class QuantizationSpec:
    """A checkpoint's `quantization_config`, of the one kind made here: e4m3, dynamic activations, fp32 scales."""

    block: tuple[int, int] = (BLOCK, BLOCK)
    """Rows and columns of a weight block."""
    modules_to_not_convert: tuple[str, ...] = ()
    """Modules kept in high precision, as the checkpoint names them."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> QuantizationSpec:
        """Parse the value of `quantization_config`. InputError names what cannot be made and what can."""
        q = f"{where}: quantization_config"
        _only(q, "quant_method", config.get("quant_method"), ("fp8",))
        _only(q, "fmt", config.get("fmt", "e4m3"), ("e4m3",))
        _only(q, "activation_scheme", config.get("activation_scheme", "dynamic"), ("dynamic",))
        _only(q, "scale_fmt", config.get("scale_fmt"), (None, "float", "float32"))
        block = config.get("weight_block_size")
        _only(q, "weight_block_size", list(block) if isinstance(block, tuple) else block, ([BLOCK, BLOCK],))
        return cls(block=(BLOCK, BLOCK), modules_to_not_convert=listed_modules(config, q))

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
        """Read PATH/config.json. FileNotFoundError without one; InputError as `from_hf_config`."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; --model.hf-checkpoint must be a Hugging Face folder")
        return cls.from_hf_config(read_json(file), str(file))

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """Parse the dictionary of a config.json, in the spelling of transformers 4 or 5: every field as transformers 5
        reads it, or refused. A model that the trainer read otherwise than the engine would be another model.

        InputError, naming `where` and the key: a model that is not a plain Qwen3, or a size that is missing or none.
        """
        architectures = config.get("architectures")
        architecture = architectures[0] if isinstance(architectures, list) and architectures else architectures
        _only(where, "architectures[0]", architecture, tuple(MODEL_TYPES))
        assert isinstance(architecture, str)
        _only(where, f"model_type (of {architecture})", config.get("model_type"), (MODEL_TYPES[architecture],))
        is_moe = architecture == "Qwen3MoeForCausalLM"
        hidden, heads = _size(where, config, "hidden_size"), _size(where, config, "num_attention_heads")
        layers = _size(where, config, "num_hidden_layers")
        _only(where, "hidden_act", config.get("hidden_act", "silu"), ("silu",))
        _only(where, "attention_bias", config.get("attention_bias", False), (False,))
        _only(where, "use_sliding_window", config.get("use_sliding_window", False), (False,))
        types = config.get("layer_types")
        if types is not None and not (
            isinstance(types, list) and types.count("full_attention") == len(types) == layers
        ):
            raise InputError(
                f"{where}: layer_types = {types!r} is not supported; allowed: {layers} full_attention, or null"
            )
        moe: dict[str, Any] = {}
        if is_moe:
            _only(where, "decoder_sparse_step", config.get("decoder_sparse_step", 1), (1,))
            _only(where, "mlp_only_layers", config.get("mlp_only_layers"), (None, []))
            names = [key for key in ("num_experts", "num_local_experts") if key in config] or ["num_experts"]
            _only(where, names[-1], config.get(names[-1]), (config.get(names[0]),))
            moe = {
                "num_experts": _size(where, config, names[0]),
                "experts_per_token": _size(where, config, "num_experts_per_tok"),
                "moe_ffn_hidden_size": _size(where, config, "moe_intermediate_size"),
                "norm_topk_prob": _field(where, config, "norm_topk_prob", False),
            }
        if layers * moe.get("num_experts", 1) > MOST_MATRICES:
            raise InputError(
                f"{where}: {layers} layers of {moe.get('num_experts', 1)} experts; at most {MOST_MATRICES}"
            )
        quantization = _object(where, "quantization_config", config.get("quantization_config"))
        # Where a key is missing: the defaults of transformers' Qwen3Config and Qwen3MoeConfig, which differ.
        no_kv_heads = not is_moe and "num_key_value_heads" in config and config["num_key_value_heads"] is None
        return cls(
            architecture=architecture,
            vocab_size=_size(where, config, "vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads if no_kv_heads else _size(where, config, "num_key_value_heads", 4 if is_moe else 32),
            head_dim=_size(where, config, "head_dim", hidden // heads if is_moe else 128),
            ffn_hidden_size=_size(where, config, "intermediate_size"),
            rms_norm_eps=_field(where, config, "rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(where, config),
            max_position_embeddings=_size(where, config, "max_position_embeddings", 32768),
            tie_word_embeddings=_field(where, config, "tie_word_embeddings", False),
            quantization=QuantizationSpec.from_config(quantization, where) if quantization else None,
            **moe,
        )

    def transformer_config_arguments(self) -> dict[str, Any]:
        """The arguments of Megatron's TransformerConfig that follow from the model alone."""
        from torch.nn.functional import silu

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
            "activation_func": silu,
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
        allowed = [d for d in range(1, min(value, MOST_SHARES) + 1) if value % d == 0]
        shown = ", ".join(map(str, allowed[:12])) + (", ..." if len(allowed) > 12 or value > MOST_SHARES else "")
        raise InputError(f"{flag} {size} does not divide the model's {what} ({value}); allowed: {shown}")


def _whole_blocks(what: str, value: int, size: int, flag: str) -> None:
    if value % (BLOCK * size):
        allowed = [d for d in range(1, min(value // BLOCK, MOST_SHARES) + 1) if value % (BLOCK * d) == 0]
        fix = f"allowed with FP8: {', '.join(map(str, allowed))}" if allowed else "no size is"
        raise InputError(
            f"{flag} {size} cuts the model's {what} ({value}) inside a {BLOCK}-wide FP8 block; {fix}"
            f"{'' if allowed else ' allowed with FP8'}; or --fp8.backend off"
        )


def check_layout(spec: ModelSpec, parallel: Any, fp8: bool, world_size: int | None = None) -> None:
    """Refuse a parallel layout that this model cannot have.

    `parallel` is a config.schema.ParallelSection; `fp8` says whether the trainer multiplies in FP8; `world_size`, if
    given, is the number of Megatron ranks. InputError names the value, what is allowed and the flag.
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
            raise InputError(f"{tp_flag} {tp} with experts needs --parallel.sequence-parallel (a rule of Megatron)")
    else:
        _divides("FFN width", spec.ffn_hidden_size, tp, tp_flag)
        for flag, size in ((ep_flag, ep), (etp_flag, etp)):
            if size != 1:
                raise InputError(f"{flag} {size}: the model has no experts; allowed: 1")
    if parallel.sequence_parallel and tp == 1:
        raise InputError(f"--parallel.sequence-parallel needs {tp_flag} of at least 2; it is 1")
    if world_size is not None:
        if world_size % (tp * pp):
            raise InputError(
                f"{world_size} ranks cannot be shared out over {tp_flag} {tp} x {pp_flag} {pp}; "
                f"allowed: a multiple of {tp * pp} (--slurm.nodes, --slurm.ranks-per-node)"
            )
        if world_size % (ep * etp * pp):
            raise InputError(
                f"{world_size} ranks cannot be shared out over {ep_flag} {ep} x {etp_flag} {etp} x {pp_flag} {pp}; "
                f"allowed: a multiple of {ep * etp * pp}"
            )
    if not fp8:
        return
    if spec.head_dim % BLOCK:
        # Megatron's fused qkv interleaves q, k and v by query group: a tile would hold rows of two of them, and the
        # trainer would multiply with other codes than the engine, which quantizes q, k and v apart.
        raise InputError(
            f"head_dim {spec.head_dim}: FP8 needs a multiple of {BLOCK}, else a block of the fused qkv holds rows of "
            f"both k and v; use another model or --fp8.backend off"
        )
    if spec.is_moe:
        _whole_blocks("expert FFN width", spec.moe_ffn_hidden_size, etp, etp_flag)
    else:
        _whole_blocks("FFN width", spec.ffn_hidden_size, tp, tp_flag)
    if spec.hidden_size % 16:
        raise InputError(f"hidden_size {spec.hidden_size}: FP8 GEMMs need a multiple of 16; or --fp8.backend off")
