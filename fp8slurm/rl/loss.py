"""The whole objective: a policy-gradient loss (rl/objectives.py), engine importance weights, KL and entropy.

Tensors are float32 [T] unless said otherwise, logarithms natural.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import PackedBatch
from fp8slurm.core.user_code import is_user_function, load_user_function, tried
from fp8slurm.rl.objectives import LOSSES, Loss, LossInput, Metrics

LossFn = Callable[[Tensor, Tensor | None, PackedBatch], tuple[Tensor, Metrics]]
FLAG = "--algorithm.loss"


def importance_weights(x: LossInput) -> tuple[Tensor, Tensor]:
    """exp(trainer - engine), without gradient, bounded by settings.tis_cap: corrects for the engine sampling from other
    numerics than the trainer's. Returns (weights, which of them the bound has changed or reached).

    By token, truncated to the cap: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training". By sequence (the product over its tokens), and masked, 0 above the cap: Liu et al. 2025, "When speed
    kills stability: demystifying RL collapse from the training-inference mismatch".
    """
    s, log_weights = x.settings, (x.old_logprobs - x.rollout_logprobs).detach()
    if s.tis_level == "sequence":
        log_weights = x.sequence_sum(log_weights)
    weights = log_weights.exp()
    if s.tis_excess == "mask":
        above = weights > s.tis_cap
        return torch.where(above, torch.zeros_like(weights), weights), above
    return weights.clamp(max=s.tis_cap), weights >= s.tis_cap


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


def loss_of(algorithm: AlgorithmSection) -> Loss:
    """The function that algorithm.loss names. InputError: there is none, or it cannot be used as a loss."""
    name = algorithm.loss
    if name in LOSSES:
        return LOSSES[name]
    if not is_user_function(name):
        raise InputError(f"{FLAG} {name!r} is not one of {', '.join(LOSSES)}, module:function")
    function = load_user_function(name, FLAG, "loss_input")

    def checked(x: LossInput) -> tuple[Tensor, Metrics]:
        answer = function(x)
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict)):
            raise InputError(f"{FLAG} {name} returned {type(answer).__name__}; needed: (values [T], metrics as a dict)")
        values, metrics = answer
        named = {f"custom/{key}": value for key, value in metrics.items()}
        for what, value in {"the loss": values, **named}.items():
            if not isinstance(value, Tensor) or value.shape != x.logprobs.shape:
                is_, tokens = list(value.shape) if isinstance(value, Tensor) else type(value).__name__, len(x.logprobs)
                raise InputError(f"{FLAG} {name}: {what} is {is_}; needed: a tensor [{tokens}], a value for each token")
        return values, named

    return checked


def try_loss(algorithm: AlgorithmSection) -> None:
    """Call the user's loss, if there is one, on two made-up sequences, forward and backward. InputError: it fails."""
    if algorithm.loss in LOSSES:
        return
    numbers, ids = torch.linspace(-2, -0.1, 8), torch.arange(8)
    mask = ids % 4 != 3
    batch = PackedBatch(
        ids, ids, ids % 4, torch.tensor([0, 4, 8], dtype=torch.int32), mask / 6, numbers - 0.1, numbers + 1, mask,
        numbers + 0.1,
    )  # fmt: skip
    logprobs = numbers.clone().requires_grad_()
    loss = loss_of(algorithm)
    with tried(f"{FLAG} {algorithm.loss}", "a made-up micro-batch of 2 sequences and 8 tokens"):
        values, _ = loss(LossInput.of(logprobs, batch, algorithm))
        values.sum().backward()
    if logprobs.grad is None or not torch.isfinite(logprobs.grad).all():
        raise InputError(f"{FLAG} {algorithm.loss}: on a made-up micro-batch its gradient to logprobs is not finite")


def with_teacher(x: LossInput, teacher: Tensor, coef: float) -> tuple[LossInput, Tensor]:
    """On-policy distillation: coef * log(teacher / student) of each token is added to its advantage, which is minus the
    reverse KL at the student's own samples, taken as a reward of that token alone. Returns the KL, too.

    Agarwal et al., GKD (arXiv 2306.13649); Gu et al., MiniLLM (2306.08543) section 2.2, its single-step part; Lu et al.
    2025, "On-policy distillation" (Thinking Machines Lab), as the advantage of a policy-gradient loss.
    """
    kl = torch.where(x.mask, x.old_logprobs - teacher, torch.zeros_like(teacher))
    return replace(x, advantages=x.advantages - coef * kl), kl


def make_policy_loss(algorithm: AlgorithmSection, teacher_coef: float = 0.0) -> LossFn:
    """The trainer's loss function for an RL update.

    teacher_coef: what with_teacher multiplies by where batches have a teacher's log-probabilities.
    Loss: sum over the micro-batch of loss_weights * (tis * policy loss + kl_coef * KL - entropy_coef * entropy), with
    ratios taken to batch.trainer_logprobs. Where there are none, in the one update of a step, the old log-probabilities
    are the present ones: ratios are 1, and not shown.
    Metrics: sums over tokens of loss_weights / weight_sum * value, so that they add up to the update's mean over all
    micro-batches and ranks. InputError: as loss_of. ValueError: kl_coef without reference_logprobs; entropy_coef
    without entropy.
    """
    loss = loss_of(algorithm)

    def policy_loss(logprobs: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        mask, weights = batch.loss_mask, batch.loss_weights
        x = LossInput.of(logprobs, batch, algorithm)
        distilled: Metrics = {}
        if batch.teacher_logprobs is not None:
            x, distilled["teacher/kl"] = with_teacher(x, batch.teacher_logprobs, teacher_coef)
        values, metrics = loss(x)
        metrics |= distilled
        log_ratio = x.logprobs - x.old_logprobs
        metrics |= {"ratio/mean": log_ratio.exp(), "ratio/kl": kl_estimate(torch.zeros_like(values), log_ratio, "k3")}
        if batch.trainer_logprobs is None:  # every ratio is 1
            metrics = {key: value for key, value in metrics.items() if not key.startswith("ratio/")}
        if algorithm.tis_cap:
            tis, capped = importance_weights(x)
            metrics |= {"tis/mean": tis, "tis/capped": capped}
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
        shares = weights / batch.weight_sum
        return weighted_sum(values, weights), {k: weighted_sum(v.detach(), shares) for k, v in metrics.items()}

    return policy_loss


def sft_loss(logprobs: Tensor, entropy: Tensor | None, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of the response tokens, weighted by loss_weights."""
    loss = weighted_sum(-logprobs, batch.loss_weights)
    return loss, {"loss/sft": loss.detach()}


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * values over the positions whose weight is not 0, whatever stands in the others."""
    values = values.float()
    return (torch.where(weights != 0, values, torch.zeros_like(values)) * weights).sum()
