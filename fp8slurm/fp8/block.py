"""Block FP8: e4m3 codes with one fp32 scale a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8slurm.fp8 import BLOCK

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# 448 / amax overflows fp32 somewhat below this
SMALLEST_USUAL_AMAX = 1.4e-36
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[int, int]:
    """Shape of scale_inv for codes of `shape` [N, K]: (ceil(N / rows), ceil(K / columns)); edge blocks are smaller."""
    n, k = shape
    return -(-n // block[0]), -(-k // block[1])


@dataclass(frozen=True)
class BlockFP8:
    """A matrix in block FP8: value[n, k] = data[n, k] * scale_inv[n // block[0], k // block[1]]."""

    data: torch.Tensor
    """float8_e4m3fn [N, K]"""
    scale_inv: torch.Tensor
    """float32 [ceil(N / block[0]), ceil(K / block[1])]"""
    block: tuple[int, int] = (BLOCK, BLOCK)

    def __post_init__(self) -> None:
        if self.data.dtype != E4M3 or self.data.dim() != 2:
            raise ValueError(f"block FP8 codes are float8_e4m3fn [N, K], not {self.data.dtype} {list(self.data.shape)}")
        expected = scale_shape(self.data.shape, self.block)
        if self.scale_inv.dtype != torch.float32 or tuple(self.scale_inv.shape) != expected:
            raise ValueError(
                f"scale_inv of codes {list(self.data.shape)} in blocks of {self.block} is float32 {list(expected)}, "
                f"not {self.scale_inv.dtype} {list(self.scale_inv.shape)}"
            )


def scale_from_amax(amax: torch.Tensor, dtype: torch.dtype, power_of_two: bool = False) -> torch.Tensor:
    """TransformerEngine's scale for blocks of largest magnitude `amax` (fp32, any shape); codes are e4m3(x * scale).

    448 / amax, rounded to nearest; 1 where amax is 0, infinite or NaN; the largest value of the input's `dtype` where
    the quotient overflows; with power_of_two the mantissa is cleared (rounding the scale down).
    Source: TransformerEngine, common/recipe/recipe_common.cuh, compute_scale_from_amax with epsilon 0.
    """
    scale = torch.div(E4M3_MAX, amax)
    low, high = amax.aminmax()
    if not (low.item() > SMALLEST_USUAL_AMAX and high.item() < torch.inf):  # also when either is NaN
        scale.masked_fill_(scale == torch.inf, torch.finfo(dtype).max)
        scale.masked_fill_((amax == 0) | ~amax.isfinite(), 1.0)
    if power_of_two:
        scale = (scale.view(torch.int32) & -0x800000).view(torch.float32)
    return scale
