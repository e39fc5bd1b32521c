#!/usr/bin/env python3
"""Do requests with a sampling_seed draw the same tokens again? Several servers with a model at once, each asked three times.

For every server: the same batch twice (`again`), and requests of it one by one (`alone`): the share of responses that are equal
from their first to their last token, and how many tokens agree before the first that differs. Where it is not all of them,
TRACE shows why: a line for each draw, with seeds, positions and what was drawn, out of the server's own process, and whether
the same draw without torch.compile gives the same tokens.

usage: seed_probe.py FOLDER [--json FILE] [--trace FOLDER]        FOLDER: a model, on one GPU
       seed_probe.py models/tiny --cpu                            our own sampling, as runs without a GPU use it
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

from recipes import engine_arguments  # noqa: E402

from fp8slurm.config.schema import EngineSection  # noqa: E402
from fp8slurm.engine.client import EngineClient, GenerateRequest  # noqa: E402
from fp8slurm.engine.server import Engine, EngineError, EngineSettings  # noqa: E402

REQUESTS, TOKENS, ALONE = 16, 48, 4
SERVERS: dict[str, tuple[bool, list[str]]] = {
    "deterministic": (True, []),
    "deterministic, no overlap": (True, ["--disable-overlap-schedule"]),
    "deterministic, no graphs": (True, ["--disable-cuda-graph"]),
    "not deterministic": (False, []),
}
"""Name -> (run.deterministic, further flags)."""

WATCH = """
import importlib.abc, importlib.machinery, json, os, sys

NAME = "sglang.srt.layers.sampler"


def watch(sampler):
    import torch

    compiled, lines = sampler.multinomial_with_seed, open(f"{os.environ['SEED_TRACE']}.{os.getpid()}.jsonl", "a")
    plain = getattr(compiled, "_torchdynamo_orig_callable", compiled)

    def draw(logprobs, seed, positions):
        took = compiled(logprobs, seed, positions)
        again = plain(logprobs, seed, positions)
        n = min(4, len(seed))
        line = {"rows": len(seed), "seeds": seed[:n].tolist(), "positions": positions[:n].tolist(), "types": [str(seed.dtype), str(positions.dtype)],
                "logprobs": logprobs[:n].double().nan_to_num(neginf=0).sum(1).tolist(), "took": took[:n].view(-1).tolist(),
                "as_without_compile": bool((took == again).all())}
        print(json.dumps(line), file=lines, flush=True)
        return took

    sampler.multinomial_with_seed = draw
    from_probs = sampler.sampling_from_probs_torch

    def from_probs_watched(probs, sampling_seed=None, positions=None):
        if sampling_seed is None:
            print(json.dumps({"rows": len(probs), "seeds": None}), file=lines, flush=True)
        return from_probs(probs, sampling_seed, positions)

    sampler.sampling_from_probs_torch = from_probs_watched


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            watch(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
"""
"""sitecustomize.py of the servers under --trace."""


def agree(a: list[int], b: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def compare(a: list[list[int]], b: list[list[int]]) -> dict[str, float]:
    return {
        "equal": sum(x == y for x, y in zip(a, b)) / len(a),
        "agree": sum(agree(x, y) for x, y in zip(a, b)) / len(a),
    }


def ask(client: EngineClient, vocab: int) -> dict[str, Any]:
    rng = random.Random(7)
    requests = [
        GenerateRequest([rng.randrange(vocab) for _ in range(rng.randrange(4, 40))], TOKENS, seed=1000 + i)
        for i in range(REQUESTS)
    ]
    first, again = ([g.token_ids for g in client.generate(requests, one_batch=True)] for _ in range(2))
    alone = [client.generate([request])[0].token_ids for request in requests[:ALONE]]
    others = [GenerateRequest(r.token_ids, TOKENS, seed=9000 + i) for i, r in enumerate(requests)]
    otherwise = [g.token_ids for g in client.generate(others, one_batch=True)]
    return {
        "again": compare(first, again),
        "alone": compare(first[:ALONE], alone),
        "other_seeds": compare(first, otherwise),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path)
    args = parser.parse_args()
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    logs = Path(tempfile.mkdtemp(prefix="seed_probe_"))
    servers = {"cpu": (True, [])} if args.cpu else SERVERS
    report: dict[str, Any] = {}
    engines: dict[str, Engine] = {}
    try:
        for number, (name, (deterministic, flags)) in enumerate(servers.items()):
            graphs = [] if args.cpu or "--disable-cuda-graph" in flags else [1, 4, REQUESTS]
            extra = [] if args.cpu else [*engine_arguments(graphs), *[f for f in flags if f != "--disable-cuda-graph"]]
            section = EngineSection(
                max_running_requests=REQUESTS, max_total_tokens=8192, context_length=256, mem_fraction=0.2, extra_args=extra
            )  # fmt: skip
            settings = EngineSettings(section, cpu=args.cpu, cpu_threads=1, deterministic=deterministic)
            before = os.environ.copy()
            if args.trace:
                args.trace.mkdir(parents=True, exist_ok=True)
                (logs / "site").mkdir(exist_ok=True)
                (logs / "site" / "sitecustomize.py").write_text(textwrap.dedent(WATCH))
                os.environ["PYTHONPATH"] = os.pathsep.join([str(logs / "site"), os.environ.get("PYTHONPATH", "")])
                os.environ["SEED_TRACE"] = str(args.trace.resolve() / name.replace(", ", "-").replace(" ", "-"))
            engines[name] = Engine(args.model, logs, settings, f"engine-{number}")
            engines[name].start()
            os.environ.clear()
            os.environ.update(before)
        for name, engine in engines.items():
            try:
                engine.wait_ready()
                report[name] = ask(EngineClient(engine.url, engine.api_key, 300), vocab)
            except EngineError as error:
                report[name] = {"error": str(error)[-2000:]}
            print(name, json.dumps(report[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(report, indent=1))
    finally:
        for engine in engines.values():
            engine.stop()
    sys.exit(any("error" in said for said in report.values()))


if __name__ == "__main__":
    main()
