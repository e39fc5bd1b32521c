"""The policy-gradient losses: each formula in one function of a LossInput. A loss of the user's is another of them.

A loss returns (values, metrics): the loss of each token, [T], with its gradient to `logprobs`; and figures of each
token, [T]. The trainer weighs both by `loss_weights` and sums, which is the mean that algorithm.loss_mean names, and
adds what is the same for every loss: engine importance weights, KL to the reference, entropy bonus (rl/loss.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.types import PackedBatch

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class LossInput:
    """A micro-batch as a loss sees it: T tokens of whole sequences, laid end to end in any order.

    Tensors are float32 [T] unless said otherwise, logarithms natural. Where `mask` is False nothing is predicted that
    counts: log-probabilities and advantages are 0 there, and whatever a loss has there is left out.
    """

    logprobs: Tensor
    """Of the policy that is trained, with gradient."""
    old_logprobs: Tensor
    """The same tokens' before the step's first update, by the trainer: what ratios are taken to."""
    rollout_logprobs: Tensor
    """The same tokens' by the engine that sampled them: the behaviour policy."""
    advantages: Tensor
    loss_weights: Tensor
    """What each token counts; they sum to PackedBatch.weight_sum over all micro-batches and ranks of an update."""
    mask: Tensor
    """bool [T]"""
    sequence_ids: Tensor
    """int64 [T], from 0: which sequence a token belongs to."""
    sequences: int
    settings: AlgorithmSection

    @staticmethod
    def of(logprobs: Tensor, batch: PackedBatch, settings: AlgorithmSection) -> LossInput:
        """Without batch.trainer_logprobs the old log-probabilities are the present ones, without gradient."""
        old = logprobs.detach() if batch.trainer_logprobs is None else batch.trainer_logprobs
        zero = torch.zeros_like(old)
        # What stands outside the mask may overflow and must not reach exp, whose gradient would be NaN.
        new, old, rollout = (torch.where(batch.loss_mask, x, zero) for x in (logprobs, old, batch.rollout_logprobs))
        lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
        numbers = torch.arange(len(lengths), device=lengths.device)
        ids = torch.repeat_interleave(numbers, lengths, output_size=len(old))
        return LossInput(
            new, old, rollout, batch.advantages, batch.loss_weights, batch.loss_mask, ids, len(lengths), settings
        )

    def sequence_sum(self, values: Tensor) -> Tensor:
        """[T] -> [T]: at every token the sum over the tokens of its sequence that count."""
        values = torch.where(self.mask, values, torch.zeros_like(values))
        return values.new_zeros(self.sequences).index_add(0, self.sequence_ids, values)[self.sequence_ids]

    def sequence_mean(self, values: Tensor) -> Tensor:
        """[T] -> [T]: at every token the mean over the tokens of its sequence that count."""
        return self.sequence_sum(values) / self.sequence_sum(torch.ones_like(values)).clamp(min=1)


Loss = Callable[[LossInput], tuple[Tensor, Metrics]]


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347) eq. 7, DAPO's two bounds (2503.14476 eq. 8)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def dual_clipped(surrogate: Tensor, advantages: Tensor, bound: float) -> Tensor:
    """Where A < 0 the loss is at most bound * |A|: dual-clip PPO (arXiv 1912.09729) eq. 5, bound above 1."""
    return torch.where(advantages < 0, torch.minimum(surrogate, -bound * advantages), surrogate)


def clipped_share(ratio: Tensor, advantages: Tensor, settings: AlgorithmSection) -> Metrics:
    """Which tokens a clipped surrogate takes the gradient from."""
    return {
        "ratio/clipped_low": (ratio < 1 - settings.clip_low) & (advantages < 0),
        "ratio/clipped_high": (ratio > 1 + settings.clip_high) & (advantages > 0),
    }


def ppo_clip(x: LossInput) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate of every token's ratio, as in GRPO (arXiv 2402.03300 eq. 3); or dual-clipped."""
    s, ratio = x.settings, (x.logprobs - x.old_logprobs).exp()
    values = clipped_surrogate(ratio, x.advantages, s.clip_low, s.clip_high)
    metrics = clipped_share(ratio, x.advantages, s)
    if s.dual_clip:
        metrics["ratio/dual_clipped"] = (x.advantages < 0) & (ratio > s.dual_clip)
        values = dual_clipped(values, x.advantages, s.dual_clip)
    return values, metrics


def gspo(x: LossInput) -> tuple[Tensor, Metrics]:
    """GSPO (arXiv 2507.18071) eq. 5 and 7: the clipped surrogate of a sequence's ratio, the geometric mean of its
    tokens' ratios.

    Written by token as its eq. 14: the value is the sequence's, and the gradient of a token is that of its own
    log-probability alone, which over the sequence is the gradient of eq. 5: none goes through the sequence's sum.
    """
    own = x.logprobs - x.logprobs.detach()  # 0, with the gradient
    ratio = (x.sequence_mean((x.logprobs - x.old_logprobs).detach()) + own).exp()
    values = clipped_surrogate(ratio, x.advantages, x.settings.clip_low, x.settings.clip_high)
    return values, clipped_share(ratio, x.advantages, x.settings)


def cispo(x: LossInput) -> tuple[Tensor, Metrics]:
    """CISPO, MiniMax-M1 (arXiv 2506.13585) section 3.1: -sg(clip(r, 1 - low, 1 + high)) A log pi.

    The importance weight is clipped instead of the update, so every token keeps a gradient. The paper has no lower
    bound: that is algorithm.clip_low 1.
    """
    low, high = 1 - x.settings.clip_low, 1 + x.settings.clip_high
    ratio = (x.logprobs - x.old_logprobs).exp().detach()
    metrics = {"ratio/clipped_low": ratio < low, "ratio/clipped_high": ratio > high}
    return -ratio.clamp(low, high) * x.advantages * x.logprobs, metrics


LOSSES: dict[str, Loss] = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo}
"""algorithm.loss by name."""
