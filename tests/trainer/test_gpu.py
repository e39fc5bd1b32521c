"""TransformerEngine on a GPU against what the rest of the project takes for it."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
TOKENS, WIDTH, OUT = 512, 640, 384


@pytest.fixture(scope="module")
def linear() -> dict[str, torch.Tensor]:
    """One Linear in TransformerEngine's blockwise FP8, forward and backward; inputs with outliers, as activations have."""
    from fp8slurm.fp8.environment import set_fp32_scales

    set_fp32_scales()
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling

    torch.manual_seed(0)
    layer = te.Linear(WIDTH, OUT, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(TOKENS, WIDTH, device="cuda")
    x[:, ::97] *= 30
    x = x.bfloat16().requires_grad_()
    grad = (torch.randn(TOKENS, OUT, device="cuda") * torch.rand(TOKENS, 1, device="cuda")).bfloat16()
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
        y = layer(x, is_first_microbatch=True)
    y.backward(grad)
    kept = layer._fp8_workspaces["weight"]
    return {
        "x": x.detach(), "w": layer.weight.detach(), "dy": grad, "y": y.detach(), "dx": x.grad, "dw": layer.weight.grad,
        "codes": kept._rowwise_data, "scales": kept._rowwise_scale_inv,
    }  # fmt: skip


def test_the_weight_in_the_product_has_the_codes_and_scales_that_engines_get(linear: dict[str, torch.Tensor]) -> None:
    from fp8slurm.fp8.quantize import quantize

    ours = quantize(linear["w"])
    assert torch.equal(ours.data.view(torch.uint8), linear["codes"].view(torch.uint8))
    rows, columns = ours.scale_inv.shape
    assert torch.equal(ours.scale_inv, linear["scales"][:rows, :columns])


@pytest.mark.parametrize("product", ["y", "dx", "dw"])
def test_the_emulation_is_transformer_engine_but_for_the_order_of_sums(
    linear: dict[str, torch.Tensor], product: str
) -> None:
    """Both multiply the same FP8 values and accumulate in FP32 (Hopper's tensor cores keep fewer bits of a running sum than
    FP32's 24), then round to BF16: 2^-9 of the largest terms. What FP8 itself changes is far larger."""
    from fp8slurm.fp8.quantize import fake_quantize_1x128, fake_quantize_128x1, fake_quantize_block

    x, w, dy = (linear[name].cpu() for name in ("x", "w", "dy"))
    if product == "y":
        ours, exact = fake_quantize_1x128(x) @ fake_quantize_block(w).t(), x.float() @ w.float().t()
    elif product == "dx":
        ours, exact = fake_quantize_1x128(dy) @ fake_quantize_block(w), dy.float() @ w.float()
    else:
        ours, exact = fake_quantize_128x1(dy).t() @ fake_quantize_128x1(x), dy.float().t() @ x.float()
    theirs = linear[product].float().cpu()
    size = exact.norm()
    apart, effect = float((theirs - ours).norm() / size), float((theirs - exact).norm() / size)
    assert effect > 1e-2, "FP8 was ignored"
    assert apart < 4e-3 and apart < effect / 5, (apart, effect)


def test_cutlass_groups_the_products_of_a_bf16_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that trainer/experts.py chooses are cuBLAS's but for the order of sums, and one launch instead of one an expert."""
    import transformer_engine.pytorch as te
    from torch.profiler import ProfilerActivity, profile

    from fp8slurm.trainer.experts import CUTLASS

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("CUTLASS's grouped kernels are for Hopper")
    torch.manual_seed(0)
    experts, tokens = 16, [0, 1, 130, 64] * 4
    layer = te.GroupedLinear(experts, 256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(sum(tokens), 256, device="cuda", dtype=torch.bfloat16)
    products, launches = {}, {}
    for way in "01":
        monkeypatch.setenv(CUTLASS, way)
        layer(x, tokens)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            products[way] = layer(x, tokens).detach()
            torch.cuda.synchronize()
        names = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        launches[way] = sum("gemm" in name.lower() or "nvjet" in name or "cutlass" in name for name in names)
    torch.testing.assert_close(products["0"], products["1"], rtol=2**-7, atol=2**-7)
    assert launches["1"] == 1 < launches["0"], launches
