"""A model-only torch_dist checkpoint written straight from a source, a chunk of rows at a time.

The layout is Megatron's default: layers (and experts) stacked along leading axes, every chunk inside one layer and
expert. Megatron loads it at any TP, PP and EP.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from fp8slurm.checkpoint.converters.output import OutputFolder, disk_full, write_durably
from fp8slurm.checkpoint.converters.progress import Progress
from fp8slurm.checkpoint.converters.stream import ConvertOptions, in_threads, one_thread_each
from fp8slurm.checkpoint.formats.megatron_names import Run, megatron_from_hf, other_names, overlap
from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo
from fp8slurm.checkpoint.formats.sources import Source, as_bytes, scratch
from fp8slurm.core.errors import InputError
from fp8slurm.models.entries import Entry
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

CHUNK_BYTES = 64 << 20
# modules whose FP8 state a TransformerEngine model wants to find, empty, in a checkpoint
_WITH_EXTRA_STATE = (
    *(f"self_attention.{m}" for m in "core_attention linear_qkv linear_proj q_layernorm k_layernorm".split()),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)
_EXPERT_EXTRA_STATE = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a parameter."""

    entry: Entry
    dtype: torch.dtype
    start: int
    stop: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*(1 for _ in self.entry.checkpoint_index), self.stop - self.start, *self.entry.shape[1:])

    @property
    def offsets(self) -> tuple[int, ...]:
        return (*self.entry.checkpoint_index, self.start, *(0 for _ in self.entry.shape[1:]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class DistFile:
    """A .distcp file and what goes into it, in order."""

    name: str
    chunks: tuple[Chunk, ...]


def _dtype_of(entry: Entry, source: Source, stacked: dict[str, TensorInfo]) -> torch.dtype:
    """The dtype of a parameter; `stacked` keeps the first tensor of each key, which all others of it must be like."""
    for tensor in entry.tensors:
        info = source.tensors[tensor.name]
        first = stacked.setdefault(entry.checkpoint_key, info)
        if info.dtype != first.dtype:
            dtypes = (f"{i.name} ({str(i.dtype).removeprefix('torch.')})" for i in (first, info))
            raise InputError(f"{' and '.join(dtypes)} become one tensor, {entry.checkpoint_key}: allowed: one dtype")
    return first.dtype


def plan_files(table: NameTable, source: Source, options: ConvertOptions) -> list[DistFile]:
    """Chunks of all parameters, in model order, dealt into files of at most max_shard_bytes.

    InputError: tensors that are stacked under one key are of several dtypes.
    """
    # each thread holds a chunk, torch.save copies of parts of it
    limit = min(CHUNK_BYTES, (options.memory_mib << 20) // (3 * options.threads))
    files: list[list[Chunk]] = [[]]
    used = 0
    stacked: dict[str, TensorInfo] = {}
    for entry in table:
        dtype = _dtype_of(entry, source, stacked)
        step = max(1, limit // max(1, math.prod(entry.shape[1:]) * dtype.itemsize))
        for start in range(0, entry.shape[0], step):
            chunk = Chunk(entry, dtype, start, min(start + step, entry.shape[0]))
            if files[-1] and used + chunk.nbytes > options.max_shard_bytes:
                files.append([])
                used = 0
            files[-1].append(chunk)
            used += chunk.nbytes
    return [DistFile(f"__{i}_0.distcp", tuple(chunks)) for i, chunks in enumerate(files)]


def _extra_state(spec: ModelSpec) -> Iterator[str]:
    """Keys of the empty extra states, in Megatron's ShardedObject form (key/shard_OFFSET_SHAPE)."""
    layers, qk_norm = spec.num_layers, spec.family.megatron(spec)["qk_layernorm"]
    for module in _WITH_EXTRA_STATE:
        if (spec.is_moe and module.startswith("mlp.")) or (module.endswith("_layernorm") and not qk_norm):
            continue
        yield from (f"decoder.layers.{module}._extra_state/shard_{i}_{layers}" for i in range(layers))
    if spec.is_moe:
        for module in _EXPERT_EXTRA_STATE:
            for i in range(layers):
                for e in range(spec.num_experts):
                    yield f"decoder.layers.{module}._extra_state/shard_{i}.{e}_{layers}.{spec.num_experts}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    yield "output_layer._extra_state/shard_0_1"


def _read_chunk(source: Source, runs: Sequence[Run], chunk: Chunk) -> torch.Tensor:
    columns = math.prod(chunk.entry.shape[1:])
    rows = scratch.take("chunk", chunk.dtype, chunk.stop - chunk.start, columns)
    for run in overlap(list(runs), chunk.start, chunk.stop):
        rows[run.start - chunk.start : run.start - chunk.start + run.length] = source.read(
            run.name, run.source, run.source + run.length
        )
    return rows.view(chunk.sizes)


class _Counting(io.RawIOBase):
    """A write-only file whose position torch.save need not ask for."""

    def __init__(self, file: Any) -> None:
        self._file, self.count = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.count += len(data)
        return len(data)


def _save(value: Any, file: Any) -> int:
    """torch.save; returns the archive's length."""
    counting = _Counting(file)
    torch.save(value, cast(IO[bytes], counting))
    return counting.count


def _write_file(file: DistFile, output: OutputFolder, source: Source, progress: Progress) -> list[int]:
    """Write one .distcp file; returns the lengths of its archives. Nothing is left of it if that fails."""
    path, part = output.tmp / file.name, output.part(file.name)
    lengths_file = path.with_name(path.name + ".lengths")
    if path.is_file() and lengths_file.is_file():
        lengths = json.loads(lengths_file.read_text())
        if len(lengths) == len(file.chunks) and sum(lengths) == path.stat().st_size:
            progress.advance(sum(c.nbytes for c in file.chunks))
            return lengths
    lengths = []
    runs: dict[str, list[Run]] = {}
    try:
        with part.open("wb") as out:
            for chunk in file.chunks:
                runs = runs if chunk.entry.name in runs else {chunk.entry.name: megatron_from_hf(chunk.entry)}
                data = _read_chunk(source, runs[chunk.entry.name], chunk)
                # a storage of exactly this size: torch.save writes whole storages
                exact = torch.frombuffer(as_bytes(data), dtype=chunk.dtype)
                lengths.append(_save(exact.view(chunk.sizes), out))
                progress.advance(chunk.nbytes)
            out.flush()
            os.fsync(out.fileno())
        output.check_owner()
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_full(error, path) from None
        raise
    write_durably(lengths_file, json.dumps(lengths).encode())
    os.rename(part, path)
    return lengths


def write_torch_dist(
    files: Sequence[DistFile],
    output: OutputFolder,
    source: Source,
    spec: ModelSpec,
    options: ConvertOptions,
    progress: Progress,
) -> set[str]:
    """Fill OUT.tmp with a checkpoint; returns the names of its files. Finished files of an earlier try are kept.

    BadCheckpoint: another conversion took OUT.tmp over.
    """
    lengths: dict[str, list[int]] = {}

    def write(file: DistFile) -> None:
        progress.describe(file.name)
        lengths[file.name] = _write_file(file, output, source, progress)

    with one_thread_each():
        in_threads(options.threads, files, write)
    output.check_owner()
    names = _write_metadata(files, lengths, output.tmp, spec)
    for file in files:
        (output.tmp / (file.name + ".lengths")).unlink()
    return names | {file.name for file in files}


def _write_metadata(
    files: Sequence[DistFile], lengths: dict[str, list[int]], folder: Path, spec: ModelSpec
) -> set[str]:
    tensors: dict[str, Any] = {}
    places: dict[metadata.MetadataIndex, _StorageInfo] = {}
    for file in files:
        at = 0
        for chunk, length in zip(file.chunks, lengths[file.name], strict=True):
            entry = chunk.entry
            lead = [n for n, i in ((spec.num_layers, entry.layer), (spec.num_experts, entry.expert)) if i is not None]
            offsets = torch.Size(chunk.offsets)
            # under each name that some layer spec looks for, but stored once
            for key in (entry.checkpoint_key, *other_names(entry.checkpoint_key)):
                size = torch.Size([*lead, *entry.shape])
                properties = metadata.TensorProperties(dtype=chunk.dtype)
                record = tensors.setdefault(key, metadata.TensorStorageMetadata(properties, size, []))
                places[metadata.MetadataIndex(key, offsets, len(record.chunks))] = _StorageInfo(file.name, at, length)
                record.chunks.append(metadata.ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
            at += length
    objects = io.BytesIO()
    for key, value in [*((key, [None]) for key in _extra_state(spec)), ("common_state/shard_0_1", [{}])]:
        tensors[key] = metadata.BytesStorageMetadata()
        begin = objects.tell()
        places[metadata.MetadataIndex(key)] = _StorageInfo("__objects.distcp", begin, _save(value, objects))
    contents = metadata.Metadata(
        tensors, None, places, metadata.StorageMeta(checkpoint_id=None, save_id="fp8slurm", load_id=None, modules=[])
    )
    write_durably(folder / "__objects.distcp", objects.getvalue())
    write_durably(folder / ".metadata", pickle.dumps(contents, protocol=4))
    form = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    write_durably(folder / "metadata.json", json.dumps(form).encode())
    return {"__objects.distcp", ".metadata", "metadata.json"}
