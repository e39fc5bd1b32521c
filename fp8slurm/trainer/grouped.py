"""The experts of a rank in block FP8 with one launch a product, in the place of TransformerEngine's grouped linears.

Parameters, their names and their checkpoints are Megatron's (TEGroupedMLP); only what is computed from them is ours:

    forward   codes of x -> gate and up -> SwiGLU, times the routing probability, and its codes -> down
    dgrad     codes of dy -> transpose of down -> SwiGLU's backward and its codes -> transpose of gate and up
    wgrad     codes of the columns, made with those of the rows, straight into Megatron's FP32 gradients

Formats are those of cpu/fp8_linear.py: rows in 1x128 groups, weights in 128x128 blocks, columns in 128x1 groups. Each
expert's rows are padded with zeros to whole tiles of 128. Which kernels do it is a `Kernels` (trainer/grouped_cuda.py
on a GPU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fp8slurm.fp8 import BLOCK

Tensor = torch.Tensor
Pair = tuple[Tensor, Tensor]
"""(codes, scale_inv)."""


@dataclass(frozen=True)
class Groups:
    """Where the rows of every expert lie: as Megatron hands them over, one expert after another, and padded."""

    rows: int
    """Rows without padding."""
    padded: list[int]
    """Rows of every expert with padding, in the order of the column-wise codes."""
    padded_on_device: Tensor
    """The same, int32 [experts]."""
    expert: Tensor
    """int32 [tiles * 128]: whose row it is, padding included."""
    table: Tensor
    """int32 [tiles, 6], what the quantizers know of every tile (fp8/triton_grouped.py, TABLE_WIDTH)."""

    @property
    def tiles(self) -> int:
        """Tiles of 128 rows, of all experts together."""
        return len(self.table)

    @staticmethod
    def of(counts: list[int], last_first: bool, device: torch.device) -> Groups:
        """`counts`: rows of every expert. `last_first`: the column-wise codes begin with the last expert's, as the
        gradients do that they are multiplied into. All goes to the device in one copy, without waiting for it."""
        real = np.asarray(counts, dtype=np.int64)
        tiles = -(-real // BLOCK)
        order = slice(None, None, -1) if last_first else slice(None)
        column_tile = np.empty_like(tiles)
        column_tile[order] = np.cumsum(tiles[order]) - tiles[order]
        expert = np.repeat(np.arange(len(real)), tiles)
        within = np.arange(len(expert)) - (np.cumsum(tiles) - tiles)[expert]
        table = np.stack(
            [
                (np.cumsum(real) - real)[expert] + within * BLOCK,
                np.minimum(real[expert] - within * BLOCK, BLOCK),
                column_tile[expert] * BLOCK,
                tiles[expert] * BLOCK,
                within * BLOCK,
                column_tile[expert] + within,
            ],
            axis=1,
        )
        padded = tiles[order] * BLOCK
        parts = padded, np.repeat(expert, BLOCK), table.ravel()
        flat = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        of_padded, of_rows, of_table = flat.split([len(p) for p in parts])
        return Groups(int(real.sum()), padded.tolist(), of_padded, of_rows, of_table.view(table.shape))


@dataclass(frozen=True)
class QuantizedWeights:
    """All matrices [N, K] of a kind in 128x128 blocks."""

    forward: Pair
    """Codes [experts, N, K] with scales [experts, N / 128, K / 128]."""
    transposed: Pair
    """The same of the transposes [K, N], with which the data gradient multiplies."""


class Kernels(Protocol):
    """What a machine computes experts with. Padded rows are [tiles * 128, width]; outputs of products are BF16."""

    def quantize_weights(self, weights: list[Tensor]) -> QuantizedWeights:
        """Of matrices [N, K]; the bytes that weight updates send to engines."""

    def quantize(self, x: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
        """Codes of x [rows, width] by rows, padded, and if wanted by columns, as `add_weight_gradient` takes them."""

    def swiglu(self, x: Tensor, probs: Tensor, groups: Groups, columns: bool) -> tuple[Pair, Pair | None]:
        """The same of silu(gate) * up * prob, x being gate and up side by side, padded; probs fp32 [rows]."""

    def swiglu_backward(self, grad: Tensor, x: Tensor, probs: Tensor, groups: Groups) -> tuple[Pair, Pair, Tensor]:
        """The same of the gradient of x, both ways, and the gradient of probs, fp32 [rows]; grad is padded."""

    def multiply(self, rows: Pair, weights: Pair, groups: Groups) -> Tensor:
        """Every row by its expert's matrix: [tiles * 128, N]."""

    def add_weight_gradient(self, grad: Pair, x: Pair, into: Tensor, groups: Groups) -> None:
        """Add every expert's grad^T . x, of column-wise codes, to `into` fp32 [experts, N, K], in their order."""

    def unpad(self, x: Tensor, groups: Groups) -> Tensor:
        """Padded rows without the padding: [rows, width]."""


