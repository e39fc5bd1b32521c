"""What make_packs.py blanks in CUDA libraries: other architectures' code, nothing else."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "gpu"))
import fatbin  # noqa: E402
import trim_fa3  # noqa: E402


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    return struct.pack("<HHIQIIHHI", kind, 257, 64, len(payload), 0, 0, 0, 0, arch).ljust(64, b"\0") + payload


def container(*entries: bytes) -> bytes:
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(b"".join(entries))) + b"".join(entries)


@pytest.fixture
def mapped(tmp_path: Path) -> Callable[[bytes], mmap.mmap]:
    def write(content: bytes) -> mmap.mmap:
        path = tmp_path / "library"
        path.write_bytes(content)
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)

    return write


def test_code_of_other_architectures_becomes_zeros(mapped: Callable[[bytes], mmap.mmap]) -> None:
    before = b"host code" * 9
    content = (
        before + container(entry(2, 80, b"A" * 40), entry(2, 90, b"B" * 32), entry(1, 90, b"C" * 24)) + b"data" * 5
    )
    library = mapped(content)
    assert fatbin.zero(library, fatbin.for_arch(90)) == (32, 64)
    assert library[:] == content.replace(b"A" * 40, bytes(40)).replace(b"C" * 24, bytes(24))


def test_a_kernel_that_is_only_there_as_ptx_keeps_the_newest_that_the_gpu_can_compile(
    mapped: Callable[[bytes], mmap.mmap],
) -> None:
    library = mapped(
        container(entry(1, 75, b"A" * 8), entry(1, 80, b"B" * 8), entry(1, 120, b"C" * 8), entry(2, 86, b"D" * 8))
    )
    assert fatbin.zero(library, fatbin.for_arch(90)) == (8, 24)
    assert b"B" * 8 in library[:] and not any(x in library[:] for x in (b"AAAA", b"CCCC", b"DDDD"))


def test_the_magic_number_in_other_data_is_left_alone(mapped: Callable[[bytes], mmap.mmap]) -> None:
    content = fatbin.MAGIC + struct.pack("<Q", 1 << 40) + b"x" * 100 + container(entry(2, 80, b"A" * 8))
    library = mapped(content)
    assert fatbin.zero(library, fatbin.for_arch(90)) == (0, 8)
    assert library[:] == content.replace(b"A" * 8, bytes(8))


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs zstd")
@pytest.mark.parametrize(("flags", "arch"), [(0x6005A04, 90), (0x5A055A, 90), (0x5006402, 100), (0x500550, 80)])
def test_a_compressed_cubin_is_known_by_its_flags(tmp_path: Path, flags: int, arch: int) -> None:
    """Both layouts of e_flags, as CUDA 13's cuBLASLt has them."""
    cubin = bytearray(b"\x7fELF".ljust(5000, b"k"))
    cubin[18:20] = (190).to_bytes(2, "little")
    cubin[48:52] = flags.to_bytes(4, "little")
    frame = subprocess.run(["zstd", "-q", "-c"], input=bytes(cubin), stdout=subprocess.PIPE, check=True).stdout
    path = tmp_path / "library"
    path.write_bytes(b"before" + frame + b"after")
    assert fatbin.cubin_arch(frame) == arch
    assert fatbin.blank_compressed_cubins(path, 90) == (0 if arch == 90 else len(frame))
    assert path.read_bytes() == b"before" + (frame if arch == 90 else bytes(len(frame))) + b"after"


def forward(head_dim: int, element: str) -> str:
    """The part of a mangled name that tells FA3's forward kernels apart."""
    tile = f"NS6_IJNS7_ILi64EEENS7_ILi{head_dim}EEESB_EEE"
    mainloop = f"CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS5_1CILi1EEES8_S8_EEE{tile}"
    return f"FlashAttnFwdSm90INS1_25{mainloop}Li{head_dim}ENS_{len(element)}{element}EfNS_4arch4Sm90E"


@pytest.mark.parametrize(
    ("kernel", "kept"),
    [
        (forward(128, "bfloat16_t"), True),
        (forward(128, "float_e4m3_t"), True),
        (forward(128, "half_t"), False),
        (forward(64, "bfloat16_t"), False),
        ("FlashAttnFwdCombineIN4cute5tupleIJNS3_1CILi16EEENS5_ILi64EEEEEELi8E", True),
        ("prepare_varlen_num_blocks_kernelILi8ELb0EEEviiiPKi", True),
        ("somethingElse", False),
    ],
)
def test_fa3_keeps_one_head_dimension_in_bf16_and_fp8(
    mapped: Callable[[bytes], mmap.mmap], kernel: str, kept: bool
) -> None:
    payload = b"..text._Z" + kernel.encode() + b"\0"
    library = mapped(container(entry(2, 80, payload), entry(2, 90, payload)))
    assert fatbin.zero(library, trim_fa3.needed(128, frozenset(trim_fa3.TYPES)))[0] == (len(payload) if kept else 0)
