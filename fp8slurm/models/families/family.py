"""What a model family is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8slurm.models.config_json import ConfigJson

if TYPE_CHECKING:
    from fp8slurm.models.entries import Entry
    from fp8slurm.models.spec import ModelSpec


@dataclass(frozen=True)
class Family:
    """Models whose config.json names one architecture. What FP8 leaves out is one list for all: fp8/policy.py."""

    architecture: str
    """SGLang chooses its model by it."""
    model_type: str
    """transformers chooses its config class by it."""
    engine_module: str
    """The module of SGLang's model, a class that is called as the architecture."""
    read: Callable[[ConfigJson], dict[str, Any]]
    """A config.json as the arguments of ModelSpec, but architecture and quantization. Raises InputError for what the
    trainer would compute otherwise than the engine."""
    layer: Callable[[ModelSpec, int], Iterator[Entry]]
    """The parameters of a layer by its number, in the order of the model."""
    megatron: Callable[[ModelSpec], dict[str, Any]]
    """Arguments of Megatron's TransformerConfig besides those that follow from the sizes."""
