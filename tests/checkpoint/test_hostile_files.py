"""Checkpoints that somebody made to hurt: what they cost is bounded, and so is what is said of them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fp8slurm.checkpoint.formats import torch_dist
from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.checkpoint.formats.torch_dist import TorchDistReader
from fp8slurm.core.errors import LONGEST_LINE, MOST_LINES, BadCheckpoint, InputError, bounded

DEPTH = 60
"""Levels of doubling: 2^60 is no number of anything that ends."""


def doubled(inner: Any = (1, 2)) -> Any:
    for _ in range(DEPTH):
        inner = (inner, inner)
    return inner


def metadata(change: Callable[[Metadata], Any] = lambda m: None) -> Metadata:
    """Of a tensor "a" [2, 3] in one chunk of __0_0.distcp."""
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([2, 3]), [chunk])
    made = Metadata({"a": entry}, None, {MetadataIndex("a", torch.Size([0, 0]), 0): _StorageInfo("__0_0.distcp", 0, 0)})
    change(made)
    return made


def entry(m: Metadata) -> Any:
    return m.state_dict_metadata["a"]


def write(folder: Path, made: Any, archive: bytes | None = None) -> Path:
    if archive is None:
        file = io.BytesIO()
        torch.save(torch.arange(6.0).view(2, 3), file)
        archive = file.getvalue()
    (folder / "__0_0.distcp").write_bytes(archive)
    for info in made.storage_data.values() if isinstance(made, Metadata) else ():
        if info.length == 0:
            info.length = len(archive)
    (folder / ".metadata").write_bytes(made if isinstance(made, bytes) else pickle.dumps(made, protocol=4))
    return folder


def read(folder: Path) -> torch.Tensor:
    out = torch.empty(2, 3)
    TorchDistReader(folder).read_rows("a", (), 0, 2, out)
    return out


def test_the_untouched_one_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path, metadata())).flatten().tolist() == list(range(6))


def frozen(value: Any) -> MetadataIndex:
    """An index whose hash is that of `value`."""
    index = MetadataIndex("a")
    object.__setattr__(index, "offset", value)
    return index


class _Unhashed(dict):
    """Pickled as a dictionary of pairs whose keys were never hashed here."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__()
        self.pairs = pairs

    def __reduce__(self) -> Any:
        return (dict, (), None, None, iter(self.pairs))


HOSTILE: dict[str, Callable[[Metadata], Any]] = {
    "sizes": lambda m: setattr(entry(m).chunks[0], "sizes", doubled()),
    "shape": lambda m: setattr(entry(m), "size", doubled()),
    "file name": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", doubled()),
    "key": lambda m: setattr(m, "state_dict_metadata", _Unhashed([(doubled(), 1)])),
    "index": lambda m: setattr(m, "storage_data", _Unhashed([(frozen(doubled()), 1)])),
    "index of an index": lambda m: setattr(m, "storage_data", _Unhashed([(frozen(frozen(doubled())), 1)])),
    "planner": lambda m: setattr(m, "planner_data", doubled()),
    "many dimensions": lambda m: setattr(entry(m), "size", torch.Size([1] * 5000)),
    "another folder": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../../etc/passwd"),
    "a name of 1 MB": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "x" * 10**6),
    "transformed": lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["zstd"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_metadata_that_doubles_ends_at_once(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadCheckpoint) as caught:
        read(write(tmp_path, metadata(HOSTILE[name])))
    assert str(tmp_path / ".metadata") in str(caught.value) and len(str(caught.value)) <= LONGEST_LINE


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04" + b"(" * 100_000 + b".",
        b"\x80\x04]" + b"]a" * 5 + b".",
        b"\x80\x04\x8f.",  # a set
        b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",  # a byte array of 2^60
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",  # bytes
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}(X\x01\x00\x00\x00aK\x01ub.",  # of the class itself
        b"",
        b"\x80\x04N.",
    ],
)
def test_programs_that_no_checkpoint_needs(tmp_path: Path, program: bytes) -> None:
    with pytest.raises(BadCheckpoint, match="metadata"):
        read(write(tmp_path, program))
    assert not hasattr(Metadata, "a")