class Layer(Protocol):
    """The experts of a layer (trainer/grouped_layer.py)."""

    kernels: Kernels

    def quantized(self) -> tuple[QuantizedWeights, QuantizedWeights]:
        """Of gate and up, [2F, H] of every expert, and of down, [H, F]."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Their gradients, fp32 [experts, N, K] each, in the order of the groups' column-wise codes."""


class Experts(torch.autograd.Function):
    """y [rows, H] of x [rows, H] and probs fp32 [rows].

    The weights are no inputs: their gradients are in main_grad when this has run backward, and 2 x 128 nodes of
    autograd a layer, each with a hook of Megatron's, would only find that out. So Megatron's DDP must not wait for
    those hooks (overlap_grad_reduce), which build.build_ddp does not let it do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor, groups: Groups, layer: Layer, with_backward: bool) -> Tensor:
        if not groups.tiles:
            ctx.saved = None
            return x.new_empty(x.shape)
        kernels, (fc1, fc2) = layer.kernels, layer.quantized()
        x_rows, x_columns = kernels.quantize(x, groups, with_backward)
        both = kernels.multiply(x_rows, fc1.forward, groups)
        h_rows, h_columns = kernels.swiglu(both, probs, groups, with_backward)
        y = kernels.unpad(kernels.multiply(h_rows, fc2.forward, groups), groups)
        if with_backward:
            ctx.saved = x_columns, both, h_columns, probs, groups, fc1.transposed, fc2.transposed, layer
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved is None:
            return torch.zeros_like(dy), dy.new_zeros(len(dy), dtype=torch.float32), None, None, None
        x_columns, both, h_columns, probs, groups, fc1, fc2, layer = ctx.saved
        ctx.saved = None
        kernels, (fc1_grad, fc2_grad) = layer.kernels, layer.gradients()
        dy_rows, dy_columns = kernels.quantize(dy.contiguous(), groups, True)
        dh = kernels.multiply(dy_rows, fc2, groups)
        kernels.add_weight_gradient(dy_columns, h_columns, fc2_grad, groups)
        d_rows, d_columns, d_probs = kernels.swiglu_backward(dh, both, probs, groups)
        dx = kernels.unpad(kernels.multiply(d_rows, fc1, groups), groups)
        kernels.add_weight_gradient(d_columns, x_columns, fc1_grad, groups)
        return dx, d_probs, None, None, None


def stacked(matrices: list[Tensor]) -> tuple[Tensor, bool]:
    """(view [G, N, K] of matrices [N, K] that lie one after another in one buffer, whether the last of them is first).

    Megatron's DDP hands out its buffer from the last parameter to the first. RuntimeError if they lie otherwise."""
    first, size = matrices[0], matrices[0].numel()
    places = [int(m.storage_offset()) for m in matrices]
    step = places[1] - places[0] if len(places) > 1 else size
    one_buffer = len({m.untyped_storage()._cdata for m in matrices}) == 1
    even = abs(step) == size and all(b - a == step for a, b in zip(places, places[1:]))
    if not (one_buffer and even and first.is_contiguous()):
        raise RuntimeError(f"{len(matrices)} experts' gradients {list(first.shape)} do not lie side by side: {places}")
    shape = (len(matrices), *first.shape)
    return first.as_strided(shape, (size, *first.stride()), min(places)), step < 0
