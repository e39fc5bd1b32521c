"""Megatron's modules where model.exact is on: the values of cpu/exact.py, with the gradients of the ordinary modules.

The engine has the same values (cpu/exact_engine.py). The backward pass has no engine to agree with: it stays what it is
without model.exact, at the exact values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import unpermute
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup

from fp8slurm.cpu import exact
from fp8slurm.cpu.fp8_linear import FP8ColumnParallelLinear, FP8RowParallelLinear, gather_sequence
from fp8slurm.cpu.packed_attention import PackedDotProductAttention
from fp8slurm.cpu.rms_norm import RMSNorm
from fp8slurm.fp8.quantize import quantize


class _Value(torch.autograd.Function):
    """The value of one tensor, with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
        assert value.shape == ordinary.shape and value.dtype == ordinary.dtype, (value, ordinary)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad


def with_gradient_of(ordinary: Callable[[], torch.Tensor], value: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `value` computes; where gradients are asked for, with those of what `ordinary` computes."""
    with torch.no_grad():
        exact_value = value()
    return _Value.apply(exact_value, ordinary()) if torch.is_grad_enabled() else exact_value


class ExactRMSNorm(RMSNorm):
    """RMSNorm with exact values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.eps is not None
        eps = self.eps
        return with_gradient_of(
            lambda: super(ExactRMSNorm, self).forward(x), lambda: exact.rms_norm(x, self.weight, eps)
        )


class _ExactFP8:
    """Mixin for the emulated FP8 linears: exact products of the same codes and scales."""

    _blocks: exact.Blocks | None = None

    def weights_changed(self) -> None:
        self._blocks = None
        super().weights_changed()  # type: ignore[misc]

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._blocks is None:
            q = quantize(weight, name=type(self).__name__)
            self._blocks = exact.weight_blocks(q.data, q.scale_inv)
        blocks, ordinary = self._blocks, super()._forward_impl  # type: ignore[misc]

        def values() -> torch.Tensor:
            whole = gather_sequence(input, kwargs["tp_group"]) if kwargs.get("sequence_parallel") else input
            return exact.linear_fp8(whole, blocks)

        return with_gradient_of(lambda: ordinary(input, weight, *args, **kwargs), values)


class ExactColumnParallelLinear(_ExactFP8, FP8ColumnParallelLinear):
    """linear_qkv and linear_fc1 with exact values."""


class ExactRowParallelLinear(_ExactFP8, FP8RowParallelLinear):
    """linear_proj and linear_fc2 with exact values."""


class ExactAttention(PackedDotProductAttention):
    """Causal attention inside every segment of a pack, with exact values."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Any) -> torch.Tensor:
        """As PackedDotProductAttention's."""

        def values() -> torch.Tensor:
            out = query.new_zeros(query.shape)
            for r in groups:
                parts = []
                for x, grid in ((query, r.queries), (key, r.keys), (value, r.keys)):
                    laid_out = x.new_zeros((r.segments * grid.length, *x.shape[1:]))
                    laid_out[grid.slots] = x[grid.tokens]
                    parts.append(laid_out.view(r.segments, grid.length, *x.shape[1:]))
                q, k, v = parts
                out[r.queries.tokens] = exact.attention(q, k, v, r.query_positions).flatten(0, 1)[r.queries.slots]
            return out.flatten(1)

        return with_gradient_of(lambda: super(ExactAttention, self).attend(query, key, value, groups), values)


class ExactRotary(RotaryEmbedding):
    """The table of cos and sin, [length, 1, 1, 2, d / 2], where Megatron has angles, [length, 1, 1, d]."""

    def __init__(self, theta: float, dim: int) -> None:
        super().__init__(dim, 1.0, rotary_base=int(theta), use_cpu_initialization=True)
        self.theta, self.dim = theta, dim

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        assert offset == 0
        return exact.rotation(self.theta, self.dim, max_seq_len)[:, None, None]


class _Choice(RouterReplay):
    """Hands a router the experts to take: those that are replayed, or else `own`."""

    own: torch.Tensor
    """int64 [T, k], of the router's present logits."""

    def get_replay_topk(self, scores: torch.Tensor, topk: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        def choose(scores: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return scores.gather(1, self.own), self.own

        return super().get_replay_topk(scores, topk, default_compute_topk=choose)


class ExactRouter(TopKRouter):
    """A router with exact logits (FP32) and weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_replay = _Choice()

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        return with_gradient_of(
            lambda: super(ExactRouter, self).gating(input), lambda: exact.linear(input.float(), self.weight)
        )

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat = logits.detach().view(-1, logits.shape[-1])
        self.router_replay.own = exact.top_experts(flat, self.topk)
        ordinary, chosen = super().routing(logits, padding_mask)

        def values() -> torch.Tensor:
            experts = chosen.nonzero()[:, 1].view(-1, self.topk)
            weights = exact.expert_weights(flat, experts, not self.config.moe_router_pre_softmax)
            return torch.zeros_like(flat).scatter_(1, experts, weights)

        return with_gradient_of(lambda: ordinary, values), chosen


class _ExactDispatcher(MoEAlltoAllTokenDispatcher):
    """Weights what the experts gave out where it is summed, on the token's own rank and whatever rank had the expert.

    Megatron weights what goes into the second product, which the engine does not; and sums in BF16.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, weights = super().dispatch_preprocess(hidden_states, routing_map, probs)
        return tokens, torch.ones_like(weights)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        outputs, token = permutated_local_input_tokens, self.reversed_local_input_permutation_mapping
        shape, weights, chosen = self.hidden_shape_before_permute, self.probs, self.routing_map

        def values() -> torch.Tensor:
            slots = token.argsort(stable=True).view(len(chosen), -1)  # rows stand expert by expert
            return exact.combine(outputs[slots], weights[chosen].view(len(chosen), -1))

        combined = with_gradient_of(
            lambda: unpermute(outputs, token, restore_shape=shape, probs=weights, routing_map=chosen), values
        )
        return combined.view(self.hidden_shape)


class ExactMoELayer(MoELayer):
    """A mixture of experts with exact routing and an exact sum; its experts are of exact linears."""

    token_dispatcher: Any

    def __init__(self, config: Any, *args: Any, pg_collection: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, pg_collection=pg_collection, **kwargs)
        assert type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher and not config.moe_permute_fusion
        self.token_dispatcher = _ExactDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )


def silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU with exact values, for TransformerConfig.activation_func."""
    return with_gradient_of(lambda: torch.nn.functional.silu(x), lambda: exact.silu(x))


def logprobs(
    head: Callable[[], torch.Tensor], statistics: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float, group: ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Log-probabilities of the labels, with exact values, and the entropy as `statistics` has it.

    hidden [T, K] (this rank's [T / size, K] with sequence parallelism), weight [V / size, K] of lm_head, labels int64
    [T]; group: the tensor-parallel ranks. head: the ordinary logits [T, V / size]; statistics: of logits, the ordinary
    (logprobs [T], entropy [T] or None).
    """

    def own_logits() -> torch.Tensor:
        return exact.linear(hidden if len(hidden) == len(labels) else gather_sequence(hidden, group), weight)

    def values() -> torch.Tensor:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(parts, logits.detach().contiguous(), group=group)
        return exact.logprobs(torch.cat(parts, -1), labels, temperature)

    logits = with_gradient_of(head, own_logits)
    ordinary, entropy = statistics(logits)
    return with_gradient_of(lambda: ordinary, values), entropy
