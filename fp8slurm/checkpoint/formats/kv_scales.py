"""Scales of an FP8 KV cache in checkpoints: a file of a run's, tensors of a Hugging Face folder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fp8slurm.checkpoint.formats.hf_folder import open_hf, read_json
from fp8slurm.checkpoint.formats.sources import HfSource
from fp8slurm.checkpoint.formats.torch_dist import checkpoint_folder
from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.fp8.kv_cache import rounded_up
from fp8slurm.models.kv_scales import is_scale, layer_of, missing_scales

FILE = "kv_scales.json"
"""In a checkpoint of a run: the scales that its weights were sent with, {"scales": [[of keys, of values] of every
layer]}."""


def read_scales(path: Path, layers: int) -> torch.Tensor:
    """Those of a run's checkpoint, powers of two, float32 [layers, 2]. BadCheckpoint: the file is not what a run
    writes; OSError."""
    try:
        values = torch.tensor(read_json(path).get("scales"), dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    if values.shape != (layers, 2) or not (values.isfinite() & (values > 0)).all():
        raise BadCheckpoint(
            f"{path}: {list(values.shape)}; two positive scales for each of {layers} layers are allowed"
        )
    return rounded_up(values)


def scales_in(tensors: Mapping[str, torch.Tensor], otherwise: torch.Tensor) -> torch.Tensor:
    """A folder's scales, rounded up to powers of two, float32 [layers, 2]; `otherwise` where it has none."""
    scales = otherwise.clone()
    for name in filter(is_scale, tensors):
        layer, which = layer_of(name)
        value = tensors[name].float().flatten()
        if layer >= len(scales) or len(value) != 1 or not (value.isfinite() & (value > 0)).all():
            raise BadCheckpoint(
                f"{name} {value.tolist()[:4]}: one positive number is allowed, of a layer that is there"
            )
        scales[layer, which] = rounded_up(value)[0]
    return scales


def check_scales(folder: Path, layers: int, flag: str) -> None:
    """Refuse a Hugging Face folder, or a torch_dist one, that has not a scale for keys and one for values of every
    layer. flag: what needs them.

    InputError: it has none, or not all; BadCheckpoint: one is no scale."""
    if not (folder / "config.json").is_file():
        if not (path := checkpoint_folder(folder) / FILE).is_file():
            raise InputError(f"{flag}: there is no {path}, which runs with an FP8 KV cache write; allowed: auto")
        read_scales(path, layers)
        return
    source = HfSource(open_hf(folder))
    try:
        if missing := missing_scales(source.tensors, layers):
            raise InputError(f"{flag}: {folder} has no {missing[0]}; allowed with this folder: auto")
        scales_in({name: source.whole(name) for name in source.tensors if is_scale(name)}, torch.ones(layers, 2))
    finally:
        source.close()