def test_metadata_may_not_be_larger_than_any_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_dist, "MOST_METADATA_BYTES", 100)
    with pytest.raises(BadCheckpoint, match="at most 100 are allowed"):
        read(write(tmp_path, metadata()))


def archive(data_pkl: bytes, compression: int = zipfile.ZIP_STORED, more: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", data_pkl, compress_type=compression)
        made.writestr("archive/data/0", bytes(24))
        for i in range(more):
            made.writestr(f"archive/{i:0100}", b"")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["deflated", "large", "long directory", "doubled"])
def test_an_archive_takes_no_more_memory_than_it_should(tmp_path: Path, kind: str) -> None:
    if kind == "deflated":  # 400 MB of text
        made = archive(b"\x80\x04X\x00\x00\x00\x18" + b"x" * 0x18000000 + b".", zipfile.ZIP_DEFLATED)
        assert len(made) < 10**6
    elif kind == "large":
        made = archive(pickle.dumps(b"x" * 2_000_000))
    elif kind == "long directory":
        made = archive(b"N.", more=8000)
    else:
        made = archive(pickle.dumps(doubled()))
    folder = write(tmp_path, metadata(), made)
    tracemalloc.start()
    try:
        with pytest.raises(BadCheckpoint, match="__0_0.distcp"):
            read(folder)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_two_chunks_of_the_same_numbers_are_refused(tmp_path: Path) -> None:
    """Together as many as the tensor has, but some are there twice, and others not."""
    made, file = metadata(), io.BytesIO()
    torch.save(torch.arange(2.0).view(1, 2), file)
    offsets = [(0, 0), (0, 1)]
    entry(made).size = torch.Size([1, 4])
    entry(made).chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size([1, 2])) for o in offsets]
    made.storage_data = {MetadataIndex("a", o): _StorageInfo("__0_0.distcp", 0, 0) for o in offsets}
    folder = write(tmp_path, made, file.getvalue())
    with pytest.raises(BadCheckpoint, match="two chunks hold the same rows"):
        TorchDistReader(folder).read_rows("a", (), 0, 1, torch.empty(1, 4))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "shard"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path: Path, file: str, kind: str) -> None:
    folder = tiny_folders.make(tmp_path / "src", files=3)
    path = next(folder.glob("*-00002-*")) if file == "shard" else folder / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(BadCheckpoint, match=path.name):
        open_hf(folder)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_only_regular_files_are_read_of_torch_dist(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path, metadata())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name) if kind == "fifo" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(BadCheckpoint, match="distcp is missing|no torch_dist checkpoint"):
        read(tmp_path)


@pytest.mark.parametrize("word", ["9" * 5000, "\u00b2", "../elsewhere", "\x00", "", "x" * 300])
def test_the_newest_iteration_is_a_folder_in_it(tmp_path: Path, word: str) -> None:
    write(tmp_path / "src" if (tmp_path / "src").mkdir() else tmp_path / "src", metadata())
    shutil.copytree(tmp_path / "src", tmp_path / "elsewhere")
    (tmp_path / "src/.metadata").unlink()
    (tmp_path / "src/latest_checkpointed_iteration.txt").write_text(word)
    with pytest.raises(BadCheckpoint, match="no torch_dist checkpoint"):
        TorchDistReader(tmp_path / "src")


def test_an_index_of_any_size_is_not_read(tmp_path: Path) -> None:
    folder = tiny_folders.make(tmp_path / "src", files=3)
    with (folder / "model.safetensors.index.json").open("r+b") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(BadCheckpoint, match="at most 100000000 are allowed"):
        open_hf(folder)


def test_what_is_said_is_bounded(tmp_path: Path) -> None:
    folder = tiny_folders.make(tmp_path / "src", files=3)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x" * 100_000] = "y" * 100_000
    path.write_text(json.dumps(index))
    with pytest.raises(BadCheckpoint) as caught:
        open_hf(folder)
    said = str(caught.value)
    assert (
        len(said) <= LONGEST_LINE and str(path) in said and said.endswith("which is no safetensors file of this folder")
    )
    many = str(InputError("\n".join(["first", *["line"] * 100])))
    assert many.count("\n") == MOST_LINES and many.startswith("first\n") and many.endswith("(61 more lines)")
    assert bounded("short\nlines") == "short\nlines"
