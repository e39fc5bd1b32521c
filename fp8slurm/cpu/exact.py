"""Arithmetic that gives the same bits for any number of rows, threads and neighbours in a batch (docs/exact.md).

Without a GPU trainer and engine call it where model.exact is on: every product, norm, attention and logarithm of theirs
is one of these. By construction, not by test: a sum over many elements is of integers small enough that float64 adds
them without rounding, in any order; all else is one IEEE operation an element (add, multiply, divide, square root,
compare, round) in an order that is written here. exp is a polynomial of ours, since a library's vector and scalar
versions differ in last bits; log, cos and sin are the C library's, one number at a time.

A sum goes by blocks of 128. In a block elements are integers times one power of two, of 22 bits each (`on_grid`; FP8
codes are such by themselves), so that 128 products of two take at most 51 of float64's 53 bits; then blocks are scaled
and added, first to last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.decode import decode
from fp8slurm.fp8.quantize import quantize_1x128

GRID_BITS = 22
TILE = 1 << 17
"""Elements of a float64 tensor that are worked on at a time, to stay in the cache; results do not depend on it."""
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
"""ln 2 in two parts, the first of 32 bits: its product with a small integer is exact (Cody and Waite 1980)."""
_SMALLEST = -700.0
"""exp of less is taken for 0."""
_TAYLOR = tuple(1 / math.factorial(n) for n in range(11, -1, -1))


@dataclass(frozen=True)
class Blocks:
    """Rows as integers (of one power of two) in blocks of 128, with a factor for each row and block."""

    codes: Tensor
    """float64 [..., M, B * 128], or narrower where there is one block; of 22 bits at most."""
    scale: Tensor
    """float64 [..., M, B]"""


def on_grid(x: Tensor) -> Blocks:
    """[..., M, K] -> the nearest multiples of 2^-22 times the power of two above each block's largest magnitude.

    BF16 comes through unchanged, but for elements below 2^-14 of their block's largest. K above 128 is filled up with
    zeros to whole blocks.
    """
    width = min(x.shape[-1], BLOCK)
    blocks = F.pad(x.double(), (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    amax = blocks.abs().amax(-1)
    mantissa = torch.frexp(amax).mantissa
    step = torch.where(amax == 0, 1.0, amax / mantissa * 2.0**-GRID_BITS)  # the quotient is a power of two, exactly
    return Blocks(blocks.div_(step[..., None]).round_().flatten(-2), step)


def activations(x: Tensor) -> Blocks:
    """[T, K] in TransformerEngine's 1x128 formula, K a multiple of 128: the one quantizer of both sides."""
    codes, scale_inv = quantize_1x128(x)
    return Blocks(decode(codes).double(), scale_inv.double())


def weight_blocks(codes: Tensor, scale_inv: Tensor) -> Blocks:
    """A weight in FP8: e4m3 [N, K] and fp32 [ceil(N / 128), K / 128], K a multiple of 128."""
    rows = scale_inv.repeat_interleave(BLOCK, 0)[: codes.shape[0]]
    return Blocks(decode(codes).double(), rows.double())


