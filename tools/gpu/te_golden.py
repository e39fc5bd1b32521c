#!/usr/bin/env python3
"""TransformerEngine's Float8BlockQuantizer against ours, byte for byte, and the Triton kernel's bandwidth; on a GPU.

Writes OUT/te_<version>.xz (the golden bytes that tests/fp8/golden keeps), OUT/te_golden.json (everything measured) and
OUT/te_golden.txt (the table that is printed). Exit status 1 if any byte of ours differs.

usage: tools/gpu/te_golden.py [--out DIR]         (default: $OUT, or the present folder)
"""

import argparse
import hashlib
import json
import os
import statistics
import sys
import traceback
from collections import Counter, defaultdict
from pathlib import Path

os.environ["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"  # read when TransformerEngine's recipe class is defined
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/fp8/golden")]

import store  # noqa: E402
import torch  # noqa: E402
from cases import Case, cases  # noqa: E402

from fp8slurm.fp8.block import BlockFP8, scale_shape  # noqa: E402
from fp8slurm.fp8.quantize import quantize, quantize_1x128  # noqa: E402
from fp8slurm.fp8.reference import quantize_reference  # noqa: E402

BLOCKS = {"block": (128, 128), "row": (1, 128), "column": (128, 1)}
SHAPES = [(19456, 2560), (2560, 9728)]
Pair = tuple[torch.Tensor, torch.Tensor]


def transformer_engine(w: torch.Tensor, kind: str, power_of_two: bool) -> Pair:
    """TransformerEngine's codes (uint8 [N, K]) and scale_inv in our layout, on the GPU."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=kind == "column",
        amax_epsilon=0.0,
        force_pow_2_scales=power_of_two,
        block_scaling_dim=2 if kind == "block" else 1,
    )
    n, k = w.shape
    q = quantizer(w)
    torch.cuda.synchronize()
    if kind == "block":
        rows, columns = scale_shape((n, k))
        return q._rowwise_data.view(torch.uint8), q._rowwise_scale_inv[:rows, :columns].contiguous()
    if kind == "row":  # scales are stored [ceil(K / 128), N up to a multiple of 4]
        return q._rowwise_data.view(torch.uint8), q._rowwise_scale_inv[:, :n].t().contiguous()
    return q._columnwise_data.view(torch.uint8).t().contiguous(), q._columnwise_scale_inv[:, :k].contiguous()


def triton(w: torch.Tensor, case: Case) -> Pair:
    from fp8slurm.fp8.triton_quantize import quantize_into

    out = BlockFP8(
        torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device),
        torch.empty(scale_shape(w.shape), device=w.device),
    )
    finite = quantize_into(w, out, case.power_of_two)
    assert finite == bool(w.isfinite().all()), "the kernel's flag is wrong"
    return out.data.view(torch.uint8), out.scale_inv


def ours(case: Case, w: torch.Tensor) -> dict[str, Pair]:
    """Every path of ours that can take the case, by name."""
    cpu = quantize_reference(w, BLOCKS[case.kind], case.power_of_two)
    gpu = quantize_reference(w.cuda(), BLOCKS[case.kind], case.power_of_two)
    made: dict[str, Pair] = {
        "reference (CPU)": (cpu.data.view(torch.uint8), cpu.scale_inv),
        "reference (GPU)": (gpu.data.view(torch.uint8), gpu.scale_inv),
    }
    if case.kind == "block":
        by_triton = triton(w.cuda(), case)  # checks the kernel's flag, for every input
        if w.isfinite().all():  # weights that are not are refused: nobody sees their bytes
            made["Triton"] = by_triton
            fast = quantize(w, power_of_two=case.power_of_two)
            made["CPU panels"] = (fast.data.view(torch.uint8), fast.scale_inv)
    if case.kind == "row":
        codes, scale_inv = quantize_1x128(w, case.power_of_two)
        made["CPU panels"] = (codes.view(torch.uint8), scale_inv)
    return made


def as_bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.cpu().clone(memory_format=torch.contiguous_format)  # a single element may have any stride
    return whole.flatten().view(torch.uint8).numpy().tobytes()


def difference(mine: Pair, theirs: Pair) -> str:
    """'' if equal, else what differs, with the first place."""
    said = []
    for what, a, b in (("codes", mine[0], theirs[0]), ("scales", mine[1], theirs[1])):
        a, b = a.cpu().contiguous(), b.cpu().contiguous()
        if a.dtype == torch.float32:
            a, b = a.view(torch.int32), b.view(torch.int32)
        wrong = (a != b).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            said.append(f"{len(wrong)} of {a.numel()} {what} (at {list(at)}: ours {a[at]:#x}, TE {b[at]:#x})")
    return ", ".join(said)


def compare() -> tuple[list, dict]:
    """Golden records, and per kind, style and path how many cases were equal, with the first differences."""
    records, refused, differences = [], [], []
    equal: dict[str, Counter] = defaultdict(Counter)
    for case in cases():
        w = case.input()
        try:
            theirs = transformer_engine(w.cuda(), case.kind, case.power_of_two)
        except Exception as error:  # what TransformerEngine refuses is a result, too
            text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            refused.append({"case": case.to_json(), "error": text[:300]})
            records.append((case.to_json() | {"refused": text[:80]}, b""))
            torch.cuda.synchronize()
            continue
        records.append(store.pack_record(case.to_json(), as_bytes(theirs[0]), as_bytes(theirs[1])))
        group = "not finite" if case.style in ("nan", "infinity") else "finite"
        for path, mine in ours(case, w).items():
            said = difference(mine, theirs)
            equal[f"{case.kind:6} {group:10} {path}"][not said] += 1
            if said:
                differences.append({"case": case.to_json(), "path": path, "difference": said})
    summary = {key: {"equal": c[True], "different": c[False]} for key, c in sorted(equal.items())}
    return records, {"equal": summary, "refused": refused, "differences": differences}


def graph_ms(run: list, repeats: int = 15) -> float:
    """Median milliseconds of one of the calls in `run`, which touch memory of their own so that no cache helps; as a
    CUDA graph, so that no launch is counted either."""
    for call in run:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in run:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(run))
    return statistics.median(times)


def bandwidth() -> dict:
    """GB/s of the Triton kernel (3 bytes an element), of copies of as many bytes, and of TransformerEngine."""
    from fp8slurm.fp8.triton_quantize import Launch, launch

    found: dict = {"copy of 4 GiB": None, "shapes": {}}
    a = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    found["copy of 4 GiB"] = 2 * a.numel() / graph_ms([lambda: b.copy_(a)]) / 1e6
    a = b = None
    bad = torch.zeros(1, dtype=torch.int32, device="cuda")
    for n, k in SHAPES:
        sets = []
        for _ in range(8):
            w = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
            sets.append((w, quantize(w)))
        traffic = 3 * n * k
        copies = [[torch.empty(traffic // 2, dtype=torch.uint8, device="cuda") for _ in "ab"] for _ in range(8)]
        rows = {"copy of as many bytes": traffic / graph_ms([lambda c=c: c[1].copy_(c[0]) for c in copies]) / 1e6}
        del copies
        ways = [Launch(t, w, s) for t, s in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 3), (10, 2)) for w in (4, 8, 16)]
        for how in ways:
            try:
                ms = graph_ms([lambda s=s: launch(s[0], s[1], bad, how=how) for s in sets])
                rows[f"Triton tiles={how.tiles} warps={how.num_warps} stages={how.num_stages}"] = traffic / ms / 1e6
            except Exception as error:
                rows[f"Triton tiles={how.tiles} warps={how.num_warps} stages={how.num_stages}"] = (
                    f"{type(error).__name__}: {str(error)[:200]}"
                )
        rows["Triton as shipped"] = traffic / graph_ms([lambda s=s: launch(s[0], s[1], bad) for s in sets]) / 1e6
        try:
            rows["TransformerEngine row-wise"] = traffic / transformer_engine_ms(sets) / 1e6
        except Exception as error:
            rows["TransformerEngine row-wise"] = f"{type(error).__name__}: {str(error)[:200]}"
        for how in ways[:: len(ways) - 1]:  # other launches, the same bytes
            again = BlockFP8(torch.empty_like(sets[0][1].data), torch.empty_like(sets[0][1].scale_inv))
            launch(sets[0][0], again, bad, how=how)
            assert as_bytes(again.data) == as_bytes(sets[0][1].data) and as_bytes(again.scale_inv) == as_bytes(
                sets[0][1].scale_inv
            )
        cpu = quantize_reference(sets[0][0].cpu())
        assert as_bytes(cpu.data) == as_bytes(sets[0][1].data) and as_bytes(cpu.scale_inv) == as_bytes(
            sets[0][1].scale_inv
        )
        theirs = transformer_engine(sets[0][0], "block", False)
        rows["same bytes as TransformerEngine"] = not difference(
            (sets[0][1].data.view(torch.uint8), sets[0][1].scale_inv), theirs
        )
        found["shapes"][f"{n}x{k}"] = rows
    return found


def transformer_engine_ms(sets: list) -> float:
    """TransformerEngine's own weight quantizer, row-wise codes only, into tensors that exist."""
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        fp8_dtype=tex.DType.kFloat8E4M3,
        rowwise=True,
        columnwise=False,
        amax_epsilon=0.0,
        force_pow_2_scales=False,
        block_scaling_dim=2,
    )
    outs = [quantizer(w) for w, _ in sets]
    return graph_ms([lambda s=s, o=o: quantizer.update_quantized(s[0], o) for s, o in zip(sets, outs)])


