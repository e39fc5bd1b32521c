"""A planned conversion into a Hugging Face folder: what will be written where, before a byte is; then the writing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.converters.output import OURS, OutputFolder, disk_full, write_durably
from fp8slurm.checkpoint.converters.progress import Progress
from fp8slurm.checkpoint.converters.stream import ConvertOptions, Shard, run, stopwatch
from fp8slurm.checkpoint.converters.works import Work
from fp8slurm.checkpoint.formats.hf_folder import INDEX, SINGLE, read_json
from fp8slurm.checkpoint.formats.safetensors_file import lay_out
from fp8slurm.checkpoint.formats.sources import Source
from fp8slurm.core.errors import BadCheckpoint

FORMAT = 1
"""Raised when the same input gives other bytes, so that a left-over of an older version is not continued."""


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    seconds: float
    read_bytes: int
    written_bytes: int
    tensors: int
    shards: int
    resumed_shards: int

    def __str__(self) -> str:
        speed = self.read_bytes / max(self.seconds, 1e-9) / 1e9
        resumed = f", {self.resumed_shards} of them found finished" if self.resumed_shards else ""
        return (
            f"{self.tensors} tensors, {self.read_bytes / 1e9:.3f} GB -> {self.written_bytes / 1e9:.3f} GB in "
            f"{self.shards} shards{resumed}; {self.seconds:.1f} s, {speed:.2f} GB/s"
        )


def pack(works: Iterable[Work], max_shard_bytes: int) -> list[Shard]:
    """Deal works, in order, into shards of at most max_shard_bytes; a matrix and its scales stay together."""
    groups: list[list[Work]] = [[]]
    used = 0
    for work in works:
        size = sum(info.nbytes for info in work.outputs)
        if groups[-1] and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(work)
        used += size
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    return [
        Shard(lay_out(name, (info for work in group for info in work.outputs)), tuple(group))
        for name, group in zip(names, groups)
    ]


def stamp(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of every input file: what a resumed conversion must find unchanged."""
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(files)]


@dataclass(frozen=True)
class Conversion:
    """Works packed into shards, and what else belongs into the folder."""

    kind: str
    source: Source
    shards: Sequence[Shard]
    config: dict[str, Any]
    """config.json of the output."""
    companions: Sequence[Path]
    inputs: Sequence[Path]
    """Input folders: never written to."""
    input_files: Sequence[Path]
    """Files that are read, wherever their links lead."""
    output: OutputFolder
    options: ConvertOptions
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Small files by name, written as given, in place of companions of the same names."""

    @property
    def read_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(w.rows * w.row_bytes for s in self.shards for w in s.works)

    def __post_init__(self) -> None:
        fitted = self.options.fitted([w for s in self.shards for w in s.works])
        object.__setattr__(self, "options", fitted)  # frozen: nobody changes it after this

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every safetensors file."""
        return {s.layout.file_name: s.layout.nbytes for s in self.shards}

    def index(self) -> bytes | None:
        """The index file's text; None for a single shard, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {name: s.layout.file_name for s in self.shards for name in s.layout.tensors}
        total = sum(s.layout.data_bytes for s in self.shards)
        return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def check(self) -> None:
        """Everything that can be refused before the first byte is written."""
        self.output.check(self.inputs, [*self.input_files, *self.companions])
        self.output.check_space(self.sizes)

    def describe(self) -> str:
        """Sizes and free space, for --dry-run."""
        tensors = sum(len(s.layout.tensors) for s in self.shards)
        lines = [f"{self.kind}: {', '.join(map(str, self.inputs))} -> {self.output.path}"]
        lines += [f"  {name}  {size / 1e9:.3f} GB" for name, size in self.sizes.items()]
        missing, free = self.output.missing_bytes(self.sizes), self.output.free_bytes()
        lines.append(
            f"  {tensors} tensors, {self.read_bytes / 1e9:.3f} GB -> {sum(self.sizes.values()) / 1e9:.3f} GB; "
            f"to be written {missing / 1e9:.3f} GB, free {free / 1e9:.3f} GB"
        )
        return "\n".join(lines)

    def run(self) -> Report:
        """Convert. The output folder appears complete, or not at all."""
        seconds = stopwatch()
        try:
            self.check()
            self.output.begin()
            data_bytes = sum(s.layout.data_bytes for s in self.shards)
            with Progress(self.read_bytes + self.options.verify * data_bytes, self.options.progress) as progress:
                resumed = run(self.shards, self.output, self.options, progress)
            expected = set(self.sizes) | self._write_companions()
            if self.options.verify:
                self._check_index()
            self.output.finish(expected)
        finally:
            self.output.release()
            self.source.close()
        return Report(
            seconds=seconds(),
            read_bytes=self.read_bytes,
            written_bytes=sum(self.sizes.values()),
            tensors=sum(len(s.layout.tensors) for s in self.shards),
            shards=len(self.shards),
            resumed_shards=resumed,
        )

    def _write_companions(self) -> set[str]:
        files = {"config.json": _json(self.config)}
        index = self.index()
        if index is not None:
            files[INDEX] = index
        files.update(self.texts)
        names = set(files)
        self.output.check_owner()
        try:
            for name, data in files.items():
                write_durably(self.output.tmp / name, data)
            for path in self.companions:
                if path.name in OURS or path.name in files:  # OURS: an input's own would take our mark's place
                    continue
                shutil.copyfile(path, self.output.tmp / path.name)
                names.add(path.name)
        except OSError as error:
            raise disk_full(error, self.output.tmp / "config.json") from error
        return names

    def _check_index(self) -> None:
        index = self.index()
        if index is not None and read_json(self.output.tmp / INDEX) != json.loads(index):
            raise BadCheckpoint(f"{self.output.tmp / INDEX} does not read back as it was written")


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def plan(
    kind: str,
    source: Source,
    works: Sequence[Work],
    config: dict[str, Any],
    companions: Sequence[Path],
    inputs: Sequence[Path],
    input_files: Iterable[Path],
    dst: str | Path,
    options: ConvertOptions,
    texts: Mapping[str, bytes] | None = None,
) -> Conversion:
    """Pack the works and tie the output folder to what it is made from."""
    input_files = list(input_files)
    shards = pack(works, options.max_shard_bytes)
    digest = hashlib.sha256(b"".join(s.layout.header for s in shards))
    kinds = [(type(w).__name__, getattr(w, "power_of_two", None)) for s in shards for w in s.works]
    digest.update(repr(kinds).encode())
    fingerprint = {
        "format": FORMAT,
        "kind": kind,
        "inputs": [os.path.abspath(p) for p in inputs],
        "files": [list(s) for s in stamp(input_files)],
        "plan": digest.hexdigest(),
    }
    output = OutputFolder(dst, fingerprint, options.overwrite)
    return Conversion(kind, source, shards, config, companions, inputs, input_files, output, options, texts or {})
