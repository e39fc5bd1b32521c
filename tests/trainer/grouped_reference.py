"""The kernels of grouped experts (trainer/grouped.py, Kernels) in plain torch: real codes in the real layout, products
of what they stand for."""

from __future__ import annotations

import torch

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, BlockFP8
from fp8slurm.fp8.quantize import quantize as quantize_blocks
from fp8slurm.fp8.reference import dequantize_reference, quantize_reference
from fp8slurm.trainer.grouped import Groups, Pair, QuantizedWeights

Tensor = torch.Tensor
PRODUCTS = torch.bfloat16
"""Dtype of what `multiply` gives."""


def _tile(x: Tensor, tile: int) -> Tensor:
    return x[tile * BLOCK : (tile + 1) * BLOCK]


def padded(x: Tensor, groups: Groups) -> Tensor:
    """[rows, ...] -> [tiles * 128, ...], zeros where there is no row."""
    out = x.new_zeros(groups.tiles * BLOCK, *x.shape[1:])
    for tile, (first, real, *_) in enumerate(groups.table.tolist()):
        _tile(out, tile)[:real] = x[first : first + real]
    return out


def _codes(x: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
    """Both copies of x [tiles * 128, width]."""
    width = x.shape[1]
    rows = quantize_reference(x, (1, BLOCK))
    if not columns:
        return (rows.data, rows.scale_inv), None
    flat, scale_inv = torch.empty(x.numel(), dtype=E4M3), torch.empty(groups.tiles, width)
    for tile, (_, _, begin, length, offset, scale_row) in enumerate(groups.table.tolist()):
        q = quantize_reference(_tile(x, tile), (BLOCK, 1))
        block = flat.view(torch.uint8)[begin * width : (begin + length) * width].view(width, length)
        block[:, offset : offset + BLOCK] = q.data.view(torch.uint8).t()
        scale_inv[scale_row] = q.scale_inv
    return (rows.data, rows.scale_inv), (flat, scale_inv.t())


def quantize_weights(weights: list[Tensor]) -> QuantizedWeights:
    q = [quantize_blocks(w) for w in weights]
    codes, scale_inv = torch.stack([w.data for w in q]), torch.stack([w.scale_inv for w in q])
    turned = codes.view(torch.uint8).transpose(1, 2).contiguous().view(E4M3)
    return QuantizedWeights((codes, scale_inv), (turned, scale_inv.transpose(1, 2).contiguous()))


def quantize(x: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
    return _codes(padded(x, groups), groups, columns)


def swiglu(x: Tensor, probs: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
    gate, up = x.float().chunk(2, dim=1)
    out = gate * gate.sigmoid() * up * padded(probs, groups)[:, None]
    return _codes(out.to(x.dtype), groups, columns)


def swiglu_backward(grad: Tensor, x: Tensor, probs: Tensor, groups: Groups) -> tuple[Pair, Pair, Tensor]:
    gate, up = x.float().chunk(2, dim=1)
    sigmoid, share = gate.sigmoid(), grad.float()
    d_probs = (share * gate * sigmoid * up).sum(1, keepdim=True)
    share = share * padded(probs, groups)[:, None]
    d_gate, d_up = share * up * sigmoid * (1 + gate * (1 - sigmoid)), share * gate * sigmoid
    rows, columns = _codes(torch.cat((d_gate, d_up), dim=1).to(x.dtype), groups, True)
    assert columns is not None
    return rows, columns, unpad(d_probs, groups)[:, 0]


def multiply(rows: Pair, weights: Pair, groups: Groups) -> Tensor:
    x = dequantize_reference(BlockFP8(*rows, (1, BLOCK)))
    out = torch.empty(len(x), weights[0].shape[1], dtype=PRODUCTS)
    for tile in range(groups.tiles):
        whose = groups.expert[tile * BLOCK : (tile + 1) * BLOCK]
        assert (whose == whose[0]).all()
        w = dequantize_reference(BlockFP8(weights[0][whose[0]], weights[1][whose[0]]))
        _tile(out, tile).copy_(_tile(x, tile) @ w.t())
    return out


def add_weight_gradient(grad: Pair, x: Pair, into: Tensor, groups: Groups) -> None:
    assert into.dtype == torch.float32 and groups.padded == groups.padded_on_device.tolist()

    def values(pair: Pair, width: int, begin: int, length: int) -> Tensor:
        codes = pair[0][begin * width : (begin + length) * width].view(width, length)
        scale_inv = pair[1][:, begin // BLOCK : (begin + length) // BLOCK].contiguous()
        return dequantize_reference(BlockFP8(codes, scale_inv, (1, BLOCK)))

    begin = 0
    for one, length in zip(into, groups.padded, strict=True):
        one += values(grad, one.shape[0], begin, length) @ values(x, one.shape[1], begin, length).t()
        begin += length


def unpad(x: Tensor, groups: Groups) -> Tensor:
    out = x.new_empty(groups.rows, x.shape[1])
    for tile, (first, real, *_) in enumerate(groups.table.tolist()):
        out[first : first + real] = _tile(x, tile)[:real]
    return out
