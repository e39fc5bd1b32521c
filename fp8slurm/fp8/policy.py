"""The one list of what is quantized: the Linear and expert weights of a Qwen3 layer, in their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp8slurm.core.errors import InputError

LINEAR = re.compile(
    r"(?:model\.)?layers\.\d+\."
    r"(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj|mlp\.experts\.\d+\.(?:gate|up|down)_proj)\.weight"
)
FUSED_EXPERTS = re.compile(r"(?:model\.)?layers\.\d+\.mlp\.experts\.(?:gate_up|down)_proj")
# the first that matches says why a tensor stays as it is
KEPT = (
    (re.compile(r"(.*\.)?(visual|vision_tower|vision_model)\..*"), "vision tower"),
    (re.compile(r"(.*\.)?(mtp|eh_proj|enorm|hnorm)\..*"), "multi-token prediction head"),
    (re.compile(r"(.*\.)?embed_tokens\.weight"), "embedding"),
    (re.compile(r"(.*\.)?lm_head\.weight"), "output head"),
    (re.compile(r".*\.mlp\.gate\.weight"), "router"),
    (re.compile(r"(.*[._])?(layer)?norm\.weight"), "norm"),
    (re.compile(r".*\.bias"), "bias"),
)
_EXPERT = re.compile(r"(.+\.mlp\.experts)\..+")
_TOGETHER = (
    (re.compile(r"(.+\.self_attn)\.[qkv]_proj"), r"\1.qkv_proj"),
    (re.compile(r"(.+\.mlp)\.(gate|up)_proj"), r"\1.gate_up_proj"),
    (_EXPERT, r"\1"),
)


@dataclass(frozen=True)
class Decision:
    """Whether a tensor is quantized, and why."""

    quantize: bool
    reason: str
    entry: str | None = None
    """The entry of modules_to_not_convert that keeps it."""


def excluded_by(module: str, modules_to_not_convert: Sequence[str]) -> str | None:
    """The entry that excludes `module`: its own name, one of its ancestors, or its last components.

    Whole components are compared: transformers' own rule takes entries as regular expressions from the start, which
    lets "model.layers.1" exclude layers 10 to 19 too.
    """
    parts = module.split(".")
    for entry in modules_to_not_convert:
        kept = entry.rstrip(".").split(".")
        if parts[: len(kept)] == kept or parts[-len(kept) :] == kept:
            return entry
    return None


def engine_matrix(module: str) -> str:
    """The name of what SGLang holds a Linear `module` of a layer in: it makes one of q, k and v, of gate and up, and of
    all experts of a layer, and multiplies with the whole in one precision."""
    for pattern, together in _TOGETHER:
        if pattern.fullmatch(module):
            return pattern.sub(together, module)
    return module


def kept_name(module: str) -> str:
    """How a kept Linear `module` is named in a config's modules_to_not_convert so that SGLang, transformers and we
    agree: by its full name, and the experts of a layer together."""
    return _EXPERT.sub(r"\1", module)


def has_effect(entry: str, modules: Iterable[str]) -> bool:
    """Whether an entry of modules_to_not_convert matches one of `modules`, or names what is never converted."""
    return any(pattern.fullmatch(f"{entry}.weight") for pattern, _ in KEPT) or any(
        excluded_by(module, [entry]) is not None for module in modules
    )


def decide(name: str, shape: Sequence[int], modules_to_not_convert: Sequence[str] = ()) -> Decision:
    """Whether the tensor `name` (Hugging Face form) of `shape` becomes block FP8, and the reason in a few words.

    Fused experts (3-D, transformers 5) are quantized one expert at a time. modules_to_not_convert: the entries of a
    config's list of that name.
    """
    linear, fused = LINEAR.fullmatch(name), FUSED_EXPERTS.fullmatch(name)
    if not (linear or fused):
        reason = next((why for pattern, why in KEPT if pattern.fullmatch(name)), "not a Linear weight of a layer")
        return Decision(False, reason)
    dimensions = 2 if linear else 3
    if len(shape) != dimensions:
        raise InputError(f"{name}: shape {list(shape)}, but a weight of this name has {dimensions} dimensions")
    entry = excluded_by(name.removesuffix(".weight"), modules_to_not_convert)
    if entry is not None:
        return Decision(False, f"modules_to_not_convert: {entry}", entry)
    if fused:
        return Decision(True, "expert weights, one matrix an expert")
    return Decision(True, "expert weight" if ".experts." in name else "linear weight of a layer")
