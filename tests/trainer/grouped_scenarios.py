"""Grouped experts (trainer/grouped_layer.py) inside Megatron on the CPU: its router, dispatcher, DDP and optimizer, with
plain products in DeepGEMM's place, against Megatron's sequential experts in emulated FP8."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import grouped_reference
import torch
from expert_scenarios import EP2, RECOMPUTED
from trainer_scenarios import FP8, Ranks, train


class HeldWeights(torch.nn.Module):
    """The parameters of TransformerEngine's grouped linear, which is never called."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        for i in range(experts):
            weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{i}", weight)


def both(ranks: Ranks, **sections: Any) -> list[dict[str, Any]]:
    """[Megatron's experts, ours] of the same training."""
    how = {"folder": "moe", **FP8, **sections}  # in FP32 beside the products: only the order of sums differs
    plain = train(ranks, **how)
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

    from fp8slurm.cpu.layer_spec import _Backend
    from fp8slurm.trainer.grouped_layer import GroupedMLP

    held = GroupedMLPSubmodules(linear_fc1=HeldWeights, linear_fc2=HeldWeights)
    experts = partial(GroupedMLP, submodules=held, kernels=grouped_reference)
    with (
        patch.object(_Backend, "grouped_mlp_modules", lambda *_: experts),
        patch.object(grouped_reference, "PRODUCTS", torch.float32),
    ):
        return [plain, train(ranks, **how)]


def grouped(ranks: Ranks) -> list[dict[str, Any]]:
    return both(ranks)


def grouped_recomputed(ranks: Ranks) -> list[dict[str, Any]]:
    return both(ranks, **RECOMPUTED)


def grouped_ep2(ranks: Ranks) -> list[dict[str, Any]]:
    return both(ranks, **EP2)
