"""Grouped experts (trainer/grouped_layer.py) inside Megatron on the CPU: its router, dispatcher, DDP and optimizer, with
plain products in DeepGEMM's place, against Megatron's sequential experts in emulated FP8."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import grouped_reference
import torch
from expert_scenarios import EP2, RECOMPUTED
from trainer_scenarios import BF16, FP8, Ranks, steps, train, weights

from fp8slurm.trainer import build


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


# The copies around an optimizer step.


def copies(ranks: Ranks, **sections: Any) -> list[dict[str, Any]]:
    """[Megatron's, ours]: steps, with a new optimizer in between, and the weights after them."""

    def taken() -> dict[str, Any]:
        with ranks.trainer(folder="moe", **EP2, **sections) as trainer:
            history = steps(trainer, range(2))
            trainer.new_optimizer()
            history += steps(trainer, range(2, 4))
            replaced = sum("_copy_main_params_to_model_params" in vars(p) for p in trainer.optimizer.chained_optimizers)
            return {"steps": history, "weights": weights(trainer), "replaced": replaced}

    with patch.object(build, "in_few_launches", lambda _: None):
        theirs = taken()
    return [theirs, taken()]


def copies_bf16(ranks: Ranks) -> list[dict[str, Any]]:
    return copies(ranks, **BF16)


def copies_fp32(ranks: Ranks) -> list[dict[str, Any]]:
    return copies(ranks)
