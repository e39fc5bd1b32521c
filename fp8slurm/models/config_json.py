"""A config.json's fields as transformers reads them, or refused: what a family's file is written with.

The defaults that callers give are those of transformers' config class of the family: what it takes where a key is
missing. Values have to be of the very types that its strict classes demand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8slurm.core.errors import InputError

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every published Llama 3.1, 3.2 and 3.3. Megatron (0.19.2, RotaryEmbedding) has no setting for others."""
LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071, section 3): rotary frequencies for longer contexts, those of short wavelengths as they
    were, those of long ones divided by the factor; cos and sin times 0.1 ln(factor) + 1. Its bounds are the paper's for
    Llama, 1 and 32 turns: the defaults of transformers and SGLang."""

    factor: float
    original_positions: int
    """original_max_position_embeddings: how long the model's texts were in training."""

    @property
    def positions(self) -> int:
        """How far it reaches."""
        return int(self.factor * self.original_positions)


class ConfigJson:
    """The fields of one file. All methods raise InputError naming the file and the key."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json") -> None:
        self.fields, self.where = fields, where

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a value that is none of `allowed`, as JSON writes them: 0 is not false, and 1.0 not 1.

        A key that is missing counts as the first of them.
        """
        self.check(key, self.fields.get(key, allowed[0]), *allowed)

    def check(self, what: str, value: Any, *allowed: Any) -> None:
        """`only` for a value that is at hand."""
        if json.dumps(value) not in map(json.dumps, allowed):
            raise InputError(
                f"{self.where}: {what} = {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}"
            )

    def field(self, key: str, default: Any) -> Any:
        """A key's value, of the default's very type where it is there."""
        value = self.fields.get(key, default)
        if type(value) is not type(default) or (isinstance(value, float) and not 0 <= value < math.inf):
            kind = {
                bool: "true or false",
                float: "a number from 0 with a point or an exponent, such as 1e-06",
                int: "a whole number",
            }
            raise InputError(f"{self.where}: {key} = {value!r} is not supported; allowed: {kind[type(default)]}")
        return value

    def size(self, key: str, default: int | None = None, null: int | None = None) -> int:
        """A number of at least 1. default: where the key is missing (None: refused); null: what null stands for."""
        value = self.fields.get(key, default)
        if value is None and key in self.fields and null is not None:
            return null
        if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
            what = f"{key} = {value!r}" if key in self.fields else f"{key} is missing"
            raise InputError(f"{self.where}: {what}; a number of at least 1 is needed, and of at most {LARGEST_SIZE}")
        return value

    def object(self, key: str) -> Mapping[str, Any]:
        """The value of a key that holds keys itself; nothing is as good as no keys."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {key} = {value!r} is not supported; allowed: an object, or null")
        return value or {}

    def decoder(self, max_positions: int, rope: tuple[str, ...] = ("default",)) -> dict[str, Any]:
        """What all families have in common, as arguments of ModelSpec: RMSNorm, SwiGLU, full attention with RoPE.

        max_positions: the default of max_position_embeddings; rope: the kinds of rotary embedding that the family has.
        """
        layers = self.size("num_hidden_layers")
        for key in ("dtype", "torch_dtype"):
            self.only(key, None, "bfloat16", "float16", "float32")
        self.only("hidden_act", "silu")
        types = self.fields.get("layer_types")
        if types is not None and not (
            isinstance(types, list) and types.count("full_attention") == len(types) == layers
        ):
            raise InputError(
                f"{self.where}: layer_types = {types!r} is not supported; allowed: {layers} full_attention, or null"
            )
        return {
            "vocab_size": self.size("vocab_size"),
            "hidden_size": self.size("hidden_size"),
            "num_layers": layers,
            "num_heads": self.size("num_attention_heads"),
            "ffn_hidden_size": self.size("intermediate_size"),
            "rms_norm_eps": self.field("rms_norm_eps", 1e-6),
            **self._rope(*rope),
            "max_position_embeddings": self.size("max_position_embeddings", max_positions),
            "tie_word_embeddings": self.field("tie_word_embeddings", False),
        }

    def _rope(self, *kinds: str) -> dict[str, Any]:
        """rope_theta, rope_scaling and yarn of a ModelSpec, of one of these kinds; anything else is refused.

        As transformers 5 reads it (convert_rope_params_to_dict), and SGLang through it: rope_scaling where it has keys,
        else rope_parameters, whole; the rope_theta in it, else the one beside it, else 10,000.
        """
        first, second = self.object("rope_scaling"), self.object("rope_parameters")
        key, rope = ("rope_scaling", first) if first else ("rope_parameters", second)
        names = [name for name in ("rope_type", "type") if name in rope]
        for name in names:
            self.check(f"{key}: {name}", rope[name], *kinds)
        kind = rope[names[0]] if names else "default"
        if names:
            self.check(f"{key}: {names[-1]}", rope[names[-1]], kind)
        yarn = ("factor", "original_max_position_embeddings")
        scaled = {"llama3": ("factor", *LLAMA3_ROPE), "yarn": yarn}.get(kind, ())
        allowed = ("rope_type", "rope_theta", *scaled)
        if more := sorted(set(rope) - {*allowed, "type"}):
            what = "plain RoPE" if kind == "default" else kind
            raise InputError(
                f"{self.where}: {key} has {more[0]!r}, which {what} has not; allowed: {', '.join(allowed)}"
            )
        self.only("partial_rotary_factor", None, 1.0)
        theta = rope.get("rope_theta", self.fields.get("rope_theta", 10000.0))
        self._positive("rope_theta", theta)
        found: dict[str, Any] = {"rope_theta": float(theta), "rope_scaling": None, "yarn": None}
        for name in scaled:
            self._positive(f"{key}: {name}", rope.get(name))
        if kind == "yarn":
            self.only("original_max_position_embeddings", None)  # transformers would take it from beside
            original = ConfigJson(rope, f"{self.where}: {key}").size("original_max_position_embeddings")
            if rope["factor"] < 1:
                raise InputError(f"{self.where}: {key}: factor = {rope['factor']!r}; allowed: 1 or more")
            return found | {"yarn": Yarn(float(rope["factor"]), original)}
        if kind != "llama3":
            return found
        for name, value in LLAMA3_ROPE.items():
            if rope[name] != value:
                self.check(f"{key}: {name}", rope[name], value)
        return found | {"rope_scaling": float(rope["factor"])}

    def _positive(self, what: str, value: Any) -> None:
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise InputError(f"{self.where}: {what} = {value!r} is not supported; allowed: a number above 0")
