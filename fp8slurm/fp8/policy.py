"""The one list of what is quantized: the Linear and expert weights of a Qwen3 layer, in their Hugging Face names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Sequence

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
FP8_PARTS = (".weight_scale_inv", ".weight_scale", ".input_scale")


@dataclass(frozen=True)
class Decision:
    """Whether a tensor is quantized, and why."""

    quantize: bool
    reason: str


def excluded_by(module: str, modules_to_not_convert: Sequence[str]) -> str | None:
    """The entry that excludes `module`: its own name, one of its ancestors, or its last components.

    Whole components are compared: transformers' own rule takes entries as regular expressions from the start, which
    lets "model.layers.1" exclude layers 10 to 19 too.
    """
    parts = module.split(".")
    for entry in modules_to_not_convert:
        wanted = entry.rstrip(".").split(".")
        if parts[: len(wanted)] == wanted or parts[-len(wanted) :] == wanted:
            return entry
    return None


def decide(name: str, shape: Sequence[int], modules_to_not_convert: Sequence[str] = ()) -> Decision:
    """Whether the tensor `name` (Hugging Face form) of `shape` becomes block FP8, and the reason in a few words.

    Fused experts (3-D, transformers 5) are quantized one expert at a time. modules_to_not_convert: the entries of a
    config's list of that name.
    """
    linear, fused = LINEAR.fullmatch(name), FUSED_EXPERTS.fullmatch(name)
    if not (linear or fused):
        reason = next((why for pattern, why in KEPT if pattern.fullmatch(name)), "not a Linear weight of a layer")
        return Decision(False, reason)
    wanted = 2 if linear else 3
    if len(shape) != wanted:
        raise ValueError(f"{name}: shape {list(shape)}, but a weight of this name has {wanted} dimensions")
    entry = excluded_by(name.removesuffix(".weight"), modules_to_not_convert)
    if entry is not None:
        return Decision(False, f"modules_to_not_convert: {entry}")
    if fused:
        return Decision(True, "expert weights, one matrix an expert")
    return Decision(True, "expert weight" if ".experts." in name else "linear weight of a layer")
