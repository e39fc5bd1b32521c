"""Does the engine's checkpoint take what the trainer will send? Compared before the first update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch

from fp8slurm.checkpoint.formats.hf_folder import natural, open_hf
from fp8slurm.core.errors import InputError
from fp8slurm.fp8.policy import FUSED_EXPERTS
from fp8slurm.models.kv_scales import is_scale
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec
from fp8slurm.sync.bucket import WeightSpec
from fp8slurm.sync.plan import plan

HEAD = "lm_head.weight"
FIX = "give another --model.rollout-checkpoint, or none: it is then made from --model.hf-checkpoint"


def check_rollout_checkpoint(folder: Path, trainer: ModelSpec) -> None:
    """`check_engine_checkpoint` without a run: for what a trainer of this model will send to an engine of that folder;
    and the settings beside the weights, which no update changes. Raises InputError."""
    engine = ModelSpec.from_hf_dir(folder)
    table = NameTable(trainer)
    planned = plan(table, [e.name for e in table], 1, engine.quantization)
    forms = (form for p in planned for form in p.forms(torch.bfloat16))
    check_engine_checkpoint(folder, (WeightSpec(name, dtype, tuple(shape), 0) for name, dtype, shape in forms))
    others = ["quantization", "max_position_embeddings", *(["ffn_hidden_size"] if trainer.is_moe else [])]
    for name in (f.name for f in fields(ModelSpec) if f.name not in others):
        theirs, ours = getattr(engine, name), getattr(trainer, name)
        if theirs != ours:
            raise InputError(
                f"the engine's checkpoint {folder}: {name} is {theirs}, the trainer's model has {ours}; {FIX}"
            )


def check_engine_checkpoint(folder: Path, sent: Iterable[WeightSpec]) -> None:
    """Compare the folder that the engine loads with the tensors of a plan: names, shapes, what is quantized.

    Raises:
        InputError: names the first tensor, in the order of the layers, that differs.
    """
    located = open_hf(folder).tensors
    if any(FUSED_EXPERTS.fullmatch(name) for name in located):
        return  # one tensor for all experts of a layer: SGLang takes it apart, and refuses what does not fit
    tied = ModelSpec.from_hf_dir(folder).tie_word_embeddings
    there = {name: (tuple(t.info.shape), t.info.dtype) for name, t in located.items() if not (tied and name == HEAD)}
    planned = {s.name: s for s in sent}
    where = f"the engine's checkpoint {folder}"
    for name in sorted(there.keys() | planned.keys(), key=natural):
        if is_scale(name):  # of an FP8 KV cache: engines have them, or have none, by engine.kv_cache
            continue
        if name not in there:
            raise InputError(f"{where} has no tensor {name}, which the trainer sends {_form(planned[name])}; {FIX}")
        shape, dtype = there[name]
        if name not in planned:
            raise InputError(f"{where} has a tensor {name} {list(shape)}, which the trainer does not send; {FIX}")
        spec = planned[name]
        if shape != spec.shape:
            raise InputError(f"{where}: {name} is {list(shape)}, the trainer sends {_form(spec)}; {FIX}")
        if (dtype == torch.float8_e4m3fn) != (spec.dtype == torch.float8_e4m3fn):
            raise InputError(f"{where}: {name} is {_named(dtype)}, the trainer sends {_form(spec)}; {FIX}")


def _form(spec: WeightSpec) -> str:
    return f"as {_named(spec.dtype)} {list(spec.shape)}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
