"""Keys and values in e4m3, with one scale for the keys and one for the values of a layer.

Scales are powers of two. A key divided by one and multiplied by it again is exact in BF16 and in FP32, so it does not
matter in which of the two SGLang divides before it casts, nor where FlashAttention multiplies; and e4m3 is a floating
point format: a scale that is up to twice too large costs no digit of anything but the smallest values.
"""

from __future__ import annotations

import torch

from fp8slurm.fp8.block import E4M3, E4M3_MAX

HEADROOM = 2.0
"""The scale is of a step's largest key, and is used for the next step's: so much larger ones still fit. Scales are
rounded up besides, so the largest lies between a quarter and a half of the format's range."""


def scale_of(amax: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """The power of two, fp32 of amax's shape, for values of at most `amax` (fp32): the smallest of at least
    HEADROOM * amax / 448; `otherwise` where amax is 0 or not finite."""
    usable = amax.isfinite() & (amax > 2.0**-100)
    return torch.where(usable, rounded_up(HEADROOM * amax.float() / E4M3_MAX), otherwise.float())


def rounded_up(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below (fp32; positive numbers)."""
    mantissa, exponent = torch.frexp(scale.float())
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def codes(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [any shape] -> e4m3 of x / scale, saturated: older versions of torch cast what is above 464 to NaN."""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def through_cache(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What an FP8 cache gives back for x, in x's dtype; scale: a power of two, of x's dtype or fp32."""
    return (codes(x, scale).to(x.dtype) * scale).to(x.dtype)
