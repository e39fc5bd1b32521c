"""The CPU quantizer against the reference, byte for byte, and the reference against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8slurm.fp8.block import BlockFP8, scale_from_amax
from fp8slurm.fp8.decode import decode
from fp8slurm.fp8.quantize import (
    dequantize,
    dequantize_1x128,
    fake_quantize_1x128,
    fake_quantize_128x1,
    fake_quantize_block,
    quantize,
    quantize_1x128,
)
from fp8slurm.fp8.reference import (
    dequantize_reference,
    quantize_columnwise_reference,
    quantize_reference,
    quantize_rowwise_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@st.composite
def matrices(draw) -> torch.Tensor:
    """Matrices of every dtype whose blocks differ wildly: tiny, huge, subnormal, all zero, one element alone."""
    dtype = draw(st.sampled_from(DTYPES))
    rows = draw(st.sampled_from([1, 2, 7, 127, 128, 129, 256, 300, 515]))
    columns = draw(st.sampled_from([1, 3, 64, 127, 128, 130, 256, 385, 2049, 2600]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    limits = torch.finfo(dtype)
    lowest = math.log2(limits.smallest_normal) - 6
    exponents = torch.empty(-(-rows // 128), -(-columns // 128))
    exponents.uniform_(draw(st.sampled_from([lowest, -10.0])), math.log2(limits.max), generator=generator)
    magnitude = torch.exp2(exponents.double()).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    w = (torch.randn(rows, columns, generator=generator).double() * magnitude).clamp(limits.min, limits.max).to(dtype)
    if draw(st.booleans()):
        w[: min(128, rows)] = 0
    if draw(st.booleans()):
        w[torch.rand(rows, columns, generator=generator) < 0.9] = -0.0
    return w


@settings(max_examples=120, deadline=None)
@given(w=matrices(), power_of_two=st.booleans())
def test_every_path_gives_the_bytes_of_the_reference(w: torch.Tensor, power_of_two: bool) -> None:
    expected = quantize_reference(w, power_of_two=power_of_two)
    got = quantize(w, power_of_two=power_of_two)
    assert same_bytes(got.data, expected.data)
    assert same_bytes(got.scale_inv, expected.scale_inv)
    values = dequantize_reference(expected)
    assert same_bytes(dequantize(got), values)
    assert same_bytes(fake_quantize_block(w, power_of_two), values)

    rows = quantize_rowwise_reference(w, power_of_two=power_of_two)
    codes, scale_inv = quantize_1x128(w, power_of_two)
    assert same_bytes(codes, rows[0]) and same_bytes(scale_inv, rows[1])
    assert same_bytes(fake_quantize_1x128(w, power_of_two), dequantize_1x128(codes, scale_inv))
    columns = BlockFP8(*quantize_columnwise_reference(w, power_of_two=power_of_two), (128, 1))
    assert same_bytes(fake_quantize_128x1(w, power_of_two), dequantize_reference(columns))


def test_matrices_wider_than_a_panel() -> None:
    """As down_proj of the 4B: work is cut along the rows too, at 4096 columns and at others' ends."""
    g = torch.Generator().manual_seed(2)
    w = torch.randn(260, 8192 + 300, generator=g) * torch.logspace(-3, 3, 8492)
    expected = quantize_reference(w)
    got = quantize(w)
    assert same_bytes(got.data, expected.data) and same_bytes(got.scale_inv, expected.scale_inv)
    values = dequantize_reference(expected)
    assert same_bytes(dequantize(got), values) and same_bytes(dequantize(got, torch.bfloat16), values.bfloat16())
    assert same_bytes(fake_quantize_block(w), values)
    with pytest.raises(ValueError, match=r"holds nan at \[1003, 8300\]"):
        quantize(w.index_put((torch.tensor(3), torch.tensor(8300)), torch.tensor(math.nan)), first_row=1000)


def test_columnwise_is_rowwise_of_the_transpose() -> None:
    x = torch.randn(300, 70, generator=torch.Generator().manual_seed(1))
    assert same_bytes(fake_quantize_128x1(x), fake_quantize_1x128(x.t().contiguous()).t().contiguous())


def test_formula_by_hand() -> None:
    w = torch.zeros(129, 256)
    w[0, 0], w[0, 1], w[0, 2] = 0.7, -0.35, 0.1
    w[128, 128] = -3.0
    q = quantize(w)
    scale = torch.tensor(448.0) / torch.tensor(0.7)
    assert q.scale_inv.tolist() == [[float(1 / scale), 1.0], [1.0, float(1 / (torch.tensor(448.0) / 3.0))]]
    # 448, -224 and 0.1 * 640 = 64 are e4m3 numbers: codes 0x7e, 0xf6, 0x68
    assert q.data.view(torch.uint8)[0, :4].tolist() == [0x7E, 0xF6, 0x68, 0]
    assert q.data.view(torch.uint8)[128, 128].item() == 0xFE


def test_scale_is_a_product_away_from_amax_over_448() -> None:
    """amax / 448 as scale, as other tools have it, differs in the last bit often; 1 / (448 / amax) is TE's."""
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 0.5
    differ = (1.0 / scale_from_amax(amax, torch.bfloat16) != amax / 448.0).float().mean().item()
    assert 0.2 < differ < 0.7


def test_special_amax() -> None:
    amax = torch.tensor([0.0, math.inf, math.nan, 1e-38, 1.0])
    for dtype in (torch.bfloat16, torch.float32):
        largest = torch.finfo(dtype).max
        assert scale_from_amax(amax, dtype).tolist() == [1.0, 1.0, 1.0, largest, 448.0]
    assert scale_from_amax(torch.tensor([1e-38, 1.0, 0.9]), torch.bfloat16, True).tolist() == [2.0**127, 256.0, 256.0]


