"""The name table applied to rows: which rows of a Megatron parameter are which rows of its HF tensors.

`models.names.Entry` knows how to split and merge whole parameters; here it is applied to row numbers instead, so that
a converter can move any rows of a fused parameter without holding it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fp8slurm.checkpoint.formats.torch_dist import SavedTensor
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.models.entries import Entry, HfTensor


@dataclass(frozen=True)
class Run:
    """Rows [start, start + length) on one side that are rows [source, source + length) of `name` on the other."""

    name: str
    start: int
    source: int
    length: int


def _runs(names: list[str], numbers: list[torch.Tensor]) -> list[Run]:
    """Runs of consecutive numbers, one list after the other as one axis."""
    runs, start = [], 0
    for name, rows in zip(names, numbers):
        breaks = (torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist()
        for low, high in zip([0, *breaks], [*breaks, len(rows)]):
            runs.append(Run(name, start + low, int(rows[low]), high - low))
        start += len(rows)
    return runs


def _by_rows(entry: Entry) -> Entry:
    return replace(entry, tensors=tuple(HfTensor(t.name, (t.shape[0], 1)) for t in entry.tensors))


def hf_from_megatron(entry: Entry) -> dict[str, list[Run]]:
    """For each HF tensor of the entry, in runs of its rows: where they are in the Megatron parameter."""
    rows = _by_rows(entry)
    parts = rows.split(torch.arange(rows.shape[0]).view(-1, 1))
    return {p.name: _runs([entry.name], [p.data.flatten()]) for p in parts}


def megatron_from_hf(entry: Entry) -> list[Run]:
    """In runs of the Megatron parameter's rows: where they are in which HF tensor."""
    runs = [
        replace(r, name=name, start=r.source, source=r.start)
        for name, rs in hf_from_megatron(entry).items()
        for r in rs
    ]
    return sorted(runs, key=lambda r: r.start)


def overlap(runs: list[Run], start: int, stop: int) -> list[Run]:
    """The parts of runs inside rows [start, stop)."""
    cut = []
    for run in runs:
        low, high = max(start, run.start), min(stop, run.start + run.length)
        if low < high:
            cut.append(Run(run.name, low, run.source + low - run.start, high - low))
    return cut


# Megatron's local layer spec keeps the norm before experts under the name that it has before a dense FFN, and older
# local specs keep both norms under their own; TransformerEngine's does neither
_SAME_NORM = (
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
)


def other_names(name: str) -> list[str]:
    """What else a Megatron parameter (or checkpoint key) may be called."""
    pairs = [*_SAME_NORM, *((b, a) for a, b in _SAME_NORM)]
    return [name.removesuffix(a) + b for a, b in pairs if name.endswith("." + a)]


def _candidates(entry: Entry, name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Keys and leading indices that a parameter called `name` may have: layers and experts stacked or one by one."""
    layer = () if entry.layer is None else (entry.layer,)
    expert = () if entry.expert is None else (entry.expert,)
    stacked = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", name)
    together, numbered = r"\.local_experts\.\d+\.", r"\.local_experts\.(\d+)\."
    return [
        (re.sub(together, ".experts.", stacked), layer + expert),
        (re.sub(together, ".experts.", name), expert),
        (re.sub(numbered, r".experts.\1.", stacked), layer),
        (re.sub(numbered, r".experts.\1.", name), ()),
    ]


def locate(entry: Entry, saved: Mapping[str, SavedTensor]) -> tuple[str, tuple[int, ...]]:
    """(key, leading indices) of a parameter in a torch_dist checkpoint, layers stacked or one by one.

    BadCheckpoint if it is not there, or has another shape than the model's config says; a vocabulary may be larger
    than the config's (padded).
    """
    for key, index in (c for name in [entry.name, *other_names(entry.name)] for c in _candidates(entry, name)):
        if key not in saved or len(saved[key].shape) != len(index) + len(entry.shape):
            continue
        shape = saved[key].shape
        if any(i >= n for i, n in zip(index, shape)):
            raise BadCheckpoint(f"{key}: shape {list(shape)}, but the model's config has an index {list(index)}")
        got = shape[len(index) :]
        padded = "word_embeddings" in key or key.startswith("output_layer")
        if got != entry.shape and not (padded and got[0] >= entry.shape[0] and got[1:] == entry.shape[1:]):
            raise BadCheckpoint(f"{key}: shape {list(got)}, the model's config says {list(entry.shape)}")
        return key, index
    raise BadCheckpoint(f"the checkpoint has no {entry.checkpoint_key} ({entry.name}): is it of another model?")
