"""The inputs of the golden bytes: made by integer arithmetic from a seed, so that every machine makes the same ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

# dtype: integer type of the bits, mantissa bits, exponent bits
FORMATS = {"bfloat16": (torch.int16, 7, 8), "float16": (torch.int16, 10, 5), "float32": (torch.int32, 23, 8)}
KINDS = ("block", "row", "column")
"""128x128 weights; 1x128 along rows; 128x1 along columns."""
ALIGNED = [(16, 16), (16, 128), (128, 16), (32, 48), (128, 128), (144, 272), (256, 384)]
RAGGED = [(1, 1), (1, 16), (1, 128), (4, 4), (3, 5), (17, 130), (129, 257), (8, 128), (130, 128), (128, 136)]
# exponent range as fractions of the dtype's, share of zeros, and one special value put in somewhere
STYLES: dict[str, tuple[float, float, float, str]] = {
    "usual": (0.44, 0.50, 0.0, ""),
    "tiny": (0.0, 0.03, 0.0, ""),
    "subnormal": (0.0, 0.0, 0.1, ""),
    "huge": (0.97, 1.0, 0.0, ""),
    "wide": (0.0, 1.0, 0.1, ""),
    "sparse": (0.40, 0.55, 0.98, ""),
    "zero": (0.0, 0.0, 1.0, ""),
    "largest": (0.3, 0.5, 0.0, "largest"),
}
NOT_FINITE = {"nan": (0.44, 0.50, 0.0, "nan"), "infinity": (0.44, 0.50, 0.0, "inf")}


@dataclass(frozen=True)
class Case:
    """One input and what is done to it."""

    kind: str
    dtype: str
    rows: int
    columns: int
    style: str
    power_of_two: bool
    seed: int

    def input(self) -> torch.Tensor:
        """[rows, columns] in dtype, on the CPU."""
        low, high, zeros, special = (STYLES | NOT_FINITE)[self.style]
        ints, mantissa_bits, exponent_bits = FORMATS[self.dtype]
        top = (1 << exponent_bits) - 2  # the largest finite exponent
        rng = random.Random(self.seed)
        n = self.rows * self.columns
        first, last = round(low * top), round(high * top)
        words = np.frombuffer(rng.randbytes(8 * n), dtype="<u8")
        exponent = first + (words >> np.uint64(10)) % np.uint64(65536) % np.uint64(last - first + 1)
        magnitude = exponent << np.uint64(mantissa_bits) | (words >> np.uint64(26)) % np.uint64(1 << mantissa_bits)
        magnitude[words % np.uint64(1000) < np.uint64(round(zeros * 1000))] = 0
        sign = (words >> np.uint64(63)) << np.uint64(mantissa_bits + exponent_bits)
        bits = magnitude | sign
        if special:
            at = rng.randrange(n)
            bits[at] = {
                "largest": (top + 1 << mantissa_bits) - 1,
                "inf": top + 1 << mantissa_bits,
                "nan": (top + 1 << mantissa_bits) + (1 << mantissa_bits - 1),
            }[special]
        unsigned = bits.astype("<u2" if ints == torch.int16 else "<u4")
        signed = torch.from_numpy(unsigned.view("<i2" if ints == torch.int16 else "<i4"))
        return signed.view(getattr(torch, self.dtype)).view(self.rows, self.columns)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cases() -> Iterator[Case]:
    """Every case; ragged and aligned shapes, all dtypes and styles for blocks, fewer for 1x128 and 128x1."""
    seed = 0
    for kind in KINDS:
        for dtype in FORMATS:
            if kind != "block" and dtype == "float16":
                continue
            for shape in ALIGNED + RAGGED:
                for style in STYLES:
                    if kind != "block" and style not in ("usual", "wide", "tiny"):
                        continue
                    for power_of_two in (False, True):
                        if power_of_two and (style not in ("usual", "tiny") or dtype != "bfloat16"):
                            continue
                        seed += 1
                        yield Case(kind, dtype, *shape, style, power_of_two, seed)
            for style in NOT_FINITE:
                seed += 1
                yield Case(kind, dtype, 128, 128, style, False, seed)
