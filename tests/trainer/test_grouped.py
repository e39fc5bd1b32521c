"""Experts with one launch a product against one expert after another in the emulation (cpu/fp8_linear.py's formula), with
plain products in DeepGEMM's place; the kernels themselves are for a GPU (test_grouped_gpu.py)."""

from __future__ import annotations

from types import SimpleNamespace

import grouped_reference as kernels
import pytest
import torch

from fp8slurm.fp8.quantize import fake_quantize_1x128, fake_quantize_128x1, fake_quantize_block
from fp8slurm.trainer.grouped import Experts, Groups, QuantizedWeights, stacked

HIDDEN, WIDTH = 256, 128
CPU = torch.device("cpu")
COUNTS = [[5, 0, 200, 128], [0, 0, 1, 0], [129, 1, 127, 256], [0, 0, 0, 0]]


class FP8Linear(torch.autograd.Function):
    """One expert's product as cpu/fp8_linear.py has it; the weight's gradient goes to main_grad."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[no-untyped-def]
        ctx.x, ctx.weight = x, weight
        return (fake_quantize_1x128(x) @ fake_quantize_block(weight.detach()).t()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.weight.main_grad += fake_quantize_128x1(grad).t() @ fake_quantize_128x1(ctx.x)
        return (fake_quantize_1x128(grad) @ fake_quantize_block(ctx.weight.detach())).to(grad.dtype), None


def one_after_another(x: torch.Tensor, probs: torch.Tensor, counts: list[int], fc1: list, fc2: list) -> torch.Tensor:
    out = []
    for rows, prob, up, down in zip(x.split(counts), probs.split(counts), fc1, fc2):
        gate, linear = FP8Linear.apply(rows, up).float().chunk(2, dim=1)
        hidden = (torch.nn.functional.silu(gate) * linear * prob[:, None]).to(x.dtype)
        out.append(FP8Linear.apply(hidden, down))
    return torch.cat(out)


class Layer:
    """The weights of some experts; `last_first`: their gradients lie as Megatron's DDP lays them."""

    kernels = kernels

    def __init__(self, experts: int, last_first: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.fc1, self.fc2 = [], []
        for into, shape in ((self.fc1, (2 * WIDTH, HIDDEN)), (self.fc2, (HIDDEN, WIDTH))):
            buffer = torch.zeros(experts, *shape)
            for i in range(experts):
                weight = torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).bfloat16())
                weight.main_grad = buffer[experts - 1 - i if last_first else i]
                into.append(weight)

    def quantized(self) -> tuple[QuantizedWeights, QuantizedWeights]:
        return tuple(kernels.quantize_weights([w.detach() for w in each]) for each in (self.fc1, self.fc2))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(stacked([w.main_grad for w in each])[0] for each in (self.fc1, self.fc2))


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with rows of many sizes, probs, the gradient of the output."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, HIDDEN, generator=g) * torch.exp(torch.randn(rows, 1, generator=g))
    return x.bfloat16(), torch.rand(rows, generator=g), torch.randn(rows, HIDDEN, generator=g).bfloat16()


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_forward_and_all_gradients_are_those_of_one_expert_after_another(counts: list[int], last_first: bool) -> None:
    """Gradients of two micro-batches, so that they are added; experts without tokens; a rank without any."""
    ours, theirs = Layer(len(counts), last_first), Layer(len(counts), False)
    x, probs, grad = inputs(sum(counts))
    leaves = [[x.clone().requires_grad_(), probs.clone().requires_grad_()] for _ in range(2)]
    for _ in range(2):
        groups = Groups.of(counts, last_first, CPU)
        y = Experts.apply(*leaves[0], groups, ours, True)
        want = one_after_another(*leaves[1], counts, theirs.fc1, theirs.fc2)
        y.backward(grad)
        want.backward(grad)
        _close(y, want)
    for got, wanted in zip(leaves[0], leaves[1]):
        _close(got.grad, wanted.grad)
    for a, b in zip(ours.fc1 + ours.fc2, theirs.fc1 + theirs.fc2, strict=True):
        _close(a.main_grad, b.main_grad)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    """But for the order of sums, and what that changes in roundings to BF16 and in codes."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got.float() - want.float()).norm() <= 2e-3 * want.float().norm()


def test_without_a_backward_pass_no_columns_are_made_and_the_output_is_the_same() -> None:
    counts = COUNTS[0]
    layer = Layer(len(counts), False)
    x, probs, _ = inputs(sum(counts))
    groups = Groups.of(counts, False, CPU)
    asked = []

    def swiglu(*args: object) -> object:
        asked.append(args[-1])
        return kernels.swiglu(*args)  # type: ignore[arg-type]

    layer.kernels = SimpleNamespace(**{**vars(kernels), "swiglu": swiglu})  # type: ignore[assignment]
    plain = Experts.apply(x, probs, groups, layer, False)
    assert torch.equal(plain, Experts.apply(x.requires_grad_(), probs, groups, layer, True))
    assert asked == [False, True]


def test_rows_of_all_experts_are_padded_to_tiles() -> None:
    groups = Groups.of([130, 0, 5], True, CPU)
    assert (groups.rows, groups.tiles, groups.padded) == (135, 3, [128, 0, 256])
    assert groups.padded_on_device.tolist() == groups.padded
    assert groups.expert.tolist() == [0] * 256 + [2] * 128
    # first row, real rows, where the expert's columns begin, how long they are, offset in them, row of scales
    assert groups.table.tolist() == [[0, 128, 128, 256, 0, 1], [128, 2, 128, 256, 128, 2], [130, 5, 0, 128, 0, 0]]
    assert Groups.of([130, 0, 5], False, CPU).table[:, 2:].tolist() == [
        [0, 256, 0, 0], [0, 256, 128, 1], [256, 128, 0, 2],
    ]  # fmt: skip


def test_gradients_that_do_not_lie_side_by_side_are_refused() -> None:
    buffer = torch.zeros(5, 4, 4)
    view, last_first = stacked([buffer[3], buffer[2], buffer[1]])
    assert last_first and view.data_ptr() == buffer[1].data_ptr() and view.shape == (3, 4, 4)
    assert not stacked([buffer[2]])[1]
    for wrong in ([buffer[0], buffer[2]], [buffer[0], buffer[1], buffer[3]], [buffer[0], torch.zeros(4, 4)]):
        with pytest.raises(RuntimeError, match="side by side"):
            stacked(wrong)
