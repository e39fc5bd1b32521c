"""GPU code inside shared libraries: find the entries of their fatbins and blank those that one GPU never loads.

A CUDA library holds machine code and PTX for many architectures side by side, each an entry of a fat binary
("fatbin"). The driver reads only the entry that fits the GPU. Zeros in place of the others keep every offset of the
library and compress to nothing. The layout is that of `fatbinary_section.h` and of what cuobjdump prints; it is not a
public interface, so `blank` only ever writes inside an entry whose bounds it has checked.
"""

from __future__ import annotations

import mmap
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CONTAINER = struct.Struct("<IHHQ")
"""Magic number, version, size of this header, size of all entries after it."""
ENTRY = struct.Struct("<HHIQIIHHI")
"""Kind, version, size of this header, size of the payload, five fields that are not read here, architecture."""
MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, CONTAINER.size)
PTX, MACHINE_CODE = 1, 2


@dataclass(frozen=True)
class Entry:
    """One architecture's code in a fatbin: `library[start:end]`, compressed or not."""

    kind: int
    arch: int
    start: int
    end: int


def containers(library: mmap.mmap) -> Iterator[list[Entry]]:
    """The fatbins of a library, in order, each as its entries."""
    at = 0
    while (at := library.find(MAGIC, at)) >= 0:
        size = CONTAINER.unpack_from(library, at)[3]
        place, end = at + CONTAINER.size, at + CONTAINER.size + size
        if end > len(library):  # the magic number by chance, as data
            at += len(MAGIC)
            continue
        entries = []
        while place + ENTRY.size <= end:
            kind, _, header, payload, *_, arch = ENTRY.unpack_from(library, place)
            if header == 0 or place + header + payload > end:
                break
            entries.append(Entry(kind, arch, place + header, place + header + payload))
            place += header + payload
        yield entries
        at = end


def for_arch(arch: int) -> Callable[[mmap.mmap, list[Entry]], set[Entry]]:
    """What a GPU of capability `arch` (90: Hopper) loads: its machine code, else the newest PTX that it can compile."""

    def choose(library: mmap.mmap, entries: list[Entry]) -> set[Entry]:
        code = {e for e in entries if e.kind == MACHINE_CODE and e.arch == arch}
        ptx = [e for e in entries if e.kind == PTX and e.arch <= arch]
        return code or set(sorted(ptx, key=lambda e: e.arch)[-1:])

    return choose


def zero(library: mmap.mmap, choose: Callable[[mmap.mmap, list[Entry]], set[Entry]]) -> tuple[int, int]:
    """Write zeros, in place, over all entries that `choose` does not return. Bytes of GPU code (kept, blanked)."""
    kept = blanked = 0
    for entries in containers(library):
        chosen = choose(library, entries)
        for entry in entries:
            size = entry.end - entry.start
            if entry in chosen:
                kept += size
            else:
                library[entry.start : entry.end] = bytes(size)
                blanked += size
    return kept, blanked


def blank(path: Path, choose: Callable[[mmap.mmap, list[Entry]], set[Entry]]) -> tuple[int, int]:
    """`zero` for a shared library, and strip symbols that no loader reads. Bytes of GPU code (kept, blanked)."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        sizes = zero(library, choose)
    subprocess.run(["strip", "--strip-unneeded", str(path)], check=True)
    return sizes


ZSTD_MAGIC = struct.pack("<I", 0xFD2FB528)
ELF_MAGIC, CUDA_MACHINE = b"\x7fELF", 190


def zstd_frame_end(data: mmap.mmap, start: int) -> int | None:
    """The end of the Zstandard frame at `start`, by its blocks' headers (RFC 8878, 3.1.1); None: it is no frame."""
    descriptor = data[start + 4]
    single_segment, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    at = start + 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3] + content_size
    while at + 3 <= len(data):
        block = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        if kind == 3 or size > 1 << 17:
            return None
        at += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
        if last:
            end = at + 4 * checksum
            return end if end <= len(data) else None
    return None


def cubin_arch(frame: bytes) -> int | None:
    """The architecture of a compressed cubin; None for anything else. Needs the `zstd` program."""
    head = subprocess.run(["zstd", "-dcq"], input=frame, capture_output=True).stdout[:64]
    if len(head) < 64 or head[:4] != ELF_MAGIC or int.from_bytes(head[18:20], "little") != CUDA_MACHINE:
        return None
    flags = int.from_bytes(head[48:52], "little")
    # since CUDA 13 the architecture is the second byte of the flags, before it was the lowest
    return flags >> 8 & 0xFF if flags >> 24 else flags & 0xFF


def blank_compressed_cubins(path: Path, arch: int) -> int:
    """Zeros over cubins of other architectures that a library holds outside fatbins, in Zstandard frames, as cuBLASLt
    does. Bytes blanked."""
    blanked = at = 0
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        while (at := library.find(ZSTD_MAGIC, at)) >= 0:
            end = zstd_frame_end(library, at)
            found = cubin_arch(library[at:end]) if end else None
            if found is None or end is None:
                at += len(ZSTD_MAGIC)
                continue
            if found != arch:
                library[at:end] = bytes(end - at)
                blanked += end - at
            at = end
    return blanked
