"""The kernels of grouped experts on a GPU: bytes against the reference, gradients against TransformerEngine's experts.

With TRITON_INTERPRET=1 and Triton installed the quantizers run without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import grouped_reference as reference
import pytest
import torch
from test_grouped import COUNTS, Layer, inputs

from fp8slurm.trainer.grouped import Experts, Groups, Pair

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs an NVIDIA GPU"),
]
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
counts_with_rows = pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)], ids=str)


def _both(counts: list[int]) -> tuple[Groups, Groups]:
    """The same groups for the kernels and for the reference, gradients as Megatron's DDP lays them."""
    return Groups.of(counts, True, DEVICE), Groups.of(counts, True, torch.device("cpu"))


def _bytes(pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].cpu().view(torch.uint8), pair[1].cpu().contiguous().view(torch.int32)


def _assert_same_bytes(got: Pair | None, want: Pair | None) -> None:
    assert got is not None and want is not None and got[1].stride() == want[1].stride() or got[1].stride(0) == 1
    for a, b in zip(_bytes(got), _bytes(want), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


@counts_with_rows
def test_codes_and_scales_are_the_references_both_ways(counts: list[int]) -> None:
    from fp8slurm.fp8 import triton_grouped

    here, there = _both(counts)
    x, _, _ = inputs(sum(counts))
    got, want = triton_grouped.quantize(x.to(DEVICE), here.table, True), reference.quantize(x, there, True)
    _assert_same_bytes(got[0], want[0])
    _assert_same_bytes(got[1], want[1])
    rows, columns = triton_grouped.quantize(x.to(DEVICE), here.table, False)
    _assert_same_bytes(rows, want[0])
    assert columns is None


def test_weights_have_the_codes_and_scales_that_engines_get() -> None:
    """Of all experts, and of their transposes; a zero block and a block of one outlier among them."""
    from fp8slurm.fp8 import triton_grouped

    weights = [w.detach() for w in Layer(3, True).fc1]
    weights[1][:128, :128], weights[2][5, 7] = 0, 300.0
    got, turned = triton_grouped.quantize_weights([w.to(DEVICE) for w in weights])
    want = reference.quantize_weights(weights)
    _assert_same_bytes(got, want.forward)
    _assert_same_bytes(turned, want.transposed)


def _assert_close(got: Pair | None, want: Pair | None) -> None:
    """A sigmoid's last bits: few codes differ, and no more than by one step."""
    assert got is not None and want is not None
    (a, a_scale), (b, b_scale) = (got[0].cpu(), got[1].cpu()), want
    torch.testing.assert_close(a_scale, b_scale, rtol=2**-7, atol=0)
    assert (a.view(torch.uint8) != b.view(torch.uint8)).float().mean() < 0.02
    torch.testing.assert_close(a.float(), b.float(), rtol=2**-2, atol=2**-8)


@counts_with_rows
def test_the_activation_and_its_backward_pass_are_the_formulas(counts: list[int]) -> None:
    from fp8slurm.fp8 import triton_grouped

    here, there = _both(counts)
    x, probs, grad = inputs(sum(counts))
    grad = grad[:, :128].contiguous()
    x, grad = reference.padded(x, there), reference.padded(grad, there)
    on_device = [t.to(DEVICE) for t in (grad, x, probs)]
    want = reference.swiglu(x, probs, there, True)
    for got, wanted in zip(triton_grouped.swiglu(*on_device[1:], here.table, True), want, strict=True):
        _assert_close(got, wanted)
    rows, columns, d_probs = triton_grouped.swiglu_backward(*on_device, here.table)
    want_rows, want_columns, want_probs = reference.swiglu_backward(grad, x, probs, there)
    _assert_close(rows, want_rows)
    _assert_close(columns, want_columns)
    torch.testing.assert_close(d_probs.cpu(), want_probs, rtol=1e-4, atol=1e-3)
    assert torch.equal(triton_grouped.unpad(on_device[1], here.table, here.rows).cpu(), reference.unpad(x, there))


@needs_gpu
@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_on_the_gpu_are_the_references(counts: list[int], last_first: bool) -> None:
    """DeepGEMM's products in all their roles, gradients of two micro-batches, experts without tokens."""
    from fp8slurm.trainer import grouped_cuda

    grouped_cuda.prepare()
    ours, theirs = Layer(len(counts), last_first), Layer(len(counts), last_first)
    for each in (ours.fc1, ours.fc2):
        buffer = torch.zeros(len(counts), *each[0].shape, device=DEVICE)
        for i, weight in enumerate(each):
            weight.data = weight.data.to(DEVICE)
            weight.main_grad = buffer[len(counts) - 1 - i if last_first else i]
    ours.kernels = grouped_cuda  # type: ignore[assignment]
    ours.quantized = lambda: tuple(  # type: ignore[method-assign]
        grouped_cuda.quantize_weights([w.detach() for w in each]) for each in (ours.fc1, ours.fc2)
    )
    x, probs, grad = inputs(sum(counts))
    got = [x.to(DEVICE).requires_grad_(), probs.to(DEVICE).requires_grad_()]
    want = [x.requires_grad_(), probs.requires_grad_()]
    outputs: list[Any] = []
    for _ in range(2):
        outputs = [
            Experts.apply(*got, Groups.of(counts, last_first, DEVICE), ours, True),
            Experts.apply(*want, Groups.of(counts, last_first, torch.device("cpu")), theirs, True),
        ]
        outputs[0].backward(grad.to(DEVICE))
        outputs[1].backward(grad)
    pairs = [tuple(outputs), *((a.grad, b.grad) for a, b in zip(got, want))]
    pairs += [(a.main_grad, b.main_grad) for a, b in zip(ours.fc1 + ours.fc2, theirs.fc1 + theirs.fc2, strict=True)]
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a.float().cpu() - b.float()).norm() <= 5e-3 * b.float().norm()