def test_power_of_two_changes_the_scales_and_gives_only_powers_of_two() -> None:
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, power = quantize(w), quantize(w, power_of_two=True)
    assert not torch.equal(plain.scale_inv, power.scale_inv)
    assert (torch.frexp(power.scale_inv).mantissa == 0.5).all()
    assert (torch.frexp(plain.scale_inv).mantissa != 0.5).any()


def test_round_trip_is_exact_from_the_second_time() -> None:
    w = (torch.randn(640, 768, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    once = quantize(w)
    twice = quantize(dequantize(once, torch.bfloat16))
    assert same_bytes(dequantize(twice, torch.bfloat16), dequantize(once, torch.bfloat16))


def test_out_is_filled_in_place() -> None:
    w = torch.randn(200, 300)
    out = BlockFP8(torch.empty(200, 300, dtype=torch.float8_e4m3fn), torch.empty(2, 3))
    assert quantize(w, out=out) is out
    assert same_bytes(out.data, quantize_reference(w).data)
    with pytest.raises(ValueError, match=r"out holds \[200, 300\]"):
        quantize(w[:100], out=out)


def test_transposed_input() -> None:
    w = torch.randn(200, 300).t()
    assert same_bytes(quantize(w).data, quantize_reference(w).data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_weight_is_named(bad: float, dtype: torch.dtype) -> None:
    w = torch.ones(300, 2600, dtype=dtype)
    w[200, 2500] = w[290, 7] = bad
    with pytest.raises(ValueError, match=r"layers\.3\.q holds .*\[200, 2500\]"):
        quantize(w, name="layers.3.q")
    with pytest.raises(ValueError, match=r"\[1200, 2500\]"):
        quantize(w, name="layers.3.q", first_row=1000)
    with pytest.raises(ValueError, match=r"\[200, 2500\]"):
        fake_quantize_block(w)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_activation_stays_visible(bad: float, power_of_two: bool) -> None:
    x = torch.ones(4, 256)
    x[2, 5] = bad
    codes, scale_inv = quantize_1x128(x, power_of_two)
    expected = quantize_rowwise_reference(x, power_of_two=power_of_two)
    assert same_bytes(codes, expected[0]) and same_bytes(scale_inv, expected[1])
    fake = fake_quantize_1x128(x, power_of_two)
    assert torch.equal(fake[[0, 1, 3]], x[[0, 1, 3]])
    assert math.isnan(fake[2, 5]) if math.isnan(bad) else fake[2, 5] == 448
    # the weight gradient's copy: one column has to bear it, and the others keep scales of their own
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(3))
    x[2, 5] = bad
    columns = BlockFP8(*quantize_columnwise_reference(x, power_of_two=power_of_two), (128, 1))
    fake, wanted = fake_quantize_128x1(x, power_of_two), dequantize_reference(columns)
    assert torch.equal(fake.isnan(), wanted.isnan()) and torch.equal(fake.nan_to_num(0), wanted.nan_to_num(0))
    assert math.isnan(fake[2, 5]) if math.isnan(bad) else fake[2, 5] == 448


def test_dtype_and_rank_are_checked() -> None:
    with pytest.raises(ValueError, match="int64.*allowed"):
        quantize(torch.ones(4, 4, dtype=torch.int64), name="x")
    with pytest.raises(ValueError, match="up_proj"):
        quantize(torch.ones(4, 4, 4), name="up_proj")
    with pytest.raises(ValueError, match="scale_inv"):
        BlockFP8(torch.zeros(128, 129, dtype=torch.float8_e4m3fn), torch.ones(1, 1))


def test_decode_knows_all_256_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.to(torch.float32)
    assert expected.isnan().sum() == 2
    assert torch.equal(decode(codes).isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert same_bytes(decode(codes[finite]), expected[finite])


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_lone_nan_of_either_sign_is_one(code: int) -> None:
    codes = torch.full((4, 4), 0x38, dtype=torch.uint8)
    codes[1, 2] = code
    for values in (
        decode(codes.view(torch.float8_e4m3fn)),
        dequantize(BlockFP8(codes.view(torch.float8_e4m3fn), torch.ones(1, 1))),
    ):
        assert values.isnan().nonzero().tolist() == [[1, 2]] and values.nan_to_num(1.0).eq(1).all()


@pytest.mark.parametrize("block", [(128, 128), (64, 32), (1, 128)])
def test_dequantize_of_other_blocks(block: tuple[int, int]) -> None:
    q = quantize_reference(torch.randn(300, 200), block)
    assert same_bytes(dequantize(q), dequantize_reference(q))
    assert same_bytes(dequantize(q, torch.bfloat16), dequantize_reference(q).bfloat16())


def test_dequantize_of_any_codes_and_scales() -> None:
    """Codes and scales that no quantizer of ours makes: every code, NaN among them, and scales up to the largest."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(140 * 3).view(140, -1)
    scale_inv = torch.tensor([[1e-45, 3e38, 1.0, 2.0**119, 2.0**120, 0.1]] * 2)
    for data in (codes, codes.masked_fill((codes & 127) == 127, 0)):
        q = BlockFP8(data.view(torch.float8_e4m3fn), scale_inv)
        got, expected = dequantize(q), dequantize_reference(q)
        assert torch.equal(got.isnan(), expected.isnan())
        assert same_bytes(got.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_leading_axes_of_activations() -> None:
    x = torch.randn(3, 5, 200)
    codes, scale_inv = quantize_1x128(x)
    assert codes.shape == (3, 5, 200) and scale_inv.shape == (3, 5, 2)
    assert fake_quantize_128x1(x).shape == x.shape
