#!/usr/bin/env python3
"""A mixture's experts with one launch a product (fp8.grouped = "deep_gemm") on one Hopper GPU: are they right, and how fast?

usage: grouped_probe.py JSON [--tokens 8192 16384] [--experts 128] [--hidden 2048] [--width 768] PART...

    compile   DeepGEMM's kernels for these shapes, side by side in a process each, so that what comes next finds them
    bytes     codes and scales, by rows, by columns and of the weights, against fp8/reference.py
    layer     output and gradients of one layer against FP32 (three experts) and against TransformerEngine's FP8 experts
    kernels   milliseconds of every launch, and TFLOP/s of the products
    ways      milliseconds of a layer's forward and backward passes: ours, TransformerEngine's experts, and those with its own grouped
              products (`use_grouped_tensor`, which Megatron has no setting for), gradients accumulated in FP32, weights quantized before

The shape is Qwen3-30B-A3B's. JSON has what was found, written as it goes; a part that fails does not keep the others back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from fp8slurm.fp8.environment import set_fp32_scales  # noqa: E402
from fp8slurm.trainer.grouped import Experts, Groups, Pair, QuantizedWeights  # noqa: E402

TOP_K = 8
BF16, FP8, FP32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
LIMIT_S = 90
"""Of compiling."""


def counts(tokens: int, experts: int) -> list[int]:
    """Rows of every expert: top-8 of skewed scores, in multiples of 16, which TransformerEngine pads to."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, experts, generator=g) + 0.5 * torch.randn(experts, generator=g)
    picked = torch.bincount(scores.topk(TOP_K, -1).indices.flatten(), minlength=experts)
    return (picked // 16 * 16).tolist()


class Layer:
    """The experts of a layer without Megatron: grouped.Layer."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        from fp8slurm.trainer import grouped_cuda

        grouped_cuda.prepare()
        self.kernels = grouped_cuda
        g = torch.Generator("cuda").manual_seed(1)
        shapes = (experts, 2 * width, hidden), (experts, hidden, width)
        self.weights = [(0.02 * torch.randn(s, generator=g, device="cuda")).to(BF16) for s in shapes]
        self.main_grads = [torch.zeros(s, device="cuda") for s in shapes]
        self._quantized = [grouped_cuda.quantize_weights(list(w)) for w in self.weights]

    def quantized(self) -> tuple[QuantizedWeights, QuantizedWeights]:
        return self._quantized[0], self._quantized[1]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First expert first."""
        return self.main_grads[0], self.main_grads[1]


class Probe:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found: dict[str, Any] = {
            "gpu": torch.cuda.get_device_name(),
            "shape": vars(args) | {"json": str(args.json)},
        }

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        self.args.json.write_text(json.dumps(self.found, indent=1))

    def groups(self, tokens: int) -> Groups:
        return Groups.of(counts(tokens, self.args.experts), True, torch.device("cuda"))

    # compile

    def compile(self) -> None:
        """One process a product: nvcc takes 10 s and more for each."""
        a = self.args
        began = time.monotonic()
        command = [
            sys.executable,
            __file__,
            str(a.json),
            "--experts",
            a.experts,
            "--hidden",
            a.hidden,
            "--width",
            a.width,
            "--tokens",
            *a.tokens,
        ]
        running = {
            name: subprocess.Popen(
                [*map(str, command), "--product", name, "compile"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name in self.products()
        }
        said = {}
        for name, process in running.items():
            try:
                out, _ = process.communicate(timeout=max(1, LIMIT_S - (time.monotonic() - began)))
                said[name] = "compiled" if process.returncode == 0 else out[-600:]
            except subprocess.TimeoutExpired:
                process.kill()
                said[name] = "ran out of time"
        self.put("compile", {"seconds": time.monotonic() - began, **said})

    def products(self) -> dict[str, tuple[str, int, int]]:
        """name -> (multiply or add_weight_gradient, N, K of the weight)."""
        h, f = self.args.hidden, self.args.width
        return {
            "fc1": ("multiply", 2 * f, h), "fc2": ("multiply", h, f), "fc2 dgrad": ("multiply", f, h),
            "fc1 dgrad": ("multiply", h, 2 * f), "fc1 wgrad": ("add", 2 * f, h), "fc2 wgrad": ("add", h, f),
        }  # fmt: skip

    def call(self, name: str, groups: Groups) -> Callable[[], Any]:
        """A product on zeros."""
        from fp8slurm.trainer import grouped_cuda

        what, n, k = self.products()[name]
        rows, tiles = groups.tiles * 128, groups.tiles

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return (
                torch.zeros(shape, dtype=torch.uint8, device="cuda").view(FP8)
                if dtype is FP8
                else torch.zeros(shape, dtype=dtype, device="cuda")
            )

        if what == "multiply":
            x = zeros(rows, k, dtype=FP8), zeros(k // 128, rows, dtype=FP32).t()
            w = zeros(self.args.experts, n, k, dtype=FP8), zeros(self.args.experts, n // 128, k // 128, dtype=FP32)
            return lambda: grouped_cuda.multiply(x, w, groups)
        grad = zeros(rows * n, dtype=FP8), zeros(tiles, n, dtype=FP32).t()
        x = zeros(rows * k, dtype=FP8), zeros(tiles, k, dtype=FP32).t()
        into = zeros(self.args.experts, n, k, dtype=FP32)
        return lambda: grouped_cuda.add_weight_gradient(grad, x, into, groups)

    def product(self, name: str) -> None:
        """Compile one, for all numbers of tokens."""
        from fp8slurm.trainer import grouped_cuda

        grouped_cuda.prepare()
        for tokens in self.args.tokens:
            self.call(name, self.groups(tokens))()
        torch.cuda.synchronize()

    # bytes

    def bytes(self) -> None:
        """Counts of codes and scales that differ: 0 each, and few where a sigmoid is in between."""
        from fp8slurm.fp8 import triton_grouped
        from fp8slurm.fp8.quantize import quantize
        from fp8slurm.fp8.reference import quantize_reference

        a = self.args
        groups = self.groups(a.tokens[0])
        table = groups.table.tolist()
        x = (
            torch.randn(groups.rows, a.hidden, device="cuda") * torch.exp(torch.randn(groups.rows, 1, device="cuda"))
        ).to(BF16)
        rows, columns = triton_grouped.quantize(x, groups.table, True)
        assert columns is not None
        padded = torch.zeros(groups.tiles * 128, a.hidden, dtype=BF16, device="cuda")
        for tile, (first, real, *_) in enumerate(table):
            padded[tile * 128 : tile * 128 + real] = x[first : first + real]
        want = quantize_reference(padded, (1, 128))
        wrong = {"rows": differ(rows, (want.data, want.scale_inv)), "columns": 0, "weights": 0}
        for tile in range(0, groups.tiles, 7):
            _, _, begin, length, offset, scale_row = table[tile]
            q = quantize_reference(padded[tile * 128 : tile * 128 + 128], (128, 1))
            block = columns[0].view(torch.uint8)[begin * a.hidden : (begin + length) * a.hidden].view(a.hidden, length)
            wrong["columns"] += int((block[:, offset : offset + 128] != q.data.view(torch.uint8).t()).sum())
            wrong["columns"] += int((columns[1][:, scale_row] != q.scale_inv[0]).sum())
        layer = Layer(a.experts, a.hidden, a.width)
        for weights, quantized in zip(layer.weights, layer.quantized()):
            for e in (0, 1, a.experts - 1):
                one = quantize(weights[e])
                wrong["weights"] += differ(
                    (quantized.forward[0][e], quantized.forward[1][e]), (one.data, one.scale_inv)
                )
                turned = one.data.view(torch.uint8).t().contiguous().view(FP8), one.scale_inv.t()
                wrong["weights"] += differ((quantized.transposed[0][e], quantized.transposed[1][e]), turned)
        self.put("bytes that differ from the reference", wrong)

    # layer

    def layer(self) -> None:
        """Relative differences. FP8's own error against FP32 is about 6e-2; from TransformerEngine only sums differ."""
        a = self.args
        of = counts(a.tokens[0], a.experts)
        layer = Layer(a.experts, a.hidden, a.width)
        x, probs, grad = inputs(sum(of), a.hidden)
        ours = run(grouped_experts(layer, of), x, probs, grad)
        first = [g.clone() for g in layer.main_grads]
        for g in layer.main_grads:
            g.zero_()
        ours |= {"dW1": first[0], "dW2": first[1]}
        twice = run(grouped_experts(layer, of), x, probs, grad)
        twice |= {"dW1": layer.main_grads[0], "dW2": layer.main_grads[1]}
        self.put("a repetition has the same bits", {k: bool(torch.equal(ours[k], twice[k])) for k in ours})
        del twice
        self.put("against FP32", self.against_fp32(ours, layer, of, x, probs, grad))
        linears = transformer_engine_linears(layer)
        theirs = run(transformer_engine_experts(linears, of), x, probs, grad)
        theirs |= {
            name: torch.stack([getattr(linear, f"weight{i}").main_grad for i in range(len(of))])
            for name, linear in zip(("dW1", "dW2"), linears)
        }
        self.put("against TransformerEngine", {k: apart(ours[k], theirs[k]) for k in ours})
        self.put("TransformerEngine against FP32", self.against_fp32(theirs, layer, of, x, probs, grad))

    def against_fp32(
        self, got: dict[str, torch.Tensor], layer: Layer, of: list[int], *inputs: torch.Tensor
    ) -> dict[str, float]:
        worst: dict[str, float] = {}
        ends = torch.tensor(of).cumsum(0).tolist()
        for e in (0, len(of) // 3, len(of) - 1):
            part = slice(ends[e] - of[e], ends[e])
            w1, w2 = (w[e].float().requires_grad_() for w in layer.weights)

            def expert(x: torch.Tensor, p: torch.Tensor, w1: torch.Tensor = w1, w2: torch.Tensor = w2) -> torch.Tensor:
                gate, up = (x @ w1.t()).chunk(2, -1)
                return (torch.nn.functional.silu(gate) * up * p[:, None]) @ w2.t()

            want = run(expert, *(t[part].float() for t in inputs)) | {"dW1": w1.grad, "dW2": w2.grad}
            for k, wanted in want.items():
                worst[k] = max(worst.get(k, 0.0), apart(got[k][e] if k.startswith("dW") else got[k][part], wanted))
        return worst

    # ways

    def ways(self) -> None:
        a = self.args
        for tokens in a.tokens:
            of = counts(tokens, a.experts)
            given = inputs(sum(of), a.hidden)
            layer = Layer(a.experts, a.hidden, a.width)
            seen: dict[str, Any] = {"ours": each(lambda: run(grouped_experts(layer, of), *given))}
            self.put(f"ways at {tokens} tokens", seen)
            for name, how, splits in (
                ("TransformerEngine", {}, of),
                ("use_grouped_tensor", {"use_grouped_tensor": True}, torch.tensor(of, device="cuda")),
            ):
                try:
                    linears = transformer_engine_linears(layer, **how)
                    run(transformer_engine_experts(linears, splits, True), *given)
                    seen[name] = each(lambda: run(transformer_engine_experts(linears, splits, False), *given))
                except Exception as error:
                    seen[name] = f"{type(error).__name__}: {error}"[:600]
                self.put(f"ways at {tokens} tokens", seen)

    # kernels

    def kernels(self) -> None:
        from fp8slurm.trainer import grouped_cuda as g

        a = self.args
        for tokens in a.tokens:
            groups = self.groups(tokens)
            seen: dict[str, Any] = {"rows": groups.rows, "padded": groups.tiles * 128}
            for name, (_, n, k) in self.products().items():
                ms = milliseconds(self.call(name, groups))
                seen[name] = {"ms": ms, "tflops": 2 * groups.rows * n * k / ms / 1e9}
            layer = Layer(a.experts, a.hidden, a.width)
            x, both, dh = (
                torch.randn(r, w, device="cuda").to(BF16)
                for r, w in ((groups.rows, a.hidden), (groups.tiles * 128, 2 * a.width), (groups.tiles * 128, a.width))
            )
            probs, y = (
                torch.rand(groups.rows, device="cuda"),
                torch.randn(groups.tiles * 128, a.hidden, device="cuda").to(BF16),
            )
            for name, call in {
                "quantize": lambda: g.quantize(x, groups, True),
                "quantize rows": lambda: g.quantize(x, groups, False),
                "swiglu": lambda: g.swiglu(both, probs, groups, True),
                "swiglu backward": lambda: g.swiglu_backward(dh, both, probs, groups),
                "unpad": lambda: g.unpad(y, groups),
                "weights": lambda: [g.quantize_weights(list(w)) for w in layer.weights],
            }.items():
                seen[name] = {"ms": milliseconds(call)}
            self.put(f"kernels at {tokens} tokens", seen)


def differ(got: Pair, want: Pair) -> int:
    codes = (got[0].view(torch.uint8) != want[0].view(torch.uint8)).sum()
    return int(codes) + int((got[1] != want[1]).sum())


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


def run(
    experts: Callable[..., torch.Tensor], x: torch.Tensor, probs: torch.Tensor, grad: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Output and gradients of the inputs."""
    x, probs = x.detach().clone().requires_grad_(), probs.detach().clone().requires_grad_()
    y = experts(x, probs)
    y.backward(grad)
    assert x.grad is not None and probs.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dp": probs.grad}


def inputs(rows: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, probs, and the gradient of the output."""
    draw = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(rows, hidden, generator=draw, device="cuda").to(BF16)
    grad = (0.01 * torch.randn(rows, hidden, generator=draw, device="cuda")).to(BF16)
    return x, torch.rand(rows, generator=draw, device="cuda"), grad


def grouped_experts(layer: Layer, of: list[int]) -> Callable[..., torch.Tensor]:
    return lambda x, probs: Experts.apply(x, probs, Groups.of(of, False, x.device), layer, True)


def transformer_engine_linears(layer: Layer, **how: Any) -> list[Any]:
    """Gate and up, and down, of the same weights."""
    import transformer_engine.pytorch as te

    linears = []
    for w in layer.weights:
        many, outputs, width = w.shape
        linear = te.GroupedLinear(
            many, width, outputs, bias=False, params_dtype=BF16, device="cuda", fuse_wgrad_accumulation=True, **how
        )
        for i, one in enumerate(w):
            weight = getattr(linear, f"weight{i}")
            weight.data.copy_(one)
            weight.main_grad = torch.zeros(one.shape, device="cuda")
        linears.append(linear)
    return linears


def transformer_engine_experts(linears: list[Any], of: Any, first: bool | None = None) -> Callable[..., torch.Tensor]:
    """What Megatron's TEGroupedMLP computes."""
    import transformer_engine.pytorch as te
    from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
    from transformer_engine.common.recipe import Float8BlockScaling

    def experts(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8BlockScaling()):
            both = linears[0](x, of, is_first_microbatch=first)
            hidden = weighted_bias_swiglu_impl(both, None, probs.unsqueeze(-1), False)
            return linears[1](hidden, of, is_first_microbatch=first)

    return experts


def milliseconds(call: Callable[[], Any], times: int = 10) -> float:
    """Median of a launch, between events: what the host needs shows too where it is slower than the GPU."""
    call()
    spans = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        spans.append(begin.elapsed_time(end))
    return sorted(spans)[times // 2]


def each(call: Callable[[], Any], times: int = 5) -> float:
    """Milliseconds of one of several calls in a row, the host's share included where the GPU waits for it."""
    call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / times * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("parts", nargs="+", choices=["compile", "bytes", "layer", "kernels", "ways"], metavar="PART")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--product", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_fp32_scales()
    probe = Probe(args)
    if args.product:
        probe.product(args.product)
        return
    failed = False
    for part in args.parts:
        began = time.monotonic()
        try:
            getattr(probe, part)()
        except Exception as error:
            failed = True
            probe.put(f"{part} failed", f"{type(error).__name__}: {error}"[:2000])
        torch.cuda.empty_cache()
        probe.put(f"seconds of {part}", time.monotonic() - began)
    sys.exit(failed)


if __name__ == "__main__":
    main()
