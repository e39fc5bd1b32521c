"""FP8 primary weights: the Linear weights live as block-FP8 codes and scales, with FP32 masters in the optimizer.

All that has to be known of TransformerEngine's tensor class (Float8BlockwiseQTensor, 2.16) is here; without a GPU
cpu/primary_fp8.py has one with the same attributes:

    _rowwise_data [N, K] uint8, a view into DDP's buffer; _rowwise_scale_inv [ceil(N/128), ceil(K/128) up to a multiple
    of 4] fp32; _columnwise_data, _columnwise_scale_inv: the same transposed, or None, remade after every step.

A step quantizes bf16(master), as Megatron does without primary FP8 weights for every product. So a checkpoint holds
bf16(master) as the model's weights: nothing is lost, quantizing it gives the primary codes again, and it is what a run
without FP8 primary weights writes. What is dequantized from the codes would be 3 bits of mantissa dressed as 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.block import E4M3, BlockFP8, scale_shape
from fp8slurm.fp8.policy import decide
from fp8slurm.models.entries import Entry

PIECE = 2**25
"""Elements of a rank's share that HostAdam has in a round; more where one FP8 weight has more."""
SLOTS = 2
"""Rounds that it has under way at a time."""


def is_primary(tensor: Any) -> bool:
    """True for a tensor that holds its values as block-FP8 codes and scales."""
    return hasattr(tensor, "_rowwise_data") and hasattr(tensor, "_is_2D_scaled")


def codes_and_scales(tensor: Any, name: str = "") -> BlockFP8:
    """The weight's own codes [N, K] and scales [ceil(N/128), ceil(K/128)], not copies; scales without their padding.

    Raises RuntimeError, naming `name`, where only the transposed form is there.
    """
    codes, scales = tensor._rowwise_data, tensor._rowwise_scale_inv
    if codes is None or scales is None:
        raise RuntimeError(
            f"{name or 'weight'}: TransformerEngine keeps no row-wise codes of it, only the transposed ones"
        )
    rows, columns = scale_shape(tuple(codes.shape))
    return BlockFP8(codes.view(E4M3), scales[:rows, :columns])


def check_primary(parameters: Iterable[tuple[Entry, Any]]) -> list[str]:
    """Names of the FP8 weights, once it is certain that they are those that the policy quantizes, and in its format.

    Raises RuntimeError with counts and the first names that differ, or with what is wrong with a weight's format.
    """
    expected, primary, wrong = set(), set(), []
    for entry, parameter in parameters:
        if all(decide(t.name, t.shape).quantize for t in entry.tensors):
            expected.add(entry.name)
        if is_primary(parameter):
            primary.add(entry.name)
            wrong += [f"{entry.name}: {what}" for what in _format_faults(parameter)]
    if expected != primary or not expected:
        raise RuntimeError(
            f"--fp8.param-gather: {len(primary)} parameters are FP8, {len(expected)} should be; still in high "
            f"precision: {_shown(expected - primary)}; FP8 but should not be: {_shown(primary - expected)}"
        )
    if wrong:
        raise RuntimeError(f"--fp8.param-gather: {len(wrong)} faults in the FP8 weights' format, the first: {wrong[0]}")
    return sorted(primary)


def _format_faults(parameter: Any) -> list[str]:
    quantizer = parameter._get_quantizer()
    faults = []
    if not parameter._is_2D_scaled or quantizer.block_len != BLOCK:
        faults.append(f"not in {BLOCK}x{BLOCK} blocks")
    if not str(parameter._fp8_dtype).endswith("E4M3"):
        faults.append(f"{parameter._fp8_dtype} instead of E4M3")
    if quantizer.force_pow_2_scales or quantizer.amax_epsilon:
        faults.append("power-of-two scales or an epsilon: NVTE_FP8_BLOCK_SCALING_FP32_SCALES came too late")
    if parameter.dtype != torch.bfloat16:
        faults.append(f"stands for {parameter.dtype} instead of BF16")
    return faults


def _shown(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "") if names else "none"


def forget_initial_values(module: torch.nn.Module) -> None:
    """Drop TransformerEngine's copies of the values before they were quantized: they are not a checkpoint's.

    The methods go too: Megatron calls them whenever it makes an optimizer, and finds None the second time.
    """
    for parameter in module.parameters():
        for name in ("_high_precision_init_val", "get_high_precision_init_val", "clear_high_precision_init_val"):
            if name in getattr(parameter, "__dict__", {}):
                delattr(parameter, name)


@torch.no_grad()
def fill(parameter: Any, values: torch.Tensor) -> None:
    """Give the FP8 weight the values [N, K] (any float, rounded to BF16 first), transposed form included."""
    parameter.copy_(values.to(parameter.device, parameter.dtype))
    refresh(parameter)


