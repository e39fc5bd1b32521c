"""The objective: each formula in one function. Tensors are float32 [T] unless said otherwise, logarithms natural."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import PackedBatch

Metrics = dict[str, Tensor]
LossFn = Callable[[Tensor, Tensor | None, PackedBatch], tuple[Tensor, Metrics]]


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A): PPO (arXiv 1707.06347) eq. 7, DAPO's two bounds (2503.14476 eq. 8)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def dual_clipped(surrogate: Tensor, advantages: Tensor, bound: float) -> Tensor:
    """Where A < 0 the loss is at most bound * |A|: dual-clip PPO (arXiv 1912.09729) eq. 5, bound above 1."""
    return torch.where(advantages < 0, torch.minimum(surrogate, -bound * advantages), surrogate)


def truncated_importance_weight(trainer_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """min(exp(trainer - rollout), cap), without gradient: corrects for the engine sampling from other numerics than
    the trainer's (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training")."""
    return (trainer_logprobs - rollout_logprobs).exp().clamp(max=cap).detach()


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """KL(policy || reference) of each token, sampled from the policy: k1 = p - q, k2 = (p - q)^2 / 2,
    k3 = exp(q - p) - (q - p) - 1 (Schulman 2020, "Approximating KL divergence"). As a loss k1 pulls nowhere on
    average: use k2 or k3."""
    d = logprobs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.exp(-d) + d - 1
    raise ValueError(f"algorithm.kl_kind {kind!r} is not one of k1, k2, k3")


def make_policy_loss(algorithm: AlgorithmSection) -> LossFn:
    """The trainer's loss function for an RL update.

    Loss: sum over the micro-batch of loss_weights * (tis * surrogate + kl_coef * KL - entropy_coef * entropy), with the
    ratio taken to batch.trainer_logprobs (where there are none, to the logprobs themselves, detached).
    Metrics: sums over tokens of loss_weights * value, so that they add up to the update's mean over all micro-batches
    and ranks. InputError: dual_clip between 0 and 1. ValueError: kl_coef without reference_logprobs;
    entropy_coef without entropy.
    """
    if 0 < algorithm.dual_clip <= 1:
        raise InputError(f"algorithm.dual_clip {algorithm.dual_clip} must be above 1, or 0 to switch it off")

    def policy_loss(logprobs: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        mask, weights, advantages = batch.loss_mask, batch.loss_weights, batch.advantages
        old = logprobs.detach() if batch.trainer_logprobs is None else batch.trainer_logprobs
        zero = torch.zeros_like(logprobs)
        # Outside the mask the numbers mean nothing and may overflow: they must not reach exp.
        log_ratio = torch.where(mask, logprobs - old, zero)
        ratio = log_ratio.exp()
        values = clipped_surrogate(ratio, advantages, algorithm.clip_low, algorithm.clip_high)
        metrics = {
            "ratio/mean": ratio,
            "ratio/kl": kl_estimate(zero, log_ratio, "k3"),
            "ratio/clipped_low": (ratio < 1 - algorithm.clip_low) & (advantages < 0),
            "ratio/clipped_high": (ratio > 1 + algorithm.clip_high) & (advantages > 0),
        }
        if algorithm.dual_clip:
            metrics["ratio/dual_clipped"] = (advantages < 0) & (ratio > algorithm.dual_clip)
            values = dual_clipped(values, advantages, algorithm.dual_clip)
        if algorithm.tis_cap:
            rollout = torch.where(mask, batch.rollout_logprobs, old)
            tis = truncated_importance_weight(old, rollout, algorithm.tis_cap)
            metrics |= {"tis/mean": tis, "tis/capped": tis >= algorithm.tis_cap}
            values = tis * values
        metrics["loss/policy"] = values
        if algorithm.kl_coef:
            if batch.reference_logprobs is None:
                raise ValueError(f"algorithm.kl_coef {algorithm.kl_coef} needs the reference's log-probabilities")
            reference = torch.where(mask, batch.reference_logprobs, logprobs.detach())
            kl = kl_estimate(torch.where(mask, logprobs, logprobs.detach()), reference, algorithm.kl_kind)
            metrics["loss/kl"] = kl
            values = values + algorithm.kl_coef * kl
        if algorithm.entropy_coef and entropy is None:
            raise ValueError(f"algorithm.entropy_coef {algorithm.entropy_coef} needs the entropy")
        if entropy is not None:
            metrics["entropy"] = entropy
            if algorithm.entropy_coef:
                values = values - algorithm.entropy_coef * entropy
        return weighted_sum(values, weights), {k: weighted_sum(v.detach(), weights) for k, v in metrics.items()}

    return policy_loss


def sft_loss(logprobs: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response tokens, weighted by loss_weights."""
    loss = weighted_sum(-logprobs, batch.loss_weights)
    return loss, {"loss/sft": loss.detach()}


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * values over the positions whose weight is not 0, whatever stands in the others."""
    values = values.float()
    return (torch.where(weights != 0, values, torch.zeros_like(values)) * weights).sum()