def product(x: Blocks, w: Blocks) -> Tensor:
    """[..., M, K] . [..., N, K]^T -> float64 [..., M, N]."""
    total: Tensor | None = None
    for b in range(x.scale.shape[-1]):
        columns = slice(b * BLOCK, (b + 1) * BLOCK)
        part = x.codes[..., columns] @ w.codes[..., columns].transpose(-1, -2)
        part.mul_(x.scale[..., b, None]).mul_(w.scale[..., b].unsqueeze(-2))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def linear_fp8(x: Tensor, w: Blocks) -> Tensor:
    """[..., K] in any float dtype, quantized, times a weight in FP8 -> [..., N] in that dtype."""
    return _by_tiles(x, w, activations)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., K] . [N, K]^T -> [..., N] in the dtype of x, unquantized (lm_head)."""
    return _by_tiles(x, on_grid(weight), on_grid)


def _by_tiles(x: Tensor, w: Blocks, blocks_of: object) -> Tensor:
    assert callable(blocks_of)
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(flat.shape[0], w.codes.shape[0])
    for rows in _tiles(flat.shape[0], max(out.shape[1], flat.shape[1])):
        out[rows] = product(blocks_of(flat[rows]), w).float()
    return out.view(*x.shape[:-1], out.shape[1])  # an expert may have no row


def _tiles(rows: int, width: int) -> Iterator[slice]:
    height = max(1, TILE // max(width, 1))
    return (slice(start, start + height) for start in range(0, rows, height))


def exp(x: Tensor) -> Tensor:
    """e^x, float64, for x of at most 0: a polynomial of degree 11 (error below 2^-46), and 0 below -700."""
    inside = x.clamp_min(_SMALLEST)
    n = (inside * _LOG2_E).round_()
    r = inside.sub_(n * _LN2_HIGH).sub_(n * _LN2_LOW)
    y = r * _TAYLOR[0]
    for c in _TAYLOR[1:-1]:
        y.add_(c).mul_(r)
    y.add_(1.0)
    power = n.add_(1023.0).long().bitwise_left_shift_(52).view(torch.float64)
    return y.mul_(power).masked_fill_(x < _SMALLEST, 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, rounded once to the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    w = weight.double()
    for rows in _tiles(*flat.shape):
        part = flat[rows]
        grid = on_grid(part)
        squares = grid.codes.square().unflatten(-1, (grid.scale.shape[-1], -1)).sum(-1)
        squares.mul_(grid.scale).mul_(grid.scale)
        total = squares[:, 0]
        for b in range(1, squares.shape[1]):
            total = total + squares[:, b]
        root = torch.from_numpy(np.sqrt((total / x.shape[-1] + eps).numpy()))
        out[rows] = (part.double() / root[:, None]).mul_(w).float()
    return out.view(x.shape)


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x), rounded once to the dtype of x."""
    flat = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    for rows in _tiles(*flat.shape):
        part = flat[rows].double()
        e = exp(-part.abs())
        out[rows] = (part * torch.where(part >= 0, 1.0, e)).div_(1.0 + e).float()
    return out.view(x.shape)


def top_experts(logits: Tensor, k: int) -> Tensor:
    """The k largest of each row [T, E], of equal ones the first: int64 [T, k], in ascending order."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values


def expert_weights(logits: Tensor, experts: Tensor, normalized: bool) -> Tensor:
    """A router's weights of the chosen experts: softmax over all of them, or over the chosen if `normalized`.

    logits fp32 [T, E], experts int64 [T, k] -> fp32 [T, k].
    """
    chosen = logits.double().gather(1, experts)
    over = chosen if normalized else logits.double()
    largest = over.amax(-1, keepdim=True)
    one = 2.0 ** (52 - (over.shape[1] - 1).bit_length())
    total = exp(over - largest).mul_(one).round_().sum(-1, keepdim=True).div_(one)  # of integers
    return exp(chosen - largest).div_(total).float()


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of what a token's experts gave out, first to last: [T, k, H], fp32 [T, k] -> [T, H].

    The slots are in ascending order of the experts. Products are exact in float64, the sum is rounded to the dtype of
    the outputs.
    """
    t, k, h = outputs.shape
    out = outputs.new_empty(t, h)
    for rows in _tiles(t, k * h):
        parts = outputs[rows].double().mul_(weights[rows].double()[..., None])
        total = parts[:, 0]
        for slot in range(1, k):
            total = total + parts[:, slot]
        out[rows] = total.float()
    return out


def rotation(theta: float, dim: int, length: int) -> Tensor:
    """(cos, sin) of position * theta^(-2 i / dim), fp32 [length, 2, dim / 2]."""
    return _rotation(float(theta), dim, 1 << max(7, (length - 1).bit_length()))[:length]


