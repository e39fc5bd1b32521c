"""The models that can be trained, a family a file: names, sizes, Megatron's settings, how config.json is read."""

from __future__ import annotations

from fp8slurm.models.config_json import ConfigJson
from fp8slurm.models.families.family import Family
from fp8slurm.models.families.llama import LLAMA
from fp8slurm.models.families.qwen2 import QWEN2
from fp8slurm.models.families.qwen3 import QWEN3
from fp8slurm.models.families.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = {family.architecture: family for family in (QWEN3, QWEN3_MOE, QWEN2, LLAMA)}


def family_of(config: ConfigJson) -> Family:
    """The family of a config.json. InputError for one that is not here, with the list, or a wrong model_type."""
    architectures = config.fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    config.check("architectures[0]", name, *FAMILIES)
    assert isinstance(name, str)
    config.check(f"model_type (of {name})", config.fields.get("model_type"), FAMILIES[name].model_type)
    return FAMILIES[name]
