"""Mixture of experts on top of Megatron's: replayed routing, the scale of the load-balancing loss, grouped products."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fp8slurm.trainer.context_parallel import ModelInput, whole

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

log = logging.getLogger(__name__)

CUTLASS = "NVTE_USE_CUTLASS_GROUPED_GEMM"
"""TransformerEngine's switch, read at every product (2.16 to 2.20.2). Off by default: then it calls cuBLAS once for
every expert, and at 128 experts the GPU waits for launches."""


def choose_grouped_products(capability: tuple[int, int], transformer_config: Any) -> None:
    """Have TransformerEngine multiply a BF16 mixture's experts in one CUTLASS launch, where its kernels can.

    They are for Hopper, 16-bit numbers and inner dimensions of whole multiples of 128; weight gradients, whose inner
    dimension is an expert's number of tokens, stay with cuBLAS. A value that is set already is kept. To be called
    before the first product, on every rank; `capability`: of this rank's GPU.
    """
    c = transformer_config
    if not c.num_moe_experts or c.fp8 or not c.bf16:
        return
    if CUTLASS in os.environ:
        log.info("grouped products of the experts: %s=%s was set already", CUTLASS, os.environ[CUTLASS])
        return
    inner = c.hidden_size, c.moe_ffn_hidden_size // c.expert_tensor_parallel_size
    if capability != (9, 0) or any(size % 128 for size in inner):
        log.info(
            "grouped products of the experts: cuBLAS, one launch an expert (CUTLASS's kernels want compute capability "
            "9.0 and multiples of 128; here %d.%d, %d and %d)", *capability, *inner
        )  # fmt: skip
        return
    os.environ[CUTLASS] = "1"
    log.info("grouped products of the experts: CUTLASS (%s=1; 0 in the environment keeps cuBLAS)", CUTLASS)


class RoutingReplay:
    """Has the routers of a model send tokens where a micro-batch says (`PackedBatch.routing`), if it says so.

    Only the choice of experts is replayed: their weights are the softmax of this model's own logits at those experts,
    so that gradients reach the router. Megatron keeps one RouterReplay a router, in a list of all models in the
    process; here each is reached through its own router, so that a reference model is left alone.
    """

    def __init__(self, module: GPTModel, sequence_rank: int = 0, sequence_size: int = 1, compare: bool = False) -> None:
        """`module`: a GPTModel made with moe_enable_routing_replay. The sequence is cut into `sequence_size` equal
        parts (sequence parallelism), this rank's being number `sequence_rank`. `compare`: note where routers would
        choose otherwise; for those of model.exact (cpu/exact_layers.py)."""
        self._routers = [layer.mlp.router for layer in module.decoder.layers]
        self._rank, self._size = sequence_rank, sequence_size
        self._active, self._compare = False, compare
        self._noted: list[tuple[ModelInput, torch.Tensor]] = []
        self.differing: list[torch.Tensor] = []
        """With `compare`, of the micro-batches of the last pass: the first of this stage's layers (from 1) whose router
        would send a token elsewhere than replayed, 0 where none would; int32 [T]. Means nothing for a segment's last
        token and padding."""
        for router in self._routers:
            router.register_forward_pre_hook(self._choose)
            if compare:
                router.register_forward_hook(self._note)

    def set(self, given: ModelInput) -> None:
        """To be called before the forward pass of every micro-batch."""
        self._active = given.routing is not None
        if given.routing is None:
            return
        part = given.routing.chunk(self._size)[self._rank]
        for router in self._routers:
            router.router_replay.set_target_indices(part[:, router.layer_number - 1].long())
        if self._compare:
            self._noted.append((given, torch.zeros(len(part), dtype=torch.int32)))

    def finish(self, context: dist.ProcessGroup) -> None:
        """Forget what was replayed, after the last micro-batch's backward pass. context: the context-parallel ranks."""
        self._active = False
        self.differing = [whole(noted, given, context) for given, noted in self._noted]
        self._noted = []
        for router in self._routers:
            router.router_replay.clear_indices()

    def _choose(self, router: Any, _: Any) -> None:
        from megatron.core.transformer.moe.router_replay import RouterReplayAction

        action = None
        if self._active:
            # In the backward pass later micro-batches have long been set: Megatron keeps a queue for that.
            again = _is_recomputed(router)
            action = RouterReplayAction.REPLAY_BACKWARD if again else RouterReplayAction.REPLAY_FORWARD
        router.router_replay.set_router_replay_action(action)

    def _note(self, router: Any, _: Any, __: Any) -> None:
        if not self._active or _is_recomputed(router):
            return
        replay, noted = router.router_replay, self._noted[-1][1]
        other = (replay.own != replay.target_topk_idx.sort(-1).values).any(-1)
        noted[other & (noted == 0)] = router.layer_number


def _is_recomputed(router: Any) -> bool:
    """A layer that is recomputed runs without gradients first, and with them in the backward pass."""
    return bool(router.training and router.config.recompute_granularity == "full" and torch.is_grad_enabled())


def scale_aux_loss(transformer_config: Any, tokens: int, group: dist.ProcessGroup) -> None:
    """Make the load-balancing loss of an update the mean over its tokens, to be called on all ranks before it.

    Megatron multiplies each micro-batch's by its number of tokens, expecting gradients to be divided by the tokens of
    the batch, which the trainer does not do: its losses are summed as they are. tokens: of this rank's micro-batches,
    padding included; `group`: the data-parallel ranks.
    """
    total = torch.tensor(tokens, device=torch.cuda.current_device())
    dist.all_reduce(total, group=group)
    transformer_config.moe_grad_scale_func = lambda: 1.0 / total.float()


def take_aux_loss(layers: int, micro_batches: int, data_parallel_size: int) -> float:
    """The load-balancing loss (without its coefficient) of the update just made, mean over layers and micro-batches.

    E * sum over experts of (share of tokens * mean probability): 1 if balanced, E / k if k experts take everything
    (Fedus et al. 2021, Switch Transformer, eq. 4). Called on all ranks; the same on all.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    tracker = get_moe_metrics_tracker()
    total = torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device())
    if "load_balancing_loss" in tracker.metrics:
        values = tracker.metrics["load_balancing_loss"].values
        total += values.double().sum()
        values.zero_()
    dist.all_reduce(total)  # stages hold their layers' part, sequence-parallel ranks their tokens'
    return float(total) / (layers * micro_batches * data_parallel_size)
