#!/usr/bin/env python3
"""Generation of engines side by side on one GPU: tokens/s at several batch sizes, random weights of a known shape.

usage: bench_rollout.py WORK [--model Qwen3-4B] [--engines bf16-fa3 fp8-fa3 fp8-triton] [--batch 1 32 256] [--tokens 256] [--json FILE]
An engine is a precision and an attention backend. All are started at once and measured in turns when all are ready, so that
clocks and neighbours are the same for each; the others are idle meanwhile. Without a GPU the CPU's attention stands for both.
At the end each engine scores what it has generated itself: how far its log-probabilities while decoding are from those at prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

# else SGLang compiles DeepGEMM for every batch of up to 16384 tokens before it answers, for 10 minutes and more
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import torch  # noqa: E402
from random_model import write_random_model  # noqa: E402
from recipes import engine_arguments  # noqa: E402
from turns import alone  # noqa: E402

SCORED = 32
"""Responses that are scored."""
SAME = 1e-5
"""Nats. SGLang takes log(softmax) while decoding and log_softmax at prefill: up to 2e-6 between equal logits."""


def main() -> None:
    from fp8slurm.checkpoint import hf_to_fp8
    from fp8slurm.config.schema import EngineSection
    from fp8slurm.engine.client import EngineClient, GenerateRequest
    from fp8slurm.engine.server import Engine, EngineError, EngineSettings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="Qwen3-4B")
    parser.add_argument("--hf", type=Path, help="a BF16 folder that is there already, its FP8 beside it (NAME-FP8)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=["bf16-fa3", "fp8-fa3"], help="PRECISION-ATTENTION")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hf = args.hf or args.work / "hf"
    fp8 = hf.with_name(f"{hf.name}-FP8")
    if not hf.is_dir():
        write_random_model(args.model, hf)
    if not fp8.is_dir():
        hf_to_fp8(hf, fp8, verify=False)
    largest = max(args.batch)
    engines, ready_s = {}, {}
    rows: list[dict] = []
    report = {
        "model": hf.name if args.hf else args.model,
        "torch": torch.__version__,
        "tokens": args.tokens,
        "ready_s": ready_s,
        "rows": rows,
    }
    if torch.cuda.is_available():
        report["gpu"] = torch.cuda.get_device_name()

    def keep() -> None:  # as it goes: what is measured is there whatever comes next
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))

    began = time.perf_counter()
    try:
        for name in args.engines:
            precision, attention = name.split("-")
            extra = engine_arguments(args.batch, attention) if torch.cuda.is_available() else []
            section = EngineSection(
                mem_fraction=0.6,
                max_running_requests=largest,
                max_total_tokens=largest * (args.prompt_tokens + args.tokens + 16),
                context_length=args.prompt_tokens + args.tokens + 16,
                extra_args=extra,
            )
            engine = Engine({"bf16": hf, "fp8": fp8}[precision], args.work / "logs", EngineSettings(section), name)
            engine.start()
            engines[name] = engine
        clients = {}
        for name, engine in engines.items():
            try:
                engine.wait_ready()
            except EngineError as error:
                print(f"{name}: {error}", flush=True)
                report.setdefault("errors", {})[name] = str(error)[-2000:]
                keep()
                continue
            ready_s[name] = time.perf_counter() - began
            clients[name] = EngineClient(engine.url, engine.api_key, 600)
        print(f"ready after {ready_s}", flush=True)
        with alone("rollout"):
            vocab = json.loads((hf / "config.json").read_text())["vocab_size"]
            for batch in args.batch:
                seconds: dict[str, list[float]] = {name: [] for name in clients}
                rates: dict[str, list[float]] = {name: [] for name in clients}
                for round_ in range(args.rounds + 1):
                    torch.manual_seed(round_)
                    prompts = torch.randint(1000 % vocab, vocab, (batch, args.prompt_tokens)).tolist()
                    requests = [GenerateRequest(p, args.tokens, temperature=1.0) for p in prompts]
                    for name, client in clients.items():
                        start = time.perf_counter()
                        done = client.generate(requests, one_batch=True)
                        seconds[name].append(time.perf_counter() - start)
                        rates[name].append(sum(len(g.token_ids) for g in done) / seconds[name][-1])
                for name in clients:
                    row = {"engine": name, "batch": batch, "tokens_per_s": statistics.median(rates[name][1:])}
                    rows.append(row | {"seconds": seconds[name]})
                    print(json.dumps(row), flush=True)
                keep()
            for name, client in clients.items():
                generated, wanted = client.generate(requests[:SCORED], one_batch=True), requests[:SCORED]
                scores = client.score([[*r.token_ids, *g.token_ids] for r, g in zip(wanted, generated)])
                apart = [
                    abs(x - y)
                    for r, g, score in zip(wanted, generated, scores)
                    for x, y in zip(g.logprobs, score[len(r.token_ids) - 1 :])
                ]
                close = sum(d <= SAME for d in apart) / len(apart)
                row = {
                    "engine": name,
                    "tokens": len(apart),
                    "same": close,
                    "mean_abs": statistics.fmean(apart),
                    "max_abs": max(apart),
                }
                report.setdefault("decode_against_prefill", []).append(row)
                print("decode against prefill:", json.dumps(row), flush=True)
                keep()
    finally:
        for engine in engines.values():
            engine.stop()
    sys.exit(len(rows) != len(args.batch) * len(args.engines))


if __name__ == "__main__":
    main()
