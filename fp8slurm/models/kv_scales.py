"""The scales of an FP8 KV cache by name, and where they can be used. No torch: a command asks before anything starts.

In Hugging Face folders `model.layers.L.self_attn.k_scale` and `.v_scale` (compressed-tensors) or
`model.layers.L.self_attn.k_proj.k_scale` (ModelOpt) hold them; a key's code is key / scale. Updates send the first
form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from fp8slurm.core.errors import InputError
from fp8slurm.models.entries import Entry, plain

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig

NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.(?:[kv]_proj\.)?([kv])_scale")
ATTENTION = {"cpu": "torch_native", "cuda": "fa3"}
"""The attention backend of the engine that takes scales from tensors, by device."""


def is_scale(name: str) -> bool:
    """Whether a Hugging Face tensor is a scale of the cache."""
    return NAME.fullmatch(name) is not None


def engine_name(name: str) -> str:
    """The engine's parameter for a scale's Hugging Face name."""
    found = NAME.fullmatch(name)
    assert found is not None, name
    return f"model.layers.{found[1]}.self_attn.attn.{found[2]}_scale"


def layer_of(name: str) -> tuple[int, int]:
    """(layer, 0 for keys or 1 for values) of a scale."""
    found = NAME.fullmatch(name)
    assert found is not None, name
    return int(found[1]), "kv".index(found[2])


def scale_entries(layer: int) -> Iterator[Entry]:
    """A layer's two scales, as weight updates send them: beside the weights, not cut among ranks."""
    for x in "kv":
        name = f"decoder.layers.{layer}.self_attention.{x}_scale"
        yield plain(name, f"model.layers.{layer}.self_attn.{x}_scale", (1,), layer=layer)


def missing_scales(names: Iterable[str], layers: int) -> list[str]:
    """Scales that a folder with these tensors lacks."""
    there = {layer_of(name) for name in names if is_scale(name)}
    wanted = [t.name for layer in range(layers) for e in scale_entries(layer) for t in e.tensors]
    return [name for name in wanted if layer_of(name) not in there]


def check_kv_cache(config: RunConfig) -> None:
    """Refuse an FP8 cache where the engine cannot follow the scales, and settings of one where there is none.

    InputError names the setting, the reason and what is allowed."""
    e, device = config.engine, "cuda" if config.slurm.gpus_per_node else "cpu"
    if e.kv_cache != "fp8":
        for flag, given in (
            (f"--engine.kv-scales {e.kv_scales}", e.kv_scales != "calibrated"),
            ("--train.quantize-kv", config.train.quantize_kv),
        ):
            if given:
                raise InputError(f"{flag} without --engine.kv-cache fp8: nothing is scaled; leave it out")
        return
    if config.sync.pause_mode == "in_place":
        raise InputError(
            "--engine.kv-cache fp8 with --sync.pause-mode in_place: cached keys would be read with the scales of "
            "another update; allowed: retract, abort"
        )
    check_arguments(e.extra_args, device)


def check_arguments(extra_args: Sequence[str], device: str) -> None:
    """Refuse arguments of SGLang's server that do not go with an FP8 cache. device: cpu or cuda. InputError."""
    words = [part for text in extra_args for part in text.split("=", 1)]
    for name, value in zip(words, [*words[1:], ""]):
        if name.endswith("-attention-backend") or name == "--attention-backend":
            if value != ATTENTION[device]:
                raise InputError(
                    f"--engine.kv-cache fp8 with --engine.extra-args {name} {value}: that backend is not known to "
                    f"follow an update's scales; allowed: {ATTENTION[device]}, or --engine.kv-cache auto"
                )
        if name.startswith("--speculative-"):
            raise InputError(
                f"--engine.kv-cache fp8 with --engine.extra-args {name}: no scales are made for a draft model; "
                f"allowed: leave one of the two out"
            )
