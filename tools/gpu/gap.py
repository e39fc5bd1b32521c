#!/usr/bin/env python3
"""The trainer-engine gap with real FP8 on one GPU: a model trained from scratch, then the same tokens through both.

    train     Megatron in BF16 from random weights on a synthetic language, until its distribution is sharp; -> HF -> FP8 HF
    sample    SGLang in FP8 and in BF16 samples from it and says the log-probability of every token
    compare   Megatron with TransformerEngine's FP8 and in BF16 says the log-probabilities of the same tokens

Every stage is a process of its own; one whose result lies in OUT already is not repeated. Without a GPU FP8 is emulated on both sides (for trying the script).
usage: gap.py OUT [--model tiny|Qwen3-0.6B|...] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu")]

# else SGLang compiles DeepGEMM for every batch of up to 16384 tokens before it answers, for 10 minutes and more
os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")

import torch  # noqa: E402
from random_model import write_random_model  # noqa: E402
from recipes import ENGINE as GPU_ENGINE  # noqa: E402

CUDA = torch.cuda.is_available()
SYMBOLS, BRANCHES = 200, 4
SEQUENCE = 256


def sentence(rng: random.Random, length: int) -> list[int]:
    """A Markov chain: after a symbol one of BRANCHES others follows, with probabilities 8:4:2:1."""
    ids = [rng.randrange(SYMBOLS)]
    while len(ids) < length:
        branch = rng.choices(range(BRANCHES), weights=(8, 4, 2, 1))[0]
        ids.append((ids[-1] * 7 + 17 * branch) % SYMBOLS)
    return ids


def trainer(model: Path, backend: str, tag: str) -> Any:
    """A single-rank trainer with the weights of `model`."""
    import torch.distributed as dist

    from fp8slurm.config import parse
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.trainer.start import start

    config = parse(None, ["--model.hf-checkpoint", str(model), "--fp8.backend", backend, "--optim.beta2", "0.95"])
    start(config, 0, 1, dist.FileStore(f"/tmp/gap_store_{os.getpid()}_{tag}", 1))
    from fp8slurm.trainer.trainer import Trainer

    made = Trainer(config, ModelSpec.from_hf_dir(model))
    made.load_hf(model)
    return made


def export(t: Any, source: Path, folder: Path) -> None:
    """The trainer's weights as a Hugging Face folder (one rank holds everything)."""
    from safetensors.torch import save_file

    tensors = {}
    for name, shard in t.named_shards():
        entry = t.table[name]
        for part, tensor in zip(entry.split(shard, 0, 1), entry.tensors, strict=True):
            tensors[tensor.name] = part.data.to(torch.bfloat16).contiguous().cpu().clone()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())


def packed(pairs: list[tuple[list[int], list[int]]], t: Any, budget: int) -> list[Any]:
    from fp8slurm.data.prompts import SftExample
    from fp8slurm.rl.packing import pack_sft

    examples = [SftExample(tuple(p), tuple(r)) for p, r in pairs]
    return pack_sft(examples, data_parallel_size=1, tokens_per_micro_batch=budget, pad_multiple=t.pad_multiple)[0]


def train(out: Path, model: str, steps: int) -> None:
    from fp8slurm.checkpoint import hf_to_fp8
    from fp8slurm.rl.loss import sft_loss
    from fp8slurm.rl.schedule import learning_rate

    write_random_model(model, out / "random")
    t = trainer(out / "random", "off", "train")
    rng = random.Random(0)
    began = time.time()
    for step in range(steps):
        pairs = [(s[:2], s[2:]) for s in (sentence(rng, SEQUENCE) for _ in range(64 if CUDA else 8))]
        lr = learning_rate(step, steps, 1e-3, 1e-5, 20, "cosine")
        result = t.train_step(packed(pairs, t, 16384), sft_loss, lr)
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            print(f"  step {step}: loss {result.loss:.3f} ({time.time() - began:.0f} s)", flush=True)
    entropy = -sum(w / 15 * math.log(w / 15) for w in (8, 4, 2, 1))
    print(f"  the language's entropy is {entropy:.3f} nats a token", flush=True)
    export(t, out / "random", out / "hf")
    if not (out / "fp8").exists():
        hf_to_fp8(out / "hf", out / "fp8")


