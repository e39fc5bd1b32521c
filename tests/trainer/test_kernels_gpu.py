"""Triton kernels of the trainer and of exact engines against plain formulas."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
DEVICE = "cuda"


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("rows", [1, 3, 200, 1024])
def test_activations_have_the_codes_and_scales_of_the_reference(rows: int) -> None:
    """TransformerEngine's formula to the bit: zero, large and small rows."""
    from fp8slurm.fp8.reference import quantize_reference
    from fp8slurm.fp8.triton_activations import quantize_rows

    x = (_randn(rows, 640) * torch.exp(3 * _randn(rows, 1, seed=1))).bfloat16()
    x[rows // 2] = 0
    codes, scale_inv = quantize_rows(x)
    want = quantize_reference(x, (1, 128))
    assert torch.equal(scale_inv, want.scale_inv) and scale_inv.stride(0) == 1
    assert torch.equal(codes.view(torch.uint8), want.data.view(torch.uint8))


@pytest.mark.parametrize(("groups", "heads", "width"), [(1, 1, 256), (1, 1, 2560), (2, 3, 128)])
def test_the_norms_backward_is_the_formulas(groups: int, heads: int, width: int) -> None:
    """Of hidden states, and of heads inside Megatron's fused matrix, whose other columns are left alone."""
    from fp8slurm.trainer.norm_backward import norm_backward

    tokens, eps = 37, 1e-6
    mixed = _randn(tokens, groups, heads + 2, width)
    x, weight = mixed[:, :, :heads], 1 + 0.1 * _randn(width, seed=1)
    grad = _randn(tokens * groups * heads, width, seed=2)
    more = _randn(tokens * groups * heads, 2 * width, seed=3)[:, :width]
    out = torch.zeros_like(mixed)
    grad_weight = norm_backward(grad, x, weight, eps, out[:, :, :heads], more)
    leaf, w = x.double().requires_grad_(), weight.double().requires_grad_()
    y = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + eps) * w
    y.backward(grad.double().view(y.shape))
    assert leaf.grad is not None and w.grad is not None
    torch.testing.assert_close(
        out[:, :, :heads].double(), leaf.grad + more.double().view(y.shape), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(grad_weight.double(), w.grad, atol=1e-4, rtol=1e-5)
    assert out[:, :, heads:].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("exact", [False, True])
def test_log_probabilities_and_entropies_are_the_formulas(exact: bool, temperature: float) -> None:
    from fp8slurm.trainer.logprobs import vocab_parallel_logprobs

    logits = 3 * _randn(29, 5000)
    labels = torch.randint(0, 5000, (29,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights = _randn(2, 29, seed=2)
    leaf, wanted = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, entropy = vocab_parallel_logprobs(leaf, labels, None, True, temperature, exact)
    assert entropy is not None
    (weights[0] * got + weights[1] * entropy).sum().backward()
    every = (wanted / temperature).log_softmax(-1)
    want, surprise = every.gather(1, labels[:, None]).squeeze(1), -(every.exp() * every).sum(-1)
    (weights[0] * want + weights[1] * surprise).sum().backward()
    assert leaf.grad is not None and wanted.grad is not None
    for a, b in ((got, want), (entropy, surprise), (leaf.grad, wanted.grad)):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=1e-4)
