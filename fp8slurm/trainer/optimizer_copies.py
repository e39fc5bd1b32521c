"""Megatron's copies around an optimizer step, in few launches where it makes one a parameter.

A rank of a mixture of experts has thousands of small parameters (1,403 in five layers of Qwen3-30B-A3B). For each,
DistributedOptimizer looks up where it lies, makes views and launches a copy of the new master into the weight. What is
looked up stays the same from step to step: here it is done once, and the copies are one `torch._foreach_copy_`. The
bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from fp8slurm.core.patches import note

PATCHED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"


def in_few_launches(optimizer: Any) -> None:
    """Replace both copies of every part of a Megatron optimizer with FP32 masters of its shards, or FP32 weights.

    Others (FP8 primary weights, BF16 moments, Adam on the host, the plain optimizer) are left alone."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for part in optimizer.chained_optimizers:
        if type(part) is not DistributedOptimizer or part.is_stub_optimizer or part.ddp_config.fp8_param_gather:
            continue
        if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            continue
        replacements = {
            "_copy_model_grads_to_main_grads": _gradients(part),
            "_copy_main_params_to_model_params": _weights(part),
        }
        for name, new in replacements.items():
            assert hasattr(part, name), name
            setattr(part, name, new)
            note(f"{PATCHED}.{name}")


def _masters(part: Any) -> list[torch.Tensor]:
    return list(chain(*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups))


def _parameters(part: Any) -> list[Any]:
    return list(chain(*part.model_float16_groups, *part.model_fp32_groups))


def _gradients(part: Any) -> Callable[[], None]:
    """Each master's gradient is this rank's share of DDP's, itself and not a copy: both are FP32."""
    shares: list[torch.Tensor] = []

    def copy() -> None:
        if not shares:
            for parameter in _parameters(part):
                where = part._get_model_param_range_map(parameter)["param"]
                assert parameter.main_grad.dtype == torch.float32
                shares.append(parameter.main_grad.view(-1)[where.start : where.end])
        for master, share in zip(_masters(part), shares, strict=True):
            master.grad = share

    return copy


def _weights(part: Any) -> Callable[[], None]:
    """Each master, rounded to the weight's dtype, into this rank's share of DDP's buffer of weights."""
    shares: list[torch.Tensor] = []

    def copy() -> None:
        if not shares:
            for parameter in _parameters(part):
                where = part._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
                buffer, _, bucket = part.model_param_gbuf_map[parameter]
                shares.append(part.buffers[buffer].buckets[bucket].param_data.view(-1)[where.start : where.end])
        by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for share, master in zip(shares, _masters(part), strict=True):
            into, of = by_dtype.setdefault(share.dtype, ([], []))
            into.append(share)
            of.append(master.detach())
        with torch.no_grad():
            for into, of in by_dtype.values():
                torch._foreach_copy_(into, of)

    return copy
