"""A torch_dist checkpoint shown in canonical HF form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fp8slurm.checkpoint.formats.complete import damage
from fp8slurm.checkpoint.formats.hf_folder import natural
from fp8slurm.checkpoint.formats.kv_scales import FILE, read_scales
from fp8slurm.checkpoint.formats.megatron_names import Run, hf_from_megatron, locate, other_names, overlap
from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo
from fp8slurm.checkpoint.formats.sources import scratch
from fp8slurm.checkpoint.formats.torch_dist import TorchDistReader
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.models.kv_scales import scale_entries
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NOT_MODEL = ("optimizer.", "chained_", "reference.", "rng_state", "random_state")


@dataclass(frozen=True)
class _Place:
    key: str
    index: tuple[int, ...]
    runs: list[Run]


class TorchDistSource:
    """The model's tensors (not the optimizer's) of a torch_dist folder, at any TP, PP and EP, under their HF names.

    A run's scales of an FP8 KV cache, in kv_scales.json beside them, are two FP32 tensors a layer."""

    def __init__(self, path: str | Path, spec: ModelSpec, tied_head: bool = False) -> None:
        """`tied_head`: show the embedding a second time as lm_head.weight (some HF folders of tied models have it).

        BadCheckpoint if a parameter of the model is missing, has another shape, or if there are parameters that the
        model does not have.
        """
        self._reader = TorchDistReader(path)
        self._places: dict[str, _Place] = {}
        infos: dict[str, TensorInfo] = {}
        used: set[str] = set()
        ends: dict[str, tuple[int, ...]] = {}
        for entry in NameTable(spec):
            key, index = locate(entry, self._reader.tensors)
            ends[key] = tuple(map(max, ends.get(key, index), index))
            used.update((key, *other_names(key)))
            runs = hf_from_megatron(entry)
            for tensor in entry.tensors:
                infos[tensor.name] = TensorInfo(tensor.name, self._reader.tensors[key].dtype, tensor.shape)
                self._places[tensor.name] = _Place(key, index, runs[tensor.name])
        for key, last in ends.items():
            there = self._reader.tensors[key].shape[: len(last)]
            if there != tuple(i + 1 for i in last):
                what = "layers" if len(last) == 1 else "layers and experts"
                raise BadCheckpoint(
                    f"{self._reader.path}: {key} has {list(there)} {what}, the model's config {[i + 1 for i in last]}"
                )
        left = [k for k in self._reader.tensors if k not in used and not k.startswith(_NOT_MODEL)]
        if left:
            raise BadCheckpoint(f"{self._reader.path}: {left[0]} is no parameter of this model ({len(left)} such keys)")
        if tied_head and HEAD not in infos:
            self._places[HEAD] = self._places[EMBEDDING]
            infos[HEAD] = TensorInfo(HEAD, infos[EMBEDDING].dtype, infos[EMBEDDING].shape)
        self._kv_scales: dict[str, float] = {}
        self._beside = [path] if (path := self._reader.path / FILE).is_file() else []
        for layer, pair in enumerate(read_scales(path, spec.num_layers).tolist() if self._beside else ()):
            self._kv_scales |= {e.tensors[0].name: value for e, value in zip(scale_entries(layer), pair)}
        infos |= {name: TensorInfo(name, torch.float32, (1,)) for name in self._kv_scales}
        self.tensors = {name: infos[name] for name in sorted(infos, key=natural)}

    @property
    def files(self) -> list[Path]:
        """.metadata, the data files, and that of the scales of an FP8 KV cache, if it is there."""
        return [self._reader.path / ".metadata", *sorted(self._reader.path.glob("*.distcp")), *self._beside]

    def check_sealed(self) -> None:
        """BadCheckpoint if a run sealed this checkpoint and a file with parts of the model is not as it was then."""
        if not (self._reader.path / "COMPLETE").exists():
            return
        keys = {place.key for place in self._places.values()}
        read = {chunk.path.name for key in keys for chunk in self._reader.tensors[key].chunks}
        reason = damage(self._reader.path, [".metadata", *(p.name for p in self._beside), *sorted(read)])
        if reason is not None:
            raise BadCheckpoint(f"{self._reader.path}: a damaged checkpoint of a run: {reason}")

    def read(self, name: str, start: int, stop: int, role: str = "in") -> torch.Tensor:
        info = self.tensors[name]
        rows = scratch.take(role, info.dtype, stop - start, info.columns)
        if name in self._kv_scales:
            return rows.fill_(self._kv_scales[name])
        place = self._places[name]
        for run in overlap(place.runs, start, stop):
            into = rows[run.start - start : run.start - start + run.length]
            self._reader.read_rows(place.key, place.index, run.source, run.source + run.length, into)
        return rows

    def close(self) -> None:
        self._reader.close()