def table(report: dict) -> str:
    lines = [
        ", ".join(f"{k} {v}" for k, v in report["versions"].items()),
        "",
        "cases with equal bytes (codes and scales)",
    ]
    found = report.get("comparison")
    if found:
        for key, count in found["equal"].items():
            lines.append(f"  {key:36} {count['equal']:4} equal, {count['different']:4} different")
        lines.append(f"  refused by TransformerEngine: {len(found['refused'])}")
        shapes = Counter(
            (r["case"]["kind"], r["case"]["rows"], r["case"]["columns"], r["error"]) for r in found["refused"]
        )
        lines += [
            f"    {kind} [{n}, {k}]: {count} cases: {error[:120]}"
            for (kind, n, k, error), count in sorted(shapes.items())
        ]
        for d in found["differences"][:12]:
            c = d["case"]
            which = f"{c['kind']} {c['dtype']} [{c['rows']}, {c['columns']}] {c['style']} pow2={c['power_of_two']}"
            lines.append(f"  {d['path']}: {which}: {d['difference']}")
    speed = report.get("bandwidth")
    if speed:
        lines += ["", f"bandwidth, GB/s; device-to-device copy of 4 GiB: {speed['copy of 4 GiB']:.0f}"]
        for shape, rows in speed["shapes"].items():
            lines.append(f"  {shape} BF16")
            for name, value in rows.items():
                share = (
                    f"{value:7.0f}  {100 * value / speed['copy of 4 GiB']:5.1f}% of the copy"
                    if isinstance(value, float)
                    else str(value)
                )
                lines.append(f"    {name:38} {share}")
    lines += ["", *(f"FAILED: {name}\n{text}" for name, text in report["errors"].items())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    import transformer_engine
    import transformer_engine.pytorch  # noqa: F401
    import triton as triton_package

    versions = {
        "transformer_engine": transformer_engine.__version__,
        "torch": torch.__version__,
        "triton": triton_package.__version__,
        "cuda": str(torch.version.cuda),
        "gpu": torch.cuda.get_device_name(),
    }
    report: dict = {"versions": versions, "errors": {}}
    for name, step in (("comparison", compare), ("bandwidth", bandwidth)):
        try:
            result = step()
            if name == "comparison":
                records, result = result
                path = args.out / f"te_{versions['transformer_engine']}.xz"
                store.write(path, versions, records)
                report["golden_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            report[name] = result
        except Exception:
            report["errors"][name] = traceback.format_exc()
    text = table(report)
    print(text)
    (args.out / "te_golden.txt").write_text(text + "\n")
    (args.out / "te_golden.json").write_text(json.dumps(report, indent=1))
    return 1 if report["errors"] or report["comparison"]["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
