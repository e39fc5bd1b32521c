"""Where tensors come from: any row range of any tensor, read into a buffer that is used again and again.

A source shows a checkpoint in canonical Hugging Face form (experts one by one), whatever it looks like on disk.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Protocol

import torch

from fp8slurm.checkpoint.formats.hf_folder import HfFolder, natural
from fp8slurm.checkpoint.formats.safetensors_file import Located, TensorInfo
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.fp8.block import FLOAT_DTYPES, BlockFP8, scale_shape
from fp8slurm.fp8.policy import FUSED_EXPERTS
from fp8slurm.fp8.quantize import dequantize

SCALE_SUFFIX = "_scale_inv"
MOST_EXPERTS = 65_536
"""In one fused tensor."""


class Scratch(threading.local):
    """Named byte buffers of the current thread; a buffer lasts until its name is taken again."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, role: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """An uninitialised [rows, columns] tensor in the buffer of that name."""
        nbytes = rows * columns * dtype.itemsize
        held = self._held.get(role)
        if held is None or held.numel() < nbytes:
            held = self._held[role] = torch.empty(nbytes, dtype=torch.uint8)
        return held[:nbytes].view(dtype).view(rows, columns)


scratch = Scratch()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy().data


class Files:
    """Open file descriptors for positioned reads from many threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill buffer from path at offset; BadCheckpoint if the file ends before."""
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY)
            descriptor = self._open[path]
        done = 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done:]], offset + done)
            if got == 0:
                raise BadCheckpoint(f"{path}: truncated while it was read, at byte {offset + done}")
            done += got

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()


class Source(Protocol):
    """A checkpoint's tensors in canonical HF form, in canonical (natural) order."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int, stop: int, role: str = "in") -> torch.Tensor:
        """Rows [start, stop) as [stop - start, columns], in this thread's scratch buffer `role`."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def _one_by_one(fused: Located) -> list[Located]:
    """The experts of a 3-D tensor that transformers 5 fuses: gate_up_proj [E, 2I, H] or down_proj [E, H, I]."""
    name, dtype, shape = fused.info.name, fused.info.dtype, fused.info.shape
    if len(shape) != 3:
        raise BadCheckpoint(f"{fused.path}: {name} has shape {list(shape)}; fused experts have three dimensions")
    if 0 in shape or shape[0] > MOST_EXPERTS:
        raise BadCheckpoint(f"{fused.path}: {name} {list(shape)}: allowed: 1 to {MOST_EXPERTS} experts, with values")
    stem, kind = name.rsplit(".", 1)
    parts = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
    if shape[1] % len(parts):
        raise BadCheckpoint(f"{fused.path}: {name} {list(shape)}: gate and up do not split evenly")
    rows = shape[1] // len(parts)
    step = rows * shape[2] * dtype.itemsize
    return [
        Located(
            TensorInfo(f"{stem}.{expert}.{part}.weight", dtype, (rows, shape[2])),
            fused.path,
            fused.offset + (expert * len(parts) + i) * step,
        )
        for expert in range(shape[0])
        for i, part in enumerate(parts)
    ]


class HfSource:
    """An HF folder as it is, but fused experts taken apart."""

    def __init__(self, folder: HfFolder) -> None:
        located: dict[str, Located] = {}
        for tensor in folder.tensors.values():
            fused = FUSED_EXPERTS.fullmatch(tensor.info.name)
            for part in _one_by_one(tensor) if fused else [tensor]:
                if part.info.name in located:
                    raise BadCheckpoint(f"{folder.path}: {part.info.name} is there fused and on its own")
                located[part.info.name] = part
        self._located = {name: located[name] for name in sorted(located, key=natural)}
        self.tensors = {name: tensor.info for name, tensor in self._located.items()}
        self._files = Files()

    def read(self, name: str, start: int, stop: int, role: str = "in") -> torch.Tensor:
        tensor = self._located[name]
        info = tensor.info
        rows = scratch.take(role, info.dtype, stop - start, info.columns)
        self._files.read_into(tensor.path, tensor.offset + start * info.row_bytes, as_bytes(rows))
        return rows

    def whole(self, name: str) -> torch.Tensor:
        """The tensor in its own shape and in memory of its own."""
        tensor = self._located[name]
        out = torch.empty(tensor.info.shape, dtype=tensor.info.dtype)
        self._files.read_into(tensor.path, tensor.offset, as_bytes(out))
        return out

    def close(self) -> None:
        self._files.close()


class DequantizedSource:
    """A block FP8 source shown as if it were not quantized: X.weight and X.weight_scale_inv as X.weight in dtype.

    Scales may be fp32, or bf16 and fp16 as in Qwen's own FP8 folders: made fp32, they are the same numbers.
    """

    def __init__(self, source: Source, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> None:
        self._source, self._block, self._dtype = source, block, dtype
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            if name.endswith(".weight" + SCALE_SUFFIX):
                codes = source.tensors.get(name.removesuffix(SCALE_SUFFIX))
                if codes is None or codes.dtype != torch.float8_e4m3fn:
                    raise BadCheckpoint(f"{name} has no FP8 weight that it belongs to")
                continue
            if info.dtype == torch.float8_e5m2:
                raise BadCheckpoint(f"{name} is e5m2; only e4m3 can be read")
            if info.dtype == torch.float8_e4m3fn:
                self._check_scale(info)
                info = TensorInfo(name, dtype, info.shape)
            self.tensors[name] = info

    def _check_scale(self, codes: TensorInfo) -> None:
        scale = self._source.tensors.get(codes.name + SCALE_SUFFIX)
        if scale is None:
            raise BadCheckpoint(f"{codes.name} is FP8 but {codes.name + SCALE_SUFFIX} is missing")
        if scale.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
            raise BadCheckpoint(f"{scale.name} is {str(scale.dtype).removeprefix('torch.')}; scales can be {allowed}")
        if len(codes.shape) != 2 or scale.shape != scale_shape(codes.shape, self._block):
            raise BadCheckpoint(
                f"{scale.name}: shape {list(scale.shape)} does not fit {list(codes.shape)} in blocks of "
                f"{list(self._block)} (config.json: weight_block_size)"
            )

    def read(self, name: str, start: int, stop: int, role: str = "in") -> torch.Tensor:
        info = self.tensors[name]
        if self._source.tensors[name].dtype != torch.float8_e4m3fn:
            return self._source.read(name, start, stop, role)
        height = self._block[0]
        top = start // height * height
        first, last = start // height, -(-stop // height)
        codes = self._source.read(name, top, stop, role + ".codes")
        scale_inv = self._source.read(name + SCALE_SUFFIX, first, last, role + ".scale").float()
        out = scratch.take(role, info.dtype, stop - top, info.columns)
        dequantize(BlockFP8(codes, scale_inv, self._block), out=out)
        return out[start - top :]

    def close(self) -> None:
        self._source.close()
