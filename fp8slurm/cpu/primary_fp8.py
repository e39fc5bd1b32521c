"""FP8 primary weights without a GPU: a tensor that is its codes and scales, as TransformerEngine's is.

Megatron's DDP, distributed optimizer and checkpoints treat it as they treat a Float8BlockwiseQTensor: its codes lie in
DDP's uint8 buffer, the optimizer quantizes its share of bf16(master), and what is gathered are codes. Only what
TransformerEngine does there with kernels is done here in torch; trainer/primary_fp8.py says what the attributes are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map

from fp8slurm.core.patches import patch
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, BlockFP8, scale_from_amax, scale_shape
from fp8slurm.fp8.quantize import dequantize, quantize

QUANTIZER = SimpleNamespace(block_len=BLOCK, force_pow_2_scales=False, amax_epsilon=0.0)
"""What TransformerEngine's quantizer says of itself."""


class PrimaryFP8(torch.Tensor):
    """[N, K], to autograd and Megatron a BF16 tensor. Every operation but a copy into it works on its values."""

    _rowwise_data: torch.Tensor
    """uint8 [N, K]"""
    _rowwise_scale_inv: torch.Tensor
    """fp32 [ceil(N / 128), ceil(K / 128) up to a multiple of 4], as TransformerEngine pads it"""
    _columnwise_data: torch.Tensor | None
    """uint8 [K, N], the same transposed, of which the data gradient is made; None where there are no gradients. As
    TransformerEngine's it changes in `_create_columnwise` alone: left behind, it gives gradients of older weights."""
    _columnwise_scale_inv: torch.Tensor | None
    _is_2D_scaled = True
    _fp8_dtype = "E4M3"

    @staticmethod
    def __new__(
        cls, codes: torch.Tensor, scale_inv: torch.Tensor, transposed: torch.Tensor | None = None,
        transposed_scale_inv: torch.Tensor | None = None,
    ) -> PrimaryFP8:  # fmt: skip
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16, device=codes.device)
        made._rowwise_data, made._rowwise_scale_inv = codes, scale_inv
        made._columnwise_data, made._columnwise_scale_inv = transposed, transposed_scale_inv
        return made

    @classmethod
    def of_shape(cls, rows: int, columns: int, gradients: bool) -> PrimaryFP8:
        """A weight of zeros."""

        def zeros(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            r, c = scale_shape((rows, columns))
            return torch.zeros(rows, columns, dtype=torch.uint8), torch.ones(r, -(-c // 4) * 4)

        return cls(*zeros(rows, columns), *(zeros(columns, rows) if gradients else ()))

    @property
    def data(self) -> PrimaryFP8:
        """Itself: a copy would keep the codes that DDP moved away from."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value is not self:
            raise RuntimeError("an FP8 weight takes values by copy_")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._rowwise_data.untyped_storage()

    def _get_quantizer(self) -> SimpleNamespace:
        return QUANTIZER

    def block_fp8(self) -> BlockFP8:
        """Its codes and scales, not copies."""
        rows, columns = scale_shape(tuple(self.shape))
        return BlockFP8(self._rowwise_data.view(E4M3), self._rowwise_scale_inv[:rows, :columns])

    def _create_columnwise(self) -> None:
        assert self._columnwise_data is not None and self._columnwise_scale_inv is not None
        now = self.block_fp8()
        self._columnwise_data.copy_(self._rowwise_data.t())
        self._columnwise_scale_inv[: now.scale_inv.shape[1], : now.scale_inv.shape[0]] = now.scale_inv.t()

    def for_data_gradient(self) -> torch.Tensor:
        """The values [N, K] in FP32 that the transposed codes stand for."""
        assert self._columnwise_data is not None and self._columnwise_scale_inv is not None
        rows, columns = scale_shape(tuple(self._columnwise_data.shape))
        codes, scales = self._columnwise_data.view(E4M3), self._columnwise_scale_inv[:rows, :columns]
        return dequantize(BlockFP8(codes, scales)).t()

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return dequantize(self.block_fp8(), dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            w = args[0]
            return cls(w._rowwise_data, w._rowwise_scale_inv, w._columnwise_data, w._columnwise_scale_inv)
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            made = quantize(_values(args[1]).to(torch.bfloat16))
            into = args[0].block_fp8()
            into.data.copy_(made.data)
            into.scale_inv.copy_(made.scale_inv)
            return args[0]
        return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))


def _values(x: Any) -> Any:
    return x.dequantize() if isinstance(x, PrimaryFP8) else x


def make_primary(module: torch.nn.Module, linears: tuple[type, ...]) -> None:
    """Put FP8 weights, of zeros, in the place of those of all `linears` in the module."""
    for linear in module.modules():
        if isinstance(linear, linears):
            weight: Any = linear.weight
            rows, columns = weight.shape
            primary = torch.nn.Parameter(PrimaryFP8.of_shape(rows, columns, weight.requires_grad), weight.requires_grad)
            for name, value in vars(weight).items():  # what Megatron wrote on it: how it is cut, who reduces it
                setattr(primary, name, value)
            linear.weight = primary


@torch.no_grad()
def quantize_shares(
    weights: list[PrimaryFP8], shares: list[torch.Tensor | None], starts: list[int | None],
    group: dist.ProcessGroup, fsdp_shares: None = None,
) -> None:  # fmt: skip
    """bf16(share) -> its weight's codes, and the scales, over all ranks of the group that have a share of a weight.

    shares: flat, each from element starts[i] of its flat weight; None: all of that weight is other ranks'. Here is what
    TransformerEngine's cast_master_weights_to_fp8 does: each block's largest magnitude over the ranks, the scale from
    it, the codes of this rank's share. The other codes of a weight come with the gather.
    """
    assert fsdp_shares is None
    flats, amaxes = [], []
    for weight, share, start in zip(weights, shares, starts):
        flat = torch.zeros(weight.numel())
        if share is not None and start is not None:
            flat[start : start + share.numel()] = share.to(weight.dtype).float()
        rows, columns = weight.shape
        r, c = scale_shape((rows, columns))
        whole = F.pad(flat.view(rows, columns), (0, c * BLOCK - columns, 0, r * BLOCK - rows))
        flats.append(flat)
        amaxes.append(whole.view(r, BLOCK, c, BLOCK).abs().amax(dim=(1, 3)))
    if not weights:
        return
    together = torch.cat([amax.flatten() for amax in amaxes])
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)
    parts = together.split([amax.numel() for amax in amaxes])
    for weight, share, start, flat, part, amax in zip(weights, shares, starts, flats, parts, amaxes):
        scale = scale_from_amax(part.view(amax.shape), weight.dtype)
        weight.block_fp8().scale_inv.copy_(1 / scale)
        if share is None or start is None:
            continue
        rows, columns = weight.shape
        spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        codes = (flat.view(rows, columns) * spread).clamp(-448, 448).to(E4M3).view(torch.uint8).view(-1)
        mine = slice(start, start + share.numel())
        weight._rowwise_data.view(-1)[mine] = codes[mine]


def refresh(weights: list[PrimaryFP8]) -> None:
    """What TransformerEngine does when all codes are there."""
    for weight in weights:
        weight._create_columnwise()


def move(weight: PrimaryFP8, codes: torch.Tensor) -> None:
    """Make `codes` (uint8 [N, K]) the weight's own, with the values that it has."""
    codes.copy_(weight._rowwise_data)
    weight._rowwise_data = codes


def gather(whole: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
    """All ranks' parts into `whole`, at once: gloo joins coalesced gathers of codes and BF16 into one of one dtype."""
    assert not async_op
    dist.all_gather(list(whole.chunk(group.size())), own, group=group)


def install() -> None:
    """Make Megatron know this tensor as its FP8 tensor, as it knows TransformerEngine's where that is installed."""
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.fp8_utils as fp8_utils

    patch(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    patch(fp8_utils, "FP8_TENSOR_CLASS", PrimaryFP8)
    patch(fp8_utils, "_modify_underlying_storage_impl", move)
    patch(fp8_utils, "_quantize_param_shard_impl", quantize_shares)
    patch(fp8_utils, "te_post_all_gather_processing", refresh)
    patch(buffers, "dist_all_gather_func", gather)
