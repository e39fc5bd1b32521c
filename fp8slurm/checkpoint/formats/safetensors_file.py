"""The safetensors format: headers checked as they are read, and laid out before anything is written.

A file is: 8 bytes little-endian header length, the header as JSON, the data of all tensors without gaps. Reading
checks everything that can be checked without the data, so that a damaged file is an error here and not garbage later.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8slurm.core.errors import BadCheckpoint

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
MAX_NAME = 1000


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor, seen as a matrix of rows x columns (axis 0 x all others)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Located:
    """A tensor's bytes in a file: [offset, offset + info.nbytes)."""

    info: TensorInfo
    path: Path
    offset: int


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise BadCheckpoint("a key stands twice in the header")
    return unique


def _is_text(value: Any) -> bool:
    """JSON can write half of a character (\\ud83d), which the safetensors library refuses."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _parse_entry(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    if len(name) > MAX_NAME or not _is_text(name):
        raise BadCheckpoint(f"{name!r:.80} is no name of at most {MAX_NAME} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadCheckpoint(f"{name}: the entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadCheckpoint(f"{name}: dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_whole_number, shape)):
        raise BadCheckpoint(f"{name}: shape {shape!r} is no list of at most {MAX_DIMENSIONS} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole_number, offsets)):
        raise BadCheckpoint(f"{name}: data_offsets {offsets!r} are not [begin, end]")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != info.nbytes:
        raise BadCheckpoint(f"{name}: {dtype} {shape} takes {info.nbytes} bytes, data_offsets give {offsets}")
    return info, offsets[0], offsets[1]


def _parse(raw: bytes) -> tuple[list[tuple[TensorInfo, int, int]], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except BadCheckpoint:
        raise
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"the header is not JSON: {str(error)[:200]}") from None
    if not isinstance(header, dict):
        raise BadCheckpoint("the header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise BadCheckpoint("__metadata__ must map text to text")
    return [_parse_entry(name, entry) for name, entry in header.items()], metadata


def read_header(path: Path) -> tuple[dict[str, Located], dict[str, str]]:
    """All tensors of a safetensors file by name, and its metadata; no data is read.

    Raises BadCheckpoint, naming the file, for anything that is not exactly a safetensors file: a header that is cut
    short or wrong, offsets that overlap or leave gaps, a file shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise BadCheckpoint(f"truncated: {size} bytes, not even a header length")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES:
                raise BadCheckpoint(f"header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
            if 8 + length > size:
                raise BadCheckpoint(f"truncated: {size} bytes, the header alone would end at {8 + length}")
            entries, metadata = _parse(file.read(length))
        end = 0
        for info, begin, stop in sorted(entries, key=lambda e: (e[1], e[2])):
            if begin != end:
                raise BadCheckpoint(f"{info.name}: starts at {begin}, the tensor before it ends at {end}")
            end = stop
        if 8 + length + end != size:
            what = "truncated" if 8 + length + end > size else "too long"
            raise BadCheckpoint(f"{what}: {size} bytes, the header says {8 + length + end}")
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    return {info.name: Located(info, path, 8 + length + begin) for info, begin, _ in entries}, metadata


@dataclass(frozen=True)
class ShardLayout:
    """A safetensors file before it is written: `header` goes first, each tensor at its offset in the file."""

    file_name: str
    header: bytes
    tensors: dict[str, tuple[TensorInfo, int]]
    nbytes: int

    @property
    def data_bytes(self) -> int:
        return self.nbytes - len(self.header)


def lay_out(file_name: str, infos: Iterable[TensorInfo]) -> ShardLayout:
    """Wider dtypes first, so that every tensor is aligned for its own; otherwise in the order given."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, at = [], 0
    for info in sorted(infos, key=lambda t: -t.dtype.itemsize):
        entries[info.name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [at, at + info.nbytes],
        }
        placed.append((info, at))
        at += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    tensors = {info.name: (info, len(header) + offset) for info, offset in placed}
    return ShardLayout(file_name, header, tensors, len(header) + at)
