"""TransformerEngine's quantize-dequantize written out element by element, independent of fp8slurm.fp8."""

from __future__ import annotations

import torch


def _fake(x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    out = torch.empty_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            block = x[i : i + rows, j : j + columns]
            amax = block.abs().max()
            scale = torch.tensor(448.0) / amax if amax > 0 else torch.tensor(1.0)
            codes = (block * scale).to(torch.float8_e4m3fn)
            out[i : i + rows, j : j + columns] = codes.float() * (1.0 / scale)
    return out


def rowwise(x: torch.Tensor) -> torch.Tensor:
    """1x128 groups along the rows of x fp32 [T, K]."""
    return _fake(x, 1, 128)


def columnwise(x: torch.Tensor) -> torch.Tensor:
    """128x1 groups along the tokens of x fp32 [T, K]; the last group may be shorter."""
    return _fake(x, 128, 1)


def tiles(w: torch.Tensor) -> torch.Tensor:
    """128x128 blocks of w fp32 [N, K]."""
    return _fake(w, 128, 128)
