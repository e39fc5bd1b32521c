"""The arithmetic of exact runs: right, and the same bits for any rows, threads, batches and lengths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fp8slurm.cpu import exact
from fp8slurm.fp8.quantize import dequantize, dequantize_1x128, quantize, quantize_1x128


def random(*shape: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """BF16 of many magnitudes: rounding shows."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * torch.exp(spread * torch.randn(shape, generator=g))).bfloat16()


def misrounded(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Share of elements that are not the reference (float64) rounded to BF16. No error exceeds a rounding of the row's
    largest magnitude by more than a hundredth."""
    size = reference.abs().amax(-1, keepdim=True)
    assert ((y.double() - reference).abs() <= 1.01 * 2**-8 * size).all()
    return float((y != reference.float().bfloat16()).float().mean())


def fp8_weight(n: int, k: int) -> tuple[exact.Blocks, torch.Tensor]:
    q = quantize(random(n, k, seed=1))
    return exact.weight_blocks(q.data, q.scale_inv), dequantize(q).double()


BY_ROW: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear_fp8": lambda x: exact.linear_fp8(x, fp8_weight(200, 384)[0]),
    "linear": lambda x: exact.linear(x, random(320, 384, seed=2)),
    "rms_norm": lambda x: exact.rms_norm(x, random(384, seed=3), 1e-6),
    "silu": exact.silu,
    "combine": lambda x: exact.combine(x.view(-1, 3, 128), x[:, :3].float()),
    "expert_weights": lambda x: exact.expert_weights(x.float(), exact.top_experts(x.float(), 8), True),
    "logprobs": lambda x: exact.logprobs(x, torch.arange(len(x)) % 384, 0.7),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_a_row_does_not_feel_the_others_nor_the_threads(name: str) -> None:
    x, threads = random(700, 384), torch.get_num_threads()
    whole = BY_ROW[name](x)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            for rows in (slice(0, 0), slice(0, 1), slice(5, 36), slice(100, 690)):
                part = x[rows].clone()
                alone = (
                    exact.logprobs(part, torch.arange(700)[rows] % 384, 0.7)
                    if name == "logprobs"
                    else BY_ROW[name](part)
                )
                assert torch.equal(alone, whole[rows]), (number, rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["linear_fp8", "linear"])
def test_a_sum_does_not_feel_its_order(name: str) -> None:
    """Elements of a block in another order: a sum in float32, or of unrounded float64 products, would differ."""
    x, w = random(64, 128), random(128, 128, seed=1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    if name == "linear":
        assert torch.equal(exact.linear(x[:, order], w[:, order]), exact.linear(x, w))
        assert not torch.equal(x[:, order].double() @ w[:, order].double().t(), x.double() @ w.double().t())
        return
    q = quantize(w)
    blocks = [exact.weight_blocks(q.data[:, o], q.scale_inv) for o in (torch.arange(128), order)]
    assert torch.equal(exact.linear_fp8(x[:, order], blocks[1]), exact.linear_fp8(x, blocks[0]))


def test_values_are_right() -> None:
    x, w = random(50, 384, spread=1.0), random(320, 384, seed=2, spread=1.0)
    blocks, values = fp8_weight(200, 384)
    assert misrounded(exact.linear_fp8(x, blocks), dequantize_1x128(*quantize_1x128(x)).double() @ values.t()) < 2e-3
    assert misrounded(exact.linear(x, w), x.double() @ w.double().t()) < 2e-3
    assert misrounded(exact.rms_norm(x, w[0], 1e-6), F.rms_norm(x.double(), (384,), w[0].double(), 1e-6)) < 2e-3
    assert torch.equal(exact.silu(x), F.silu(x.double()).float().bfloat16())
    assert torch.equal(exact.linear(x.float(), w.float()), exact.linear(x.float(), w.float()).float()), (
        "FP32 stays FP32"
    )
    labels = torch.arange(50)
    for temperature in (0.7, 1.0):
        z = (x.float() / torch.tensor(temperature)).double()
        reference = torch.log_softmax(z, -1).gather(1, labels[:, None])[:, 0]
        assert (exact.logprobs(x, labels, temperature) - reference).abs().div(reference.abs() + 1).max() < 1e-7


def test_a_routers_choice_and_weights() -> None:
    """Of equal logits the first experts; softmax over the chosen or over all; a sum from the first to the last."""
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.5, 2.0], [0.0, -1.0, 5.0, -1.0, -1.0]])
    assert exact.top_experts(logits, 2).tolist() == [[1, 2], [0, 2]]
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    experts = exact.top_experts(x, 8)
    assert torch.equal(experts, x.topk(8).indices.sort(-1).values)
    for normalized, over in ((True, x.gather(1, experts)), (False, x)):
        reference = torch.exp(x.gather(1, experts).double() - torch.logsumexp(over.double(), -1, keepdim=True))
        assert ((exact.expert_weights(x, experts, normalized) - reference).abs() <= 2**-24 * reference + 1e-15).all()
    outputs, weights = random(60, 8, 256, spread=1.0), torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    reference = (outputs.double() * weights.double()[..., None]).sum(1)
    assert misrounded(exact.combine(outputs, weights), reference) < 2e-3
    parts = torch.tensor([2.0**70, 1.0, -(2.0**70), 1.0])[None, :, None]
    assert exact.combine(parts, torch.ones(1, 4)).item() == 1


def test_exp() -> None:
    x = torch.cat([-torch.logspace(-12, 2.8, 4000, dtype=torch.float64), torch.tensor([0.0, -700.5, -1e5, -torch.inf])])
    reference = torch.tensor([math.exp(t) for t in x.tolist()], dtype=torch.float64)
    assert (exact.exp(x)[:-3] / reference[:-3] - 1).abs().max() < 2**-45 and exact.exp(x)[4000] == 1
    assert exact.exp(x)[-3:].tolist() == [0, 0, 0] and exact.exp(torch.tensor([math.nan], dtype=torch.float64)).isnan()


def sequences(length: int) -> list[torch.Tensor]:
    q, k, v = (
        random(3, length, 4, 128, spread=0.5),
        random(3, length, 2, 128, seed=1, spread=0.5),
        random(3, length, 2, 128, seed=2, spread=0.5),
    )
    return [q, k, v]  # fmt: skip


def test_attention_is_right() -> None:
    q, k, v = sequences(150)
    y = exact.attention(q, k, v, torch.arange(150).expand(3, -1))
    a, b, c = (x.double().transpose(1, 2) for x in (q, k, v))
    reference = F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert y.dtype == torch.bfloat16 and misrounded(y, reference) < 2e-3


def test_decode_is_prefill_of_any_length_with_any_neighbours() -> None:
    """Whatever stands behind a query's position, in its own block of 128 positions too."""
    q, k, v = sequences(150)
    whole = exact.attention(q, k, v, torch.arange(150).expand(3, -1))
    for t in (0, 1, 40, 127, 128, 149):
        for length in sorted({t + 1, min(t + 20, 150), 150}):
            garbage = [x[1:2, :length].clone() for x in (k, v)]
            for x in garbage:
                x[:, t + 1 :] *= 2.0**40
            one = exact.attention(q[1:2, t : t + 1], *garbage, torch.tensor([[t]]))
            assert torch.equal(one[0, 0], whole[1, t]), (t, length)
    cached = exact.attention(q[:, 60:90], k[:, :90], v[:, :90], torch.arange(60, 90).expand(3, -1))
    assert torch.equal(cached, whole[:, 60:90]), "behind a prefix"


def test_rotation_is_by_position_alone() -> None:
    table = exact.rotation(1e6, 128, 300)
    assert torch.equal(exact.rotation(1e6, 128, 7), table[:7]) and table.dtype == torch.float32
    x = random(5, 4, 128)
    turned = exact.rotate(x, table[torch.tensor([0, 3, 3, 299, 40])])
    assert torch.equal(turned[0], x[0]) and torch.equal(exact.rotate(x[2:3], table[3:4])[0], turned[2])
    angle = torch.tensor([299 * 1e6 ** (-2 * i / 128) for i in range(64)], dtype=torch.float64)
    a, b = x[3].double().chunk(2, -1)
    reference = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
    assert misrounded(turned[3], reference) < 2e-3


def test_nan_stays_nan() -> None:
    x = random(4, 256)
    x[1, 3] = math.nan
    weight = torch.ones(256).bfloat16()
    for y in (exact.silu(x)[:, 3], exact.rms_norm(x, weight, 1e-6)[:, 7], exact.linear(x, random(8, 256))[:, 2],
              exact.logprobs(x, torch.zeros(4, dtype=torch.int64), 1.0)):  # fmt: skip
        assert y.isnan().tolist() == [False, True, False, False]
