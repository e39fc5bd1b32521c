"""Scales of an FP8 KV cache, and what it gives back."""

from __future__ import annotations

import math

import pytest
import torch

from fp8slurm.fp8.kv_cache import HEADROOM, codes, rounded_up, scale_of, through_cache


def test_scales_are_powers_of_two_that_leave_room() -> None:
    amax = torch.tensor([448.0, 224.0, 225.0, 3.1e-3, 7e4])
    scales = scale_of(amax, torch.ones(5))
    assert scales.tolist()[:3] == [2.0, 1.0, 2.0]
    assert all(math.frexp(s)[0] == 0.5 for s in scales.tolist())
    share = amax / (448 * scales)
    assert (share <= 1 / HEADROOM).all() and (share > 1 / HEADROOM / 2).all()
    assert rounded_up(torch.tensor([1.0, 1.5, 0.25, 0.26])).tolist() == [1.0, 2.0, 0.25, 0.5]


def test_a_layer_that_nothing_was_seen_of_keeps_its_scale() -> None:
    amax = torch.tensor([0.0, math.inf, math.nan, 448.0])
    assert scale_of(amax, torch.tensor([0.5, 0.25, 8.0, 4.0])).tolist() == [0.5, 0.25, 8.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_roundings_does_not_matter(dtype: torch.dtype) -> None:
    """SGLang divides in the model's dtype; FlashAttention multiplies in fp32: with powers of two nothing else is rounded."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    scale = torch.tensor(2.0**-5)
    exact = (x.double() / scale.double()).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale.double()
    assert torch.equal(through_cache(x, scale).double(), exact)
    assert through_cache(x, scale).dtype == dtype
    assert torch.equal(through_cache(x, scale.to(dtype)), through_cache(x, scale))


def test_what_does_not_fit_is_cut_off() -> None:
    """A NaN among the keys, which the cast of older versions of torch makes, is one in every later token."""
    x = torch.tensor([500.0, -1e4, 448.0, 3.0])
    assert through_cache(x, torch.tensor(1.0)).tolist() == [448.0, -448.0, 448.0, 3.0]
    assert codes(x, torch.tensor(2.0)).float().tolist() == [256.0, -448.0, 224.0, 1.5]
