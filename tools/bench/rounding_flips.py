#!/usr/bin/env python3
"""How far two FP8 forward passes drift apart that differ only in where they round to BF16; and BF16 ones, and FP8 from BF16.

usage: rounding_flips.py [--layers 12] [--tokens 48]

Qwen3-4B's width with random weights, on the CPU, in FP32 with every rounding written out. A trainer with tensor-parallel size 2
rounds the two partial sums of a row-parallel product to BF16 before it adds them; an attention kernel rounds probabilities
before they are normalized. Each such difference is 2^-9 of a value, but one that crosses a boundary between two e4m3 codes
becomes 2^-4 there. Prints the mean |d| of log-probabilities of sampled tokens.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCABULARY = 2560, 32, 8, 128, 9728, 151936
BLOCK, LARGEST = 128, 448.0


@dataclass(frozen=True)
class Way:
    """How one pass computes."""

    fp8: bool
    other_roundings: bool
    """Partial sums of two halves, and attention's probabilities before they are normalized, are rounded to BF16."""


WAYS = {
    f"{kind}{', rounded elsewhere' * other}": Way(kind == "FP8", bool(other))
    for kind in ("FP8", "BF16")
    for other in (0, 1)
}
PAIRS = [("FP8, rounded elsewhere", "FP8"), ("BF16, rounded elsewhere", "BF16"), ("BF16", "FP8")]


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def quantized(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [M, K] through e4m3 codes with a scale for every rows x 128 block."""
    blocks = x.reshape(x.shape[0] // rows, rows, -1, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-12) / LARGEST
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).reshape(x.shape)


def linear(x: torch.Tensor, weight: torch.Tensor, way: Way, row_parallel: bool = False) -> torch.Tensor:
    if way.fp8:
        x, weight = quantized(x, 1), quantized(weight, BLOCK)
    if row_parallel and way.other_roundings:
        half = x.shape[1] // 2
        return bf16(bf16(x[:, :half] @ weight[:, :half].T) + bf16(x[:, half:] @ weight[:, half:].T))
    return bf16(x @ weight.T)


def norm(x: torch.Tensor) -> torch.Tensor:
    return bf16(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, HEAD] with rotary embedding."""
    angles = torch.arange(len(x))[:, None] * 1e6 ** (-torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]
    return bf16(x * cos + torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * sin)


def attention(x: torch.Tensor, weights: dict[str, torch.Tensor], way: Way) -> torch.Tensor:
    q = rotated(norm(linear(x, weights["q"], way).view(-1, HEADS, HEAD)))
    k = rotated(norm(linear(x, weights["k"], way).view(-1, KV_HEADS, HEAD))).repeat_interleave(HEADS // KV_HEADS, 1)
    v = linear(x, weights["v"], way).view(-1, KV_HEADS, HEAD).repeat_interleave(HEADS // KV_HEADS, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(HEAD)
    scores += torch.full(scores.shape[1:], -math.inf).triu(1)
    if way.other_roundings:
        raised = (scores - scores.amax(-1, keepdim=True)).exp()
        mixed = torch.einsum("hts,shd->thd", bf16(raised), v) / raised.sum(-1).T[..., None]
    else:
        mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v)
    return linear(bf16(mixed).flatten(1), weights["o"], way, row_parallel=True)


def mlp(x: torch.Tensor, weights: dict[str, torch.Tensor], way: Way) -> torch.Tensor:
    gated = bf16(torch.nn.functional.silu(linear(x, weights["gate"], way)) * linear(x, weights["up"], way))
    return linear(gated, weights["down"], way, row_parallel=True)


def random_layer(generator: torch.Generator) -> dict[str, torch.Tensor]:
    width = HEADS * HEAD
    shapes = {"q": (width, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN), "o": (HIDDEN, width),
              "gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}  # fmt: skip
    return {name: bf16(torch.randn(*shape, generator=generator) * 0.02) for name, shape in shapes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    embedding = bf16(torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.02)
    tokens = torch.randint(VOCABULARY, (args.tokens,), generator=generator)
    hidden = {name: embedding[tokens] for name in WAYS}
    for _ in range(args.layers):
        weights = random_layer(generator)
        for name, way in WAYS.items():
            x = hidden[name]
            x = bf16(x + attention(norm(x), weights, way))
            hidden[name] = bf16(x + mlp(norm(x), weights, way))
    logprobs = {name: bf16(norm(x) @ embedding.T).log_softmax(-1) for name, x in hidden.items()}
    for one, other in PAIRS:
        sampled = torch.multinomial(logprobs[other].exp(), 1, generator=generator)
        d = (logprobs[one] - logprobs[other]).gather(1, sampled).abs().mean()
        print(f"{args.layers} layers, {one} against {other}: mean |d| {d:.4f}")


if __name__ == "__main__":
    main()
