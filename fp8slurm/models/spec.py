"""A model's sizes and switches, and its checkpoint's quantization: read from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json
from fp8slurm.fp8 import BLOCK
from fp8slurm.models.config_json import ConfigJson, Yarn
from fp8slurm.models.families import FAMILIES, Family, family_of

MOST_MATRICES = 200_000
"""Layers times experts; 30B-A3B has 6,144. A larger number is an error in the file, and names for all would not end."""


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
        c = ConfigJson(config, f"{where}: quantization_config")
        c.check("quant_method", config.get("quant_method"), "fp8")
        c.only("fmt", "e4m3")
        c.only("activation_scheme", "dynamic")
        c.only("scale_fmt", None, "float", "float32")
        block = config.get("weight_block_size")
        c.check("weight_block_size", list(block) if isinstance(block, tuple) else block, [BLOCK, BLOCK])
        return cls(block=(BLOCK, BLOCK), modules_to_not_convert=listed_modules(config, c.where))

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
    """Sizes and switches of one model."""

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
    rope_scaling: float | None = None
    """Factor of Llama 3's scaling of rotary frequencies; None: not scaled."""
    yarn: Yarn | None = None
    num_experts: int = 0
    """0: dense."""
    experts_per_token: int = 0
    moe_ffn_hidden_size: int = 0
    norm_topk_prob: bool = True
    quantization: QuantizationSpec | None = None

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

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

        InputError, naming `where` and the key: a model of no family here, or not a plain one of its family, or a size
        that is missing or none.
        """
        c = ConfigJson(config, where)
        family = family_of(c)
        values, quantization = family.read(c), c.object("quantization_config")
        layers, experts = values["num_layers"], values.get("num_experts", 1)
        if layers * experts > MOST_MATRICES:
            raise InputError(f"{where}: {layers} layers of {experts} experts; at most {MOST_MATRICES}")
        return cls(
            architecture=family.architecture,
            quantization=QuantizationSpec.from_config(quantization, where) if quantization else None,
            **values,
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
            "gated_linear_unit": True,
            "activation_func": silu,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        }
        return arguments | self.family.megatron(self)
