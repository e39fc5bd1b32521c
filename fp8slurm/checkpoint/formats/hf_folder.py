"""A Hugging Face folder as it lies on disk: config, index and safetensors files, checked against each other."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.formats.safetensors_file import Located, read_header
from fp8slurm.core import files
from fp8slurm.core.errors import BadCheckpoint

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LONGEST_NAME = 256
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".distcp")


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name)]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. BadCheckpoint: it is none; OSError: it cannot be read."""
    return files.read_json(path, BadCheckpoint)


def _read_index(folder: Path) -> tuple[dict[str, str], Any]:
    """weight_map (tensor name -> file name), checked for form only, and total_size of the index as it stands."""
    path = folder / INDEX
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{path}: no weight_map")
    for name, file in weight_map.items():
        fits = isinstance(file, str) and Path(file).name == file and len(file) < LONGEST_NAME
        if not fits or not file.endswith(".safetensors"):
            raise BadCheckpoint(f"{path}: {name} lies in {file!r}, which is no safetensors file of this folder")
    metadata = index.get("metadata", {})
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


@dataclass(frozen=True)
class HfFolder:
    """An HF checkpoint: its config and, by name, where each tensor lies. Made by `open_hf`."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Located]

    @property
    def companions(self) -> list[Path]:
        """Files that go with the weights: tokenizer, generation config, chat template; sorted."""
        return sorted(
            p
            for p in self.path.iterdir()
            if p.is_file()
            and not p.name.startswith(".")
            and p.name != "config.json"
            and not p.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        )


def open_hf(path: str | Path) -> HfFolder:
    """Read config.json, the index and every header of an HF folder.

    Raises BadCheckpoint if a shard is missing or damaged, if the index names a tensor that its file does not have,
    or leaves a tensor or a whole file out; FileNotFoundError if there is no such folder. Another total size is logged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(f"{folder}: no config.json")
    config = read_json(folder / "config.json")
    if not (folder / INDEX).exists():
        if (folder / SINGLE).is_file():
            return HfFolder(folder, config, read_header(folder / SINGLE)[0])
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        raise BadCheckpoint(f"{folder}: neither {SINGLE} nor {INDEX}; safetensors files there: {files or 'none'}")
    weight_map, total = _read_index(folder)
    located: dict[str, Located] = {}
    strangers = {p.name for p in folder.glob("[!.]*.safetensors")} - set(weight_map.values())
    if strangers:
        raise BadCheckpoint(f"{folder / min(strangers)} is not mentioned in {INDEX}; move it away if it is no part")
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            names = [n for n, f in weight_map.items() if f == file]
            raise BadCheckpoint(f"{folder}: shard {file} is missing ({len(names)} tensors, the first {names[0]})")
        tensors, _ = read_header(folder / file)
        for name, tensor in tensors.items():
            if weight_map.get(name) != file:
                where = f"in {weight_map[name]}" if name in weight_map else "nowhere"
                raise BadCheckpoint(f"{folder / file} holds {name}; {INDEX} has it {where}")
            located[name] = tensor
    ghosts = [name for name in weight_map if name not in located]
    if ghosts:
        raise BadCheckpoint(f"{folder / INDEX} names {ghosts[0]} in {weight_map[ghosts[0]]}, which does not hold it")
    size = sum(t.info.nbytes for t in located.values())
    if total is not None and total != size:  # nobody reads it, and converters write other things there
        log.warning("%s: total_size is %r, the tensors take %d bytes", folder / INDEX, total, size)
    return HfFolder(folder, config, located)
