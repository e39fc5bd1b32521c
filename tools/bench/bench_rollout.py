#!/usr/bin/env python3
"""Generation of one engine, BF16 against FP8: tokens/s at several batch sizes, random weights of a known shape.

usage: bench_rollout.py WORK [--model Qwen3-4B] [--batch 1 32 256] [--tokens 256] [--json FILE]
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
from recipes import ENGINE as GPU_ENGINE  # noqa: E402


def main() -> None:
    from fp8slurm.checkpoint import hf_to_fp8
    from fp8slurm.config.schema import EngineSection
    from fp8slurm.engine.client import EngineClient, GenerateRequest
    from fp8slurm.engine.server import Engine, EngineSettings

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="Qwen3-4B")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=["bf16", "fp8"], default=["bf16", "fp8"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hf, fp8 = args.work / "hf", args.work / "fp8"
    if not hf.is_dir():
        write_random_model(args.model, hf)
        hf_to_fp8(hf, fp8)
    rows = []
    for precision in args.precision:
        folder = {"bf16": hf, "fp8": fp8}[precision]
        section = EngineSection(
            mem_fraction=0.7,
            max_running_requests=max(args.batch),
            extra_args=[*GPU_ENGINE, "--cuda-graph-bs-decode", *map(str, args.batch)]
            if torch.cuda.is_available()
            else [],
        )
        engine = Engine(folder, args.work / "logs", EngineSettings(section), precision)
        began = time.perf_counter()
        try:
            engine.start()
            engine.wait_ready()
            print(f"{precision}: ready after {time.perf_counter() - began:.0f} s", flush=True)
            client = EngineClient(engine.url, engine.api_key, 600)
            vocab = json.loads((hf / "config.json").read_text())["vocab_size"]
            for batch in args.batch:
                seconds = []
                for round_ in range(args.rounds + 1):
                    torch.manual_seed(round_)
                    prompts = torch.randint(1000 % vocab, vocab, (batch, args.prompt_tokens)).tolist()
                    requests = [GenerateRequest(tuple(p), args.tokens, temperature=1.0) for p in prompts]
                    start = time.perf_counter()
                    done = client.generate(requests, one_batch=False)
                    seconds.append(time.perf_counter() - start)
                tokens = sum(len(g.token_ids) for g in done)
                row = {"precision": precision, "batch": batch, "tokens_per_s": tokens / statistics.median(seconds[1:])}
                rows.append(row)
                print(json.dumps(row), flush=True)
        except Exception as error:
            print(f"{precision}: {error}", flush=True)
        finally:
            engine.stop()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