@lru_cache(maxsize=8)
def _rotation(theta: float, dim: int, length: int) -> Tensor:
    rates = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    angles = [[p * rate for rate in rates] for p in range(length)]
    return torch.tensor([[[f(a) for a in row] for f in (math.cos, math.sin)] for row in angles], dtype=torch.float32)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [T, heads, dim] (halves, as Qwen3) by table [T, 2, dim / 2]; rounded once. Autograd's."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = table[:, None, 0], table[:, None, 1]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of queries at `positions` to the keys at 0, 1, ... of their own sequence.

    q [S, Q, heads, d], k and v [S, L, groups, d], positions int64 [S, Q] -> [S, Q, heads, d] in the dtype of q. Scores
    are divided by sqrt(d). A query sees no key behind its position: what stands there does not matter, if it is finite.
    """
    out = torch.empty_like(q)
    s, n, heads, d = q.shape
    length = k.shape[1]
    for rows in _tiles(s, max(heads * n * length, k[0].numel())):
        out[rows] = _attention(q[rows], k[rows], v[rows], positions[rows])
    return out


def _attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    s, n, heads, d = q.shape
    length, groups = k.shape[1:3]
    each = heads // groups
    queries = q.view(s, n, groups, each, d).permute(0, 2, 3, 1, 4).reshape(s, groups, each * n, d)
    scores = product(on_grid(queries), on_grid(k.transpose(1, 2))).div_(math.sqrt(d))  # [s, groups, each * n, length]
    hidden = torch.arange(length)[None, None] > positions[:, :, None]
    hidden = hidden[:, None, None].expand(s, groups, each, n, length).reshape(scores.shape)
    scores.masked_fill_(hidden, -torch.inf)
    weights = exp(scores.sub_(scores.amax(-1, keepdim=True))).mul_(2.0**GRID_BITS).round_()
    total = weights.sum(-1, keepdim=True)  # of integers
    # A value's power of two goes into the weights: blocks are of positions here, and a query must not feel what stands
    # behind it in its block.
    values = on_grid(v.transpose(1, 2).reshape(s * groups, length, d))
    steps = values.scale
    assert steps.shape[-1] * BLOCK == d, "a head of whole blocks"
    parts = []
    for b in range(steps.shape[-1]):
        spread = weights * steps[..., b].view(s, groups, 1, length)
        codes = values.codes[..., b * BLOCK : (b + 1) * BLOCK].view(s, groups, length, BLOCK).transpose(-1, -2)
        weighted = on_grid(spread)
        codes = F.pad(codes, (0, weighted.codes.shape[-1] - length))
        ones = codes.new_ones(()).expand(*codes.shape[:-1], weighted.scale.shape[-1])
        parts.append(product(weighted, Blocks(codes, ones)))
    mixed = torch.cat(parts, -1).div_(total)
    return mixed.view(s, groups, each, n, d).permute(0, 3, 1, 2, 4).reshape(s, n, heads, d).to(torch.float32)


def logprobs(logits: Tensor, chosen: Tensor, temperature: float | Tensor) -> Tensor:
    """log_softmax(logits / temperature) of the chosen tokens.

    logits [T, V], chosen int64 [T], temperature a number or fp32 [T] -> fp32 [T].
    """
    out = torch.empty(logits.shape[0])
    divisor = torch.as_tensor(temperature, dtype=torch.float32).expand(logits.shape[0])
    one = 2.0 ** (52 - (logits.shape[1] - 1).bit_length())
    for rows in _tiles(*logits.shape):
        z = logits[rows].float().div_(divisor[rows, None]).double()
        z.sub_(z.amax(-1, keepdim=True))
        total = exp(z).mul_(one).round_().sum(-1).div_(one)  # of integers
        logarithm = torch.tensor([math.log(t) if t > 0 else math.nan for t in total.tolist()], dtype=torch.float64)
        out[rows] = (z.gather(1, chosen[rows, None]).squeeze(1) - logarithm).float()
    return out
