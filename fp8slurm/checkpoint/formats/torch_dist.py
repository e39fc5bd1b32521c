"""Megatron's torch_dist format, read with torch alone: no model, no process group, no code from the file.

A folder holds `.metadata` (a pickle: which chunk of which tensor lies where) and `.distcp` files, each a row of
torch.save archives. A chunk's numbers lie in its archive uncompressed, so that any rows of them can be read alone.
A resume reads `.metadata` here too (trainer/checkpoint.py): Megatron sees nothing that is refused here.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import stat
import threading
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from fp8slurm.checkpoint.formats.restricted_pickle import RestrictedUnpickler
from fp8slurm.checkpoint.formats.sources import Files, as_bytes, scratch
from fp8slurm.core.errors import BadCheckpoint

MOST_METADATA_BYTES = 1 << 28
"""Of .metadata; that of a model of 235B with its optimizer takes a fifth of it."""
MOST_DIRECTORY_BYTES = 1 << 20
"""What of an archive is read to find a tensor's numbers: its directory and a pickle of some 150 bytes."""
MOST_DIMENSIONS = 16

_HARMLESS = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


class _MetadataUnpickler(RestrictedUnpickler):
    """Knows torch's own checkpoint records and dtypes; anything of Megatron's becomes an empty record."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._empty: set[type] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return super().find_class(module, name)
        # records only, and none through a dotted name: "filesystem", "os.system" would be found otherwise
        if module.startswith("torch.distributed.checkpoint.") and "." not in name:
            record = super().find_class(module, name)
            if isinstance(record, type) and (is_dataclass(record) or issubclass(record, Enum)):
                return record
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("megatron."):
            empty = type(name, (), {"__init__": lambda self, *a, **k: None})
            self._empty.add(empty)
            return empty
        raise BadCheckpoint(f"refers to {module}.{name}, which has no place there")

    def fills(self, value: Any) -> bool:
        return super().fills(value) or type(value) in self._empty

    def is_key(self, value: Any) -> bool:
        return (
            type(value) is MetadataIndex
            and type(value.fqn) is str
            and (value.offset is None or isinstance(value.offset, torch.Size))
            and (value.index is None or type(value.index) is int)
        )


class _ArchiveUnpickler(RestrictedUnpickler):
    """Reads how a saved tensor lies in its storage, without making it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *rest: (storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise BadCheckpoint(f"refers to {module}.{name}, which has no place there")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file of its own."""

    def __init__(self, files: Files, path: Path, offset: int, length: int) -> None:
        self._files, self._path, self._offset, self._length, self._at = files, path, offset, length, 0
        self._left = MOST_DIRECTORY_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._left -= count
        if self._left < 0:
            raise BadCheckpoint(f"an archive whose directory is larger than {MOST_DIRECTORY_BYTES} bytes")
        self._files.read_into(self._path, self._offset + self._at, memoryview(buffer)[:count])
        self._at += count
        return count


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the checkpoint: its key, dtype, global shape, and chunks."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with .metadata: `path` itself, or the newest iteration in it (Megatron-LM's layout)."""
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    latest = path / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        with latest.open("rb") as file:
            word = file.read(100).decode(errors="replace").strip()
        inner = path / (f"iter_{int(word):07d}" if re.fullmatch("[0-9]+", word) else word)
        if "/" not in word and (inner / ".metadata").is_file():
            return inner
    raise BadCheckpoint(f"{path}: no torch_dist checkpoint (no .metadata in it)")


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > MOST_DIMENSIONS:
        raise BadCheckpoint(f"a {type(values).__name__} is no list of at most {MOST_DIMENSIONS} sizes")
    if not all(type(v) is int and 0 <= v < 2**62 for v in values):
        raise BadCheckpoint(f"{tuple(values)} are no sizes")
    return tuple(values)


def read_metadata(folder: Path, objects: bool = True) -> tuple[Metadata, dict[str, SavedTensor]]:
    """The metadata of a torch_dist folder as torch's own record, and the tensors in it, each found to lie in a file.

    objects: so must everything else that is saved there, such as the random state.

    BadCheckpoint, naming the file: it is damaged, or refers to anything but tensors; no code of it was run.
    """
    where = folder / ".metadata"
    try:
        if (size := where.stat().st_size) > MOST_METADATA_BYTES:
            raise BadCheckpoint(f"{size} bytes; at most {MOST_METADATA_BYTES} are allowed")
        metadata = _MetadataUnpickler(where.read_bytes()).load()
        if not isinstance(metadata, Metadata) or type(metadata.storage_data) is not dict:
            raise BadCheckpoint("not a checkpoint's metadata")
        return metadata, _saved_tensors(folder, metadata, objects)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{where}: {error}") from None
    except OSError:  # the file system's, not the checkpoint's
        raise
    except Exception as error:  # a damaged pickle raises anything, and gives records of any types
        raise BadCheckpoint(f"{where}: not readable: {type(error).__name__}: {str(error)[:200]}") from None


def _place(info: Any, files: Mapping[str, int], what: str) -> tuple[int, int]:
    """(offset, length) of what lies in one of `files`, which maps names to bytes."""
    name = info.relative_path
    if type(name) is not str or name not in files:
        raise BadCheckpoint(f"{name if type(name) is str else type(name).__name__} is missing (it holds {what})")
    begin, length = _sizes((info.offset, info.length))
    if begin + length > files[name]:
        raise BadCheckpoint(f"{name} is truncated: {what} ends beyond it")
    if getattr(info, "transform_descriptors", None):
        raise BadCheckpoint(f"{name}: {what} is stored transformed")
    return begin, length


def _saved_tensors(folder: Path, metadata: Metadata, objects: bool) -> dict[str, SavedTensor]:
    files = {p.name: s.st_size for p in folder.glob("*.distcp") if stat.S_ISREG((s := p.stat()).st_mode)}
    places: dict[tuple[str, tuple[int, ...]], Any] = {}
    for index, info in metadata.storage_data.items():
        if index.offset is not None:
            places[index.fqn, tuple(index.offset)] = info
        elif objects:
            _place(info, files, index.fqn)
    tensors = {}
    for key, entry in metadata.state_dict_metadata.items():
        if type(key) is not str:
            raise BadCheckpoint(f"{key!r} is no name of a tensor")
        if not isinstance(entry, TensorStorageMetadata):
            continue
        dtype = entry.properties.dtype
        if not isinstance(dtype, torch.dtype):
            raise BadCheckpoint(f"{key} has no dtype")
        shape, chunks = _sizes(entry.size), []
        seen: set[tuple[int, ...]] = set()
        for chunk in entry.chunks:
            offsets, lengths = _sizes(chunk.offsets), _sizes(chunk.sizes)
            if len(offsets) != len(shape) or any(o + n > s for o, n, s in zip(offsets, lengths, shape, strict=True)):
                raise BadCheckpoint(f"a chunk of {key} {list(shape)} is outside: {list(offsets)}, {list(lengths)}")
            if offsets in seen:
                raise BadCheckpoint(f"a chunk of {key} at {list(offsets)} stands twice")
            seen.add(offsets)
            info = places.get((key, offsets))
            if info is None:
                raise BadCheckpoint(f"a chunk of {key} at {list(offsets)} lies nowhere")
            begin, length = _place(info, files, key)
            if math.prod(lengths) * dtype.itemsize > length:
                raise BadCheckpoint(f"{info.relative_path}: {length} bytes cannot hold {key} {list(lengths)}")
            if 0 not in lengths:
                chunks.append(Chunk(offsets, lengths, folder / info.relative_path, begin, length))
        tensors[key] = SavedTensor(key, dtype, shape, tuple(chunks))
    return tensors


class TorchDistReader:
    """The tensors of a torch_dist folder; any rows of them."""

    def __init__(self, path: str | Path) -> None:
        """Raises BadCheckpoint for a folder that is none, whose files are missing or cut short, or whose pickles
        refer to anything but tensors."""
        self.path = checkpoint_folder(path)
        self._files = Files()
        self._starts: dict[tuple[Path, int], int] = {}
        self._by_index: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}
        self._lock = threading.Lock()
        _, self.tensors = read_metadata(self.path, objects=False)

    def _start(self, tensor: SavedTensor, chunk: Chunk) -> int:
        """Where the chunk's numbers begin in its file."""
        place = (chunk.path, chunk.offset)
        with self._lock:
            if place in self._starts:
                return self._starts[place]
        try:
            window = io.BufferedReader(_Window(self._files, chunk.path, chunk.offset, chunk.length), 1 << 10)
            with zipfile.ZipFile(window) as archive:
                [pickled] = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                entry = archive.getinfo(pickled)
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > MOST_DIRECTORY_BYTES:
                    raise BadCheckpoint(f"{pickled} is compressed, or too large")
                (_, kind, number, _, _), first, size, stride = _ArchiveUnpickler(archive.read(pickled)).load()
                if type(kind) is not str or type(number) is not str or type(first) is not int or first < 0:
                    raise BadCheckpoint("it is not stored as .metadata says")
                record = archive.getinfo(f"{pickled.removesuffix('data.pkl')}data/{number}")
            header = bytearray(30)
            self._files.read_into(chunk.path, chunk.offset + record.header_offset, memoryview(header))
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{chunk.path}: {tensor.key}: {error}") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file system's; one without a number is of an impossible place in the archive
            raise BadCheckpoint(f"{chunk.path}: {tensor.key} is damaged: {type(error).__name__}") from None
        contiguous = torch.empty(chunk.sizes, device="meta").stride()
        itemsize = tensor.dtype.itemsize
        if (
            size != chunk.sizes
            or _STORAGES.get(kind) != tensor.dtype
            or (stride != contiguous and math.prod(size) > 1)
            or record.compress_type != zipfile.ZIP_STORED
            or record.file_size < (first + math.prod(size)) * itemsize
        ):
            raise BadCheckpoint(f"{chunk.path}: {tensor.key} is not stored as .metadata says")
        name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        start = chunk.offset + record.header_offset + 30 + name + extra + first * itemsize
        with self._lock:
            self._starts[place] = start
        return start

    def _chunks_at(self, tensor: SavedTensor, index: tuple[int, ...]) -> list[Chunk]:
        """The chunks that hold some of tensor[index]: of 12,000 chunks of a large model's experts, two or three."""
        lead = len(index)
        with self._lock:
            table = self._by_index.get((tensor.key, lead))
            if table is None:
                table = self._by_index[tensor.key, lead] = defaultdict(list)
                for chunk in tensor.chunks:
                    spans = [range(o, o + n) for o, n in zip(chunk.offsets[:lead], chunk.sizes[:lead])]
                    for place in itertools.product(*spans):
                        table[place].append(chunk)
            return table.get(index, [])

    def read_rows(self, key: str, index: tuple[int, ...], start: int, stop: int, out: torch.Tensor) -> None:
        """Rows [start, stop) of tensors[key][index] (its axis 0 after `index`) into out [stop - start, columns].

        `out` has contiguous rows. BadCheckpoint if the chunks do not cover them.
        """
        tensor = self.tensors[key]
        lead = len(index)
        if stop == start:
            return
        if len(tensor.shape) <= lead:
            raise BadCheckpoint(f"{key}: shape {list(tensor.shape)} has no rows behind {list(index)}")
        columns = math.prod(tensor.shape[lead + 1 :])
        covered = 0
        boxes: list[tuple[int, int, int, int]] = []
        for chunk in self._chunks_at(tensor, index):
            low, height = chunk.offsets[lead], chunk.sizes[lead]
            first, last = max(start, low), min(stop, low + height)
            if first >= last:
                continue
            # rows of a chunk that is cut along columns too (row-parallel layers) are shorter than out's
            if chunk.sizes[lead + 2 :] != tensor.shape[lead + 2 :]:
                raise BadCheckpoint(f"{key}: cut along more than two dimensions")
            width = math.prod(chunk.sizes[lead + 1 :])
            begin = chunk.offsets[lead + 1] * math.prod(tensor.shape[lead + 2 :]) if width != columns else 0
            if any(first < b and a < last and begin < d and c < begin + width for a, b, c, d in boxes):
                raise BadCheckpoint(f"{self.path}: {key}{list(index)}: two chunks hold the same rows")
            boxes.append((first, last, begin, begin + width))
            number = 0
            for offset, size, i in zip(chunk.offsets, chunk.sizes, index):
                number = number * size + i - offset
            at = self._start(tensor, chunk) + (number * height + first - low) * width * tensor.dtype.itemsize
            target = out[first - start : last - start]
            if width == columns:
                self._files.read_into(chunk.path, at, as_bytes(target))
            else:
                part = scratch.take("torch_dist", tensor.dtype, last - first, width)
                self._files.read_into(chunk.path, at, as_bytes(part))
                target[:, begin : begin + width] = part
            covered += (last - first) * width
        if covered != (stop - start) * columns:
            raise BadCheckpoint(
                f"{self.path}: {key}{list(index)} is incomplete: {covered} of {(stop - start) * columns}"
            )

    def close(self) -> None:
        """Close the files."""
        self._files.close()
