"""Thousands of damaged headers, indexes and checkpoints' metadata: each is read completely or is one clean error."""

import json
import math
import os
import pickle
import random
import struct
from pathlib import Path

import pytest
import tiny_folders
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fp8slurm.checkpoint.formats.hf_folder import natural, open_hf
from fp8slurm.checkpoint.formats.safetensors_file import DTYPES, TensorInfo, lay_out, read_header
from fp8slurm.checkpoint.formats.torch_dist import TorchDistReader
from fp8slurm.core.errors import BadCheckpoint

TENSORS = {
    "a.weight": torch.zeros(3, 4),
    "b": torch.zeros(5, dtype=torch.bfloat16),
    "c": torch.zeros(0, 2),
    "d": torch.tensor(1),
}


def read(path: Path) -> bool:
    """Whether the file is accepted; everything found must then lie inside it. Only BadCheckpoint may be raised."""
    try:
        located, _ = read_header(path)
    except BadCheckpoint as error:
        assert str(path) in str(error)
        return False
    size = path.stat().st_size
    assert all(0 < t.offset <= t.offset + t.info.nbytes <= size for t in located.values())
    return True


def test_flipped_bytes_cuts_and_lengths(tmp_path: Path) -> None:
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_file(TENSORS, good, metadata={"format": "pt"})
    assert read(good)
    whole = good.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    rng = random.Random(0)
    accepted = 0
    for i in range(2000):
        data = bytearray(whole)
        kind = i % 5
        if kind == 0:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(8 + length)] = rng.randrange(256)
        elif kind == 1:
            del data[rng.randrange(len(data)) :]
        elif kind == 2:
            data[:8] = struct.pack(
                "<Q", rng.choice([0, 1, length - 1, length + 1, 2**40, 2**64 - 1, rng.randrange(2 * len(data))])
            )
        elif kind == 3:
            data += bytes(rng.randint(1, 9))
        else:
            at = 8 + rng.randrange(length)
            data[at : at + rng.randint(0, 4)] = bytes(rng.randrange(32, 127) for _ in range(rng.randint(0, 4)))
        path.write_bytes(data)
        accepted += read(path)
    assert accepted < 400  # a changed letter of a name is no damage that a header shows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.sampled_from(["", "F32", "BF16", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "k"]), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "bf16"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**64), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@settings(max_examples=1000, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), ENTRY | JSON, max_size=3) | JSON, data=st.integers(0, 64))
def test_headers_of_any_json(tmp_path_factory: pytest.TempPathFactory, header: object, data: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    read(path)


FOUR_AT_2 = b'{"dtype":"U8","shape":[4],"data_offsets":[2,6]}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":%s}' % FOUR_AT_2, "twice"),
        (b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":%s}' % FOUR_AT_2, "ends at 4"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "starts at 4"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "takes 8 bytes"),
        (b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "no list of at most 16 sizes"),
        (b'{"__metadata__":{"a":1}}', "text to text"),
        (b"[1]", "no JSON object"),
    ],
)
def test_what_is_said_about_a_header(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(BadCheckpoint, match=message):
        read_header(path)


def test_damaged_indexes(tmp_path: Path) -> None:
    folder = tiny_folders.make(tmp_path / "src", files=3)
    path = folder / "model.safetensors.index.json"
    whole = path.read_text()
    open_hf(folder)
    rng = random.Random(0)
    for i in range(1500):
        text = list(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 3)] = [chr(rng.randrange(32, 127)) for _ in range(rng.randint(0, 3))]
        if i % 4 == 0:
            text = text[: rng.randrange(len(text))]
        path.write_text("".join(text))
        try:
            assert len(open_hf(folder).tensors) > 0
        except BadCheckpoint:
            continue
        index = json.loads(path.read_text())  # accepted: then it still says what the files hold
        assert index["weight_map"] == json.loads(whole)["weight_map"]


def test_damaged_torch_dist_metadata(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "ckpt"
    dcp.save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}, checkpoint_id=folder, no_dist=True)
    whole = (folder / ".metadata").read_bytes()
    out = torch.empty(2, 3)
    TorchDistReader(folder).read_rows("a", (), 0, 2, out)
    assert out.flatten().tolist() == list(range(6))
    rng = random.Random(0)
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / ".metadata").write_bytes(data)
        try:
            reader = TorchDistReader(folder)
            for key, saved in reader.tensors.items():
                rows = min(saved.shape[0], 100) if saved.shape else 0
                reader.read_rows(
                    key, (), 0, rows, torch.empty(rows, min(math.prod(saved.shape[1:]), 100), dtype=saved.dtype)
                )
        except BadCheckpoint:
            continue


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadCheckpoint, match="no place there"):
        TorchDistReader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["os.mkdir", "os", "FileSystemReader", "Path"])
def test_what_torchs_own_modules_import_is_refused_too(tmp_path: Path, name: str) -> None:
    """A call of torch.distributed.checkpoint.filesystem's NAME, as protocol 4 can write it."""

    def text(value: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(value.encode())]) + value.encode()

    (tmp_path / "m").mkdir()
    call = text("torch.distributed.checkpoint.filesystem") + text(name) + pickle.STACK_GLOBAL
    call += text(os.path.relpath(tmp_path / "ran")) + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP
    (tmp_path / "m/.metadata").write_bytes(pickle.PROTO + b"\x04" + call)
    with pytest.raises(BadCheckpoint, match="no place there"):
        TorchDistReader(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 5), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_layout_is_what_the_safetensors_library_reads(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "layout.safetensors"
    infos = [TensorInfo(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)]
    layout = lay_out(path.name, infos)
    data = bytes(i % 2 for i in range(layout.data_bytes))
    path.write_bytes(layout.header + data)
    assert layout.nbytes == path.stat().st_size
    loaded = load_file(path)
    located, metadata = read_header(path)
    assert metadata == {"format": "pt"} and len(layout.header) % 8 == 0
    for info in infos:
        assert tuple(loaded[info.name].shape) == info.shape and loaded[info.name].dtype == info.dtype
        assert located[info.name].info == info and located[info.name].offset % info.dtype.itemsize == 0
        raw = loaded[info.name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if info.nbytes else b""
        offset = layout.tensors[info.name][1] - len(layout.header)
        assert raw == data[offset : offset + info.nbytes]


def test_natural_order() -> None:
    names = ["m.layers.10.a", "m.layers.2.a", "lm_head", "m.layers.2.a_scale", "m.embed"]
    assert sorted(names, key=natural) == ["lm_head", "m.embed", "m.layers.2.a", "m.layers.2.a_scale", "m.layers.10.a"]
