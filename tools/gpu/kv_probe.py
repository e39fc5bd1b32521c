#!/usr/bin/env python3
"""An FP8 KV cache on one GPU beside one in BF16: does the engine follow an update's scales, and how fast does it decode?

usage: kv_probe.py WORK JSON [--model Qwen3-4B] [--fp8 FOLDER] [--kv-gb 36] [--response 8192] [--tokens 256]

Two engines with the same block-FP8 weights (random; FOLDER: made already) and as many bytes of KV cache each start side by
side. Then, one after the other:

    scales      updates that bring scales only, into the FP8 cache: log-probabilities at prefill and while decoding (CUDA
                graphs) with scales of 1, finer, so coarse that every key is 0, so fine that keys are cut off, and 1 again
    speed       as many sequences as the cache holds whole (prompt and RESPONSE tokens) decode TOKENS tokens at half the
                response's length, the mean context of a whole one: tokens/s, median of 3 rounds in turns
    positions   the same tokens scored by both engines: mean difference by position, with scales of 1 and others

Each part is kept when the next fails. Without a GPU --model tiny --response 256 tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]
# else SGLang compiles DeepGEMM for every batch of up to 16384 tokens before it answers, for 10 minutes and more
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import torch  # noqa: E402
from random_model import write_random_model  # noqa: E402
from recipes import engine_arguments  # noqa: E402
from turns import alone  # noqa: E402

from fp8slurm.checkpoint import hf_to_fp8  # noqa: E402
from fp8slurm.config.schema import EngineSection  # noqa: E402
from fp8slurm.core.gap import gap_by_position, gap_sums  # noqa: E402
from fp8slurm.core.gpu_memory import mappable  # noqa: E402
from fp8slurm.engine.client import EngineClient, GenerateRequest  # noqa: E402
from fp8slurm.engine.server import Engine, EngineSettings  # noqa: E402
from fp8slurm.models.kv_scales import engine_name, scale_entries  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402
from fp8slurm.sync.bucket import WeightBucket, layout, payload_bytes  # noqa: E402
from fp8slurm.sync.engine_link import EngineLink  # noqa: E402
from fp8slurm.sync.mapped import MappedTransport  # noqa: E402

PROMPT = 128
CHECKED = 8
"""Sequences of the checks of scales."""


class Probe:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.began = args, args.json, time.monotonic()
        args.work.mkdir(parents=True, exist_ok=True)
        self.fp8 = args.fp8 or args.work / f"{args.model}-FP8"
        if not self.fp8.is_dir():
            hf = args.work / args.model
            if not hf.is_dir():
                write_random_model(args.model, hf)
            hf_to_fp8(hf, self.fp8, verify=False)
        self.spec = ModelSpec.from_hf_dir(self.fp8)
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self.found: dict[str, Any] = {"model": args.model, "gpu": gpu, "torch": torch.__version__, "kv_gb": args.kv_gb}
        cell = 2 * self.spec.num_kv_heads * self.spec.head_dim * self.spec.num_layers
        self.room = {"bf16": int(args.kv_gb * 1e9 / (2 * cell)), "fp8": int(args.kv_gb * 1e9 / cell)}
        self.held = {name: max(1, n // (PROMPT + args.response)) for name, n in self.room.items()}
        self.engines: dict[str, Engine] = {}
        self.clients: dict[str, EngineClient] = {}
        self.link: EngineLink | None = None
        self.version = 0
        self.put("sequences held", self.held)

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.out.with_suffix(".tmp").write_text(json.dumps(self.found, indent=1))
        self.out.with_suffix(".tmp").rename(self.out)
        print(f"{time.monotonic() - self.began:.0f} s  {name}: {json.dumps(value)[:1500]}", flush=True)

    def start(self) -> None:
        for name, kv_cache in (("bf16", "auto"), ("fp8", "fp8")):
            extra = engine_arguments(sorted({1, CHECKED, *self.held.values()})) if torch.cuda.is_available() else []
            section = EngineSection(
                kv_cache=kv_cache, extra_args=extra, ready_timeout_s=200.0, mem_fraction=0.9,
                max_running_requests=max(CHECKED, self.held[name]), max_total_tokens=self.room[name],
                context_length=PROMPT + self.args.response + 16,
            )  # fmt: skip
            settings = EngineSettings(section, cpu_threads=1)
            self.engines[name] = Engine(self.fp8, self.out.parent, settings, f"engine-kv-{name}")
            self.engines[name].start()
        for name, engine in self.engines.items():
            engine.wait_ready()
            self.clients[name] = EngineClient(engine.url, engine.api_key, 600)
            info = self.clients[name].server_info()
            log = [line for line in engine.log_path.read_text().splitlines() if "KV Cache is allocated" in line]
            self.put(f"engine {name}", {
                "ready_s": time.monotonic() - self.began, "log": log[-1:],
                **{k: info.get(k) for k in ("kv_cache_dtype", "attention_backend", "max_total_num_tokens")},
            })  # fmt: skip

    def send(self, k: list[float], v: list[float]) -> None:
        """An update of the FP8 engine that brings nothing but scales."""
        self.version += 1
        if self.link is None:
            self.link = EngineLink(self.clients["fp8"], 1, MappedTransport() if torch.cuda.is_available() else None)
            self.link.open()
        entries = (e.tensors[0] for layer in range(self.spec.num_layers) for e in scale_entries(layer))
        names = [t.name for t in entries]
        (specs,) = layout([[(name, torch.float32, (1,))] for name in names], 2**20)
        with mappable() if torch.cuda.is_available() else nullcontext():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            payload = torch.empty(payload_bytes(specs), dtype=torch.uint8, device=device)
        bucket = WeightBucket(self.version, specs, payload)
        for i, (_, view) in enumerate(bucket.views()):
            view.fill_((k, v)[i % 2][i // 2])
        if payload.is_cuda:
            torch.cuda.synchronize()
        self.link.update(self.version, [bucket])

    def send_all(self, scale: float) -> None:
        self.send([scale] * self.spec.num_layers, [scale] * self.spec.num_layers)

    def tokens(self, n: int, length: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        low = min(300, self.spec.vocab_size // 2)
        return torch.randint(low, self.spec.vocab_size, (n, length), generator=generator).tolist()

    def scales(self) -> None:
        client, texts = self.clients["fp8"], self.tokens(CHECKED, PROMPT, 1)
        requests = [GenerateRequest(t, 32, temperature=0.0) for t in texts]
        rows: dict[str, Any] = {}
        first: torch.Tensor | None = None

        def score() -> torch.Tensor:
            client.flush_cache()
            return torch.tensor(client.score(texts))

        before = score()
        for label, scale in (
            ("1", 1.0),
            ("finer", 2.0**-5),
            ("coarse", 2.0**14),
            ("cut off", 2.0**-11),
            ("1 again", 1.0),
        ):
            self.send_all(scale)
            scored = score()
            first = scored if first is None else first
            done = client.generate(requests, one_batch=True)
            again = client.score([t + g.token_ids for t, g in zip(texts, done)])
            decoded = torch.tensor([g.logprobs for g in done])
            prefilled = torch.tensor([values[PROMPT - 1 :] for values in again])
            digests = client.digest()[0]
            name = engine_name(next(scale_entries(0)).tensors[0].name)
            rows[label] = {
                "scale": scale, "finite": bool(scored.isfinite().all()),
                "mean difference from 1": (scored - first).abs().mean().item(),
                "mean difference of decoding from prefill": (decoded - prefilled).abs().mean().item(),
                "digest of k_scale": digests[name][:12],
            }  # fmt: skip
            self.put("scales", rows | {"before any update, from 1": (before - first).abs().mean().item()})

    def positions(self) -> None:
        client, texts = self.clients["fp8"], self.tokens(2, PROMPT + self.args.response, 2)
        plain = torch.tensor(self.clients["bf16"].score(texts))
        self.clients["bf16"].flush_cache()
        at = torch.arange(plain.shape[1]).repeat(len(plain))
        rows = {}
        # random weights: keys behind the norm and values are normal with deviation 1, the largest about 5
        for label, scale in (("1", 1.0), ("2^-5, of a largest of 5", 2.0**-5), ("2^-12, cut off", 2.0**-12)):
            self.send_all(scale)
            scored = torch.tensor(client.score(texts))
            rows[label] = gap_by_position(gap_sums(scored.flatten(), plain.flatten(), at))
            self.put("positions", rows)
        self.send_all(2.0**-5)
        client.flush_cache()

    def speed(self) -> None:
        rows: dict[str, Any] = {}
        context = PROMPT + self.args.response // 2
        for name, client in self.clients.items():
            texts = self.tokens(self.held[name], context, 3)
            # prefill takes longer than all of the decoding: its keys stay in the cache for the rounds
            client.generate([GenerateRequest(t, 1, temperature=1.0) for t in texts], one_batch=True)
            rows[name] = {"sequences": self.held[name], "context": context, "tokens_per_s": []}
        for _ in range(3):
            for name, client in self.clients.items():
                texts = self.tokens(self.held[name], context, 3)
                requests = [GenerateRequest(t, self.args.tokens, temperature=1.0) for t in texts]
                start = time.perf_counter()
                done = client.generate(requests, one_batch=True)
                seconds = time.perf_counter() - start
                rows[name]["tokens_per_s"].append(sum(len(g.token_ids) for g in done) / seconds)
                self.put("speed", rows)
        medians = {name: statistics.median(row["tokens_per_s"]) for name, row in rows.items()}
        self.put("fp8 / bf16", medians["fp8"] / medians["bf16"])
        # as many sequences as BF16 holds: what the smaller cache alone gives
        texts = self.tokens(self.held["bf16"], context, 3)
        rates = []
        for _ in range(2):
            start = time.perf_counter()
            requests = [GenerateRequest(t, self.args.tokens, temperature=1.0) for t in texts]
            done = self.clients["fp8"].generate(requests, one_batch=True)
            rates.append(sum(len(g.token_ids) for g in done) / (time.perf_counter() - start))
        self.put("fp8, as many sequences as bf16", rates)

    def guarded(self, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception:
            self.put(f"error in {part.__name__}", traceback.format_exc()[-3000:])

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("json", type=Path)
    parser.add_argument("--model", default="Qwen3-4B")
    parser.add_argument("--fp8", type=Path)
    parser.add_argument("--kv-gb", type=float, default=36.0)
    parser.add_argument("--response", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256)
    probe = Probe(parser.parse_args())
    try:
        probe.guarded(probe.start)
        with alone("kv"):
            for part in (probe.scales, probe.speed, probe.positions):
                probe.guarded(part)
    finally:
        probe.stop()


if __name__ == "__main__":
    main()
