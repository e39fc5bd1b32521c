"""Log-probabilities of labels from vocabulary-parallel logits, with autograd, in chunks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

CHUNK_LOGITS = 2**24
"""Logits that are in fp32 at a time: 64 MiB a tensor, a handful of tensors. Without chunks the fp32 tensors of Qwen3's
151,936 logits a token would be the largest that a training step has."""


class _VocabParallelLogprobs(torch.autograd.Function):
    """Per-token log-probability and, on request, entropy; the softmax is spread over the tensor-parallel ranks.

    With z = logits / temperature, in fp32 as SGLang divides, and p = softmax(z): logprob = z[label] - logsumexp(z),
    d logprob / dz_i = [i = label] - p_i; entropy H = logsumexp(z) - sum_i p_i z_i, dH / dz_i = -p_i (log p_i + H).
    Kept for the backward pass: the logits themselves; p is computed again from them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None, with_entropy: bool,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        peak = logits.max(dim=-1).values.float().div_(temperature)
        first = 0
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            first = dist.get_rank(group) * logits.shape[-1]
        own = (labels >= first) & (labels < first + logits.shape[-1])
        local = torch.where(own, labels - first, 0)
        sums = peak.new_zeros(3, len(labels))
        for rows in _chunks(logits):
            z = _scaled(logits[rows], temperature, peak[rows, None])
            sums[0, rows] = torch.where(own[rows], z.gather(1, local[rows, None]).squeeze(1), 0.0)
            p = z.exp()
            sums[1, rows] = p.sum(-1)
            if with_entropy:
                sums[2, rows] = p.mul_(z).sum(-1)
            del z, p
        if group is not None:
            dist.all_reduce(sums, group=group)
        chosen, total, weighted = sums
        entropy = total.log() - weighted / total if with_entropy else weighted
        ctx.save_for_backward(logits, peak, total, local, own, entropy)
        return chosen - total.log(), entropy

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        logits, peak, total, local, own, entropy = ctx.saved_tensors
        out = torch.empty_like(logits)
        for rows in _chunks(logits):
            p = _scaled(logits[rows], ctx.temperature, peak[rows, None]).exp_().div_(total[rows, None])
            if grad is None:
                dz = torch.zeros_like(p)
            else:
                dz = p * -grad[rows, None]
                dz.scatter_add_(1, local[rows, None], torch.where(own[rows], grad[rows], 0.0)[:, None])
            if grad_entropy is not None:
                surprise = p.clamp_min(torch.finfo(p.dtype).tiny).log_().add_(entropy[rows, None])
                dz -= surprise.mul_(p.mul_(grad_entropy[rows, None]))
                del surprise
            out[rows] = dz.div_(ctx.temperature)
            del p, dz  # before the next chunk's are made
        return out, None, None, None, None, None


class _ExactLogprobs(torch.autograd.Function):
    """The same of a whole vocabulary, with the bits of SGLang's sampler for runs with model.exact on a GPU.

    SGLang divides fp32 logits by a temperature on the device (by a host's, torch would multiply by its reciprocal) and
    takes torch's log_softmax.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, with_entropy: bool, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        divisor = torch.full((), temperature, device=logits.device)
        logprobs, log_sum, entropy = torch.empty(3, len(labels), device=logits.device)
        for rows in _chunks(logits):
            label = labels[rows, None]
            z = logits[rows].to(torch.float32, copy=True).div_(divisor)
            every = torch.log_softmax(z, dim=-1)
            torch.gather(every, 1, label, out=logprobs[rows, None])
            log_sum[rows] = (z.gather(1, label) - logprobs[rows, None]).squeeze(1)
            if with_entropy:
                entropy[rows] = -torch.exp(every, out=z).mul_(every).nan_to_num_(0.0).sum(-1)  # 0 * -inf is 0 here
            del z, every
        ctx.save_for_backward(logits, labels, log_sum, entropy)
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        from fp8slurm.trainer.logprob_backward import logprob_backward

        logits, labels, log_sum, entropy = ctx.saved_tensors
        grad = torch.zeros_like(log_sum) if grad is None else grad
        more = {} if grad_entropy is None else {"entropy": entropy, "grad_entropy": grad_entropy.contiguous()}
        return logprob_backward(logits, labels, log_sum, ctx.temperature, grad.contiguous(), **more), None, None, None


def _scaled(logits: torch.Tensor, temperature: float, peak: torch.Tensor) -> torch.Tensor:
    """A new fp32 tensor: logits / temperature - peak."""
    return logits.to(torch.float32, copy=True).div_(temperature).sub_(peak)


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_LOGITS // logits.shape[-1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def vocab_parallel_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None = None, with_entropy: bool = False,
    temperature: float = 1.0, exact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Log-probability of `labels` (int64 [T]) under `logits` / temperature ([T, V / size], this rank's vocabulary).

    Returns fp32 [T] and, with_entropy, the entropy of every distribution in nats, fp32 [T]; both the same on all ranks
    of `group` (None: the whole vocabulary is here). The gradient on every rank is that of its own part. `exact`: with
    SGLang's bits, on a GPU that has the whole vocabulary.
    """
    if group is not None and group.size() == 1:
        group = None
    if exact:
        assert group is None, "model.exact is refused with tensor parallelism"
        logprobs, entropy = _ExactLogprobs.apply(logits, labels, with_entropy, temperature)
        return logprobs, entropy if with_entropy else None
    logprobs, entropy = _VocabParallelLogprobs.apply(logits, labels, group, with_entropy, temperature)
    return logprobs, entropy if with_entropy else None