@torch.no_grad()
def copy(into: Any, source: Any) -> None:
    """Copy codes and scales, not by way of the values."""
    into._rowwise_data.copy_(source._rowwise_data)
    into._rowwise_scale_inv.copy_(source._rowwise_scale_inv)
    refresh(into)


def refresh(parameter: Any) -> None:
    """Make the transposed form anew where there is one; the products of the backward pass read it."""
    if parameter._columnwise_data is not None:
        parameter._create_columnwise()


class Masters:
    """The FP32 masters of Megatron's distributed optimizer: this rank's share of each parameter, by parameter."""

    def __init__(self, optimizer: Any) -> None:
        self.own: dict[Any, tuple[torch.Tensor, int, int]] = {}
        """parameter -> (share fp32, its first and its last element + 1 in the flat parameter)."""
        self.groups: dict[Any, dist.ProcessGroup] = {}
        for part in optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            for buffer in part.buffers:
                self.groups.update(dict.fromkeys(buffer.params, part.data_parallel_group))
            for parameters, shares in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups):
                for parameter, share in zip(parameters, shares):
                    where = part._get_model_param_range_map(parameter)["param"]
                    self.own[parameter] = (share, where.start, where.end)

    @torch.no_grad()
    def set(self, parameter: Any, values: torch.Tensor) -> None:
        """Start this rank's share from `values`, all of the parameter, rounded to the parameter's dtype."""
        if parameter in self.own:
            share, start, end = self.own[parameter]
            share.copy_(values.reshape(-1)[start:end].to(parameter.dtype))

    def rounded(self) -> dict[Any, torch.Tensor]:
        """Copies of the shares, flat, in the parameters' dtype."""
        return {parameter: share.to(parameter.dtype) for parameter, (share, _, _) in self.own.items()}

    @torch.no_grad()
    def restore(self, shares: dict[Any, torch.Tensor]) -> None:
        """The inverse of `rounded`, into another optimizer of the same parameters."""
        for parameter, (share, _, _) in self.own.items():
            share.copy_(shares[parameter])

    @torch.no_grad()
    def whole(self, parameter: Any) -> torch.Tensor:
        """bf16(master), all of the parameter [N, K], on its device; all data-parallel ranks together."""
        flat = torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        if parameter in self.own:
            share, start, end = self.own[parameter]
            flat[start:end].copy_(share)
        group = self.groups[parameter]
        if group.size() > 1:
            # bytes, of which each is zero on all ranks but one: a sum of numbers would lose the sign of -0
            dist.all_reduce(flat.view(torch.uint8), group=group)
        return flat.view(parameter.shape)


def completed_together(places: list[tuple[int, int, Any]], own: int, ranks: int, piece: int) -> Iterator[list[Any]]:
    """FP8 weights of a bucket, (first element, last + 1, weight) in order, by rounds; `own` elements are a rank's.

    A weight is quantized in one call of all ranks, because a block's scale is the ranks' that share it. So that no rank
    waits for another one's Adam, a round has weights of every rank, about `piece` elements of each; the few that lie
    across ranks come last, one a round.
    """
    rounds: list[list[Any]] = []
    number, filled = [0] * ranks, [0] * ranks
    across = []
    for place in places:
        start, end, _ = place
        rank, last = start // own, (end - 1) // own
        if rank != last:
            across.append([place])
            continue
        if filled[rank] and filled[rank] + end - start > piece:
            number[rank], filled[rank] = number[rank] + 1, 0
        filled[rank] += end - start
        if number[rank] == len(rounds):
            rounds.append([])
        rounds[number[rank]].append(place)
    yield from rounds
    yield from across


def in_bf16(model: dict[str, Any], value: Callable[[Any], torch.Tensor] | None) -> None:
    """Put BF16 tensors in host memory in the place of FP8 weights in Megatron's sharded state dict.

    value(weight): what is saved, the same calls in the same order on all ranks; None: room for what will be loaded.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    for item in nested_values(model):
        weight = getattr(item, "data", None)
        if weight is None or not is_primary(weight):
            continue
        if value is None:
            item.data = torch.empty(weight.shape, dtype=weight.dtype)
            continue
        whole = value(weight)
        if is_main_replica(item.replica_id):
            item.data = whole.cpu()
        else:  # never written: no memory
            item.data = torch.zeros((), dtype=weight.dtype).expand(weight.shape)


def dequantized(weight: Any) -> torch.Tensor:
    """The weight's values in BF16; of a weight without masters. Quantizing them gives its codes and scales again."""
    return weight.dequantize()