def sample(out: Path, precision: str) -> None:
    from fp8slurm.config.schema import EngineSection
    from fp8slurm.engine.client import EngineClient, GenerateRequest
    from fp8slurm.engine.server import Engine, EngineSettings

    section = EngineSection(
        mem_fraction=0.8, max_total_tokens=65536, max_running_requests=64, extra_args=GPU_ENGINE if CUDA else []
    )
    engine = Engine(out / ("fp8" if precision == "fp8" else "hf"), out / "logs", EngineSettings(section), precision)
    began = time.time()
    engine.start()
    try:
        engine.wait_ready()
        print(f"  engine ({precision}) ready after {time.time() - began:.0f} s", flush=True)
        client = EngineClient(engine.url, engine.api_key, 600)
        rng = random.Random(1)
        prompts = [sentence(rng, 8) for _ in range(64)]
        requests = [GenerateRequest(tuple(p), 192, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
        answers = client.generate(requests, one_batch=True)
        client.resume() if hasattr(client, "resume") else None
        rows = [{"prompt": p, "ids": a.token_ids, "logprobs": a.logprobs} for p, a in zip(prompts, answers)]
        (out / f"samples_{precision}.json").write_text(json.dumps(rows))
        print(f"  {sum(len(a.token_ids) for a in answers)} tokens sampled", flush=True)
    finally:
        engine.stop()


def compare(out: Path, backend: str) -> None:
    t = trainer(out / "hf", backend, backend)
    found = {}
    for precision in ("fp8", "bf16"):
        path = out / f"samples_{precision}.json"
        if not path.exists():
            continue
        rows = [r for r in json.loads(path.read_text()) if r["ids"]]
        deltas = []
        for start in range(0, len(rows), 16):  # in order, so that the labels below line up
            group = rows[start : start + 16]
            batches = [packed([(r["prompt"], r["ids"])], t, 16384)[0] for r in group]
            for batch, got, row in zip(batches, t.logprobs(batches), group):
                mine = got.cpu()[batch.loss_mask.cpu()]
                deltas.append((mine - torch.tensor(row["logprobs"])).double())
        d = torch.cat(deltas)
        found[precision] = {
            "tokens": d.numel(), "mean_abs": d.abs().mean().item(), "p99_abs": d.abs().quantile(0.99).item(),
            "max_abs": d.abs().max().item(), "k3": (d.exp() - 1 - d).mean().item(), "mean": d.mean().item(),
        }  # fmt: skip
        print(f"  trainer {backend}, engine {precision}: {json.dumps(found[precision])}", flush=True)
    if backend == "transformer_engine":
        found["weights"] = compare_weights(t, out / "fp8")
        print(f"  weights as TransformerEngine's modules quantize them: {json.dumps(found['weights'])}", flush=True)
    (out / f"gap_{backend}.json").write_text(json.dumps(found))


def compare_weights(t: Any, folder: Path) -> dict[str, int]:
    """Codes and scales that the trainer's linear modules multiply with, against those that the engine loads, in bytes."""
    from safetensors import safe_open

    same = different = 0
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        for prefix, module in t.module.named_modules():
            if not hasattr(module, "quantizers") or not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
                continue
            if not module.quantizers.get("scaling_fwd"):
                continue
            held = module.quantizers["scaling_fwd"][1](module.weight.detach())
            n, k = module.weight.shape
            codes = held._rowwise_data.view(torch.uint8).reshape(n, k)
            scales = held._rowwise_scale_inv[: -(-n // 128), : -(-k // 128)]
            scales = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]  # one for every code
            entry = t.table[t.table.canonical(f"{prefix}.weight", 0, 0)]
            for part, part_scales, tensor in zip(
                entry.split(codes, 0, 1), entry.split(scales, 0, 1), entry.tensors, strict=True
            ):
                ours = file.get_tensor(tensor.name)
                our_scales = file.get_tensor(tensor.name + "_scale_inv")
                equal = torch.equal(part.data.cpu(), ours.view(torch.uint8)) and torch.equal(
                    part_scales.data[::128, ::128].cpu(), our_scales
                )
                same, different = same + equal, different + (not equal)
    return {"matrices_equal": same, "matrices_different": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    fp8 = "transformer_engine" if CUDA else "emulated"
    stages = {
        "train": lambda: train(args.out, args.model, args.steps),
        "sample-fp8": lambda: sample(args.out, "fp8"),
        "sample-bf16": lambda: sample(args.out, "bf16"),
        "compare-fp8": lambda: compare(args.out, fp8),
        "compare-bf16": lambda: compare(args.out, "off"),
    }
    if args.stage:
        stages[args.stage]()
        return
    results = {"train": "fp8", "sample-fp8": "samples_fp8.json", "sample-bf16": "samples_bf16.json",
               "compare-fp8": f"gap_{fp8}.json", "compare-bf16": "gap_off.json"}  # fmt: skip
    for stages_now in (["train"], ["sample-fp8", "sample-bf16"], ["compare-fp8", "compare-bf16"]):
        together = [stage for stage in stages_now if not (args.out / results[stage]).exists()]
        if not together:
            continue
        print(f"== {' and '.join(together)}", flush=True)
        began = time.time()
        again = [sys.executable, __file__, str(args.out), "--model", args.model, "--steps", str(args.steps)]
        running = [subprocess.Popen([*again, "--stage", stage]) for stage in together]
        codes = [process.wait() for process in running]
        print(f"   exit {codes}, {time.time() - began:.0f} s", flush=True)
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    main()
