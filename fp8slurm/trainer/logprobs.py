"""Log-probabilities of labels from vocabulary-parallel logits, with autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


class _VocabParallelLogprobs(torch.autograd.Function):
    """Per-token log-probability and, on request, entropy; the softmax is spread over the tensor-parallel ranks.

    With p = softmax(z): logprob = z[label] - logsumexp(z), d logprob / dz_i = [i = label] - p_i;
    entropy H = logsumexp(z) - sum_i p_i z_i, dH / dz_i = -p_i (log p_i + H).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None, with_entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        z = logits.float()
        peak = z.max(dim=-1).values
        first = 0
        if group is not None:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            first = dist.get_rank(group) * z.shape[-1]
        z = z - peak[:, None]
        mine = (labels >= first) & (labels < first + z.shape[-1])
        local = torch.where(mine, labels - first, 0)
        chosen = torch.where(mine, z.gather(1, local[:, None]).squeeze(1), 0.0)
        p = z.exp()
        sums = torch.stack([chosen, p.sum(-1), (p * z).sum(-1) if with_entropy else chosen.new_zeros(len(chosen))])
        if group is not None:
            dist.all_reduce(sums, group=group)
        chosen, total, weighted = sums
        p = p.div_(total[:, None])
        entropy = total.log() - weighted / total if with_entropy else weighted
        ctx.save_for_backward(p, local, mine, entropy)
        ctx.dtype, ctx.with_entropy = logits.dtype, with_entropy
        return chosen - total.log(), entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, grad_entropy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        p, local, mine, entropy = ctx.saved_tensors
        dz = p * -grad[:, None]
        dz.scatter_add_(1, local[:, None], torch.where(mine, grad, 0.0)[:, None])
        if ctx.with_entropy:
            log_p = p.clamp_min(torch.finfo(p.dtype).tiny).log()
            dz -= grad_entropy[:, None] * p * (log_p + entropy[:, None])
        return dz.to(ctx.dtype), None, None, None


def vocab_parallel_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, group: ProcessGroup | None = None, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of `labels` (int64 [T]) under `logits` ([T, V / size], this rank's part of the vocabulary).

    Returns fp32 [T] and, with_entropy, the entropy of every distribution in nats, fp32 [T]; both the same on all ranks
    of `group` (None: the whole vocabulary is here). The gradient on every rank is that of its own part.
    """
    if group is not None and group.size() == 1:
        group = None
    logprobs, entropy = _VocabParallelLogprobs.apply(logits, labels, group, with_entropy)
    return logprobs, entropy if with_entropy else None
