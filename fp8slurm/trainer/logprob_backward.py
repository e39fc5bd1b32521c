"""The gradient of log-probabilities and entropies with respect to logits on CUDA: one pass over the logits.

Imported only where CUDA tensors are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDTH = 4096


@triton.jit
def _backward(
    logits_ptr, labels_ptr, log_sum_ptr, grad_ptr, entropy_ptr, grad_entropy_ptr, out_ptr, columns, temperature,
    ENTROPY: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = column < columns
    z = tl.load(logits_ptr + row * columns + column, mask=real, other=float("-inf")).to(tl.float32) / temperature
    logprob = z - tl.load(log_sum_ptr + row)
    p = tl.exp(logprob)
    grad = tl.load(grad_ptr + row)
    out = tl.where(column == tl.load(labels_ptr + row), grad, 0.0) - p * grad
    if ENTROPY:
        surprise = tl.where(p > 0, logprob, 0.0) + tl.load(entropy_ptr + row)
        out -= p * surprise * tl.load(grad_entropy_ptr + row)
    tl.store(out_ptr + row * columns + column, (out / temperature).to(out_ptr.dtype.element_ty), mask=real)


def logprob_backward(
    logits: torch.Tensor, labels: torch.Tensor, log_sum: torch.Tensor, temperature: float, grad: torch.Tensor,
    entropy: torch.Tensor | None = None, grad_entropy: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """d (sum of grad * logprob + grad_entropy * entropy) / d logits, in the dtype of logits [T, V].

    labels int64 [T]; log_sum fp32 [T], the log of sum(exp(logits / temperature)); the others fp32 [T]. With
    p = softmax(logits / temperature): grad * ([i = label] - p_i) - grad_entropy * p_i (log p_i + entropy), divided by
    the temperature.
    """
    assert logits.is_contiguous()
    out = torch.empty_like(logits)
    rows, columns = logits.shape
    if entropy is None or grad_entropy is None:
        entropy = grad_entropy = None
    _backward[(rows, triton.cdiv(columns, WIDTH))](
        logits, labels, log_sum, grad, log_sum if entropy is None else entropy,
        grad if grad_entropy is None else grad_entropy, out, columns, temperature,
        ENTROPY=entropy is not None, WIDTH=WIDTH, num_warps=8,
    )  # fmt: skip
    return out
