#!/usr/bin/env python3
"""Cut SGLang's FlashAttention 3 (sgl_kernel/flash_ops.abi3.so, 1.1 GB) down to the kernels that Qwen3 on Hopper calls.

usage: trim_fa3.py flash_ops.abi3.so [--head-dim 128] [--types bfloat16_t float_e4m3_t]

In place. What remains: sm_90 machine code of the forward kernels with that head dimension and those element types,
and the small kernels beside them (variable-length bookkeeping, combining of splits). Calling another kernel of a
trimmed library fails at its launch ("named symbol not found"), so this is for machines that a whole library does not
reach, not for an installation.
"""

from __future__ import annotations

import argparse
import mmap
import re
from collections.abc import Callable
from pathlib import Path

from fatbin import MACHINE_CODE, Entry, blank

HOPPER = 90
SECTION = re.compile(rb"\.text\.(_Z[\w$.]+)")
"""A kernel's code in a cubin: the section that bears its mangled name."""
HELPERS = (b"prepare_varlen", b"FlashAttnFwdCombine")
MAINLOOP = re.compile(rb"FlashAttnFwdSm90.*?EEELi(\d+)ENS_\d+(bfloat16_t|half_t|float_e4m3_t)Ef")
"""`CollectiveMainloopFwdSm90<..., tile shape, head dimension of V, element, float, ...>`."""


def needed(head_dim: int, types: frozenset[str]) -> Callable[[mmap.mmap, list[Entry]], set[Entry]]:
    """For `fatbin.blank`. FA3's fatbins hold a compile unit an architecture, not compressed: names can be read."""

    def of_use(kernel: bytes) -> bool:
        if any(helper in kernel for helper in HELPERS):
            return True
        match = MAINLOOP.search(kernel)
        return match is not None and int(match[1]) == head_dim and match[2].decode() in types

    def choose(library: mmap.mmap, entries: list[Entry]) -> set[Entry]:
        hopper = [e for e in entries if e.kind == MACHINE_CODE and e.arch == HOPPER]
        return {e for e in hopper if any(map(of_use, SECTION.findall(library[e.start : e.end])))}

    return choose


TYPES = ("bfloat16_t", "float_e4m3_t")


def trim(library: Path, head_dim: int = 128, types: tuple[str, ...] = TYPES) -> tuple[int, int]:
    """Bytes of GPU code (kept, blanked); ValueError where nothing fits, as in a library of another layout."""
    kept, blanked = blank(library, needed(head_dim, frozenset(types)))
    if not kept:
        raise ValueError(f"{library} has no FA3 kernel for head dimension {head_dim} and {', '.join(types)}")
    return kept, blanked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=["bfloat16_t", "half_t", "float_e4m3_t"])
    args = parser.parse_args()
    kept, blanked = trim(args.library, args.head_dim, tuple(args.types))
    print(f"{args.library}: GPU code kept {kept / 1e6:.0f} MB, blanked {blanked / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
