"""`fp8slurm eval --run RUN`: newest checkpoint -> HF BF16 -> HF FP8 -> SGLang in FP8 -> accuracy."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from fp8slurm.checkpoint.run import RunDirectory, RunState, write_atomic
from fp8slurm.config import RunConfig
from fp8slurm.config.load import build


def main(argv: list[str]) -> int:
    """Exit status 0; bad input is a ValueError that names it."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm eval", description="Accuracy of a run's checkpoint on its held-out prompts."
    )
    parser.add_argument("--run", type=Path, required=True, help="run directory, such as runs/tiny-fp8")
    parser.add_argument(
        "--checkpoint", help="a checkpoint's name, such as step_000080 (default: the newest complete one)"
    )
    parser.add_argument("--precision", choices=("fp8", "bf16"), default="fp8", help="precision of the engine")
    parser.add_argument("--data", type=Path, help="JSONL or parquet with other held-out prompts than the run's")
    args = parser.parse_args(argv)
    saved = args.run / "config.json"
    if not saved.is_file():
        raise ValueError(f"--run {args.run}: no config.json there; give the directory of a run (runs/NAME)")
    config = build(json.loads(saved.read_text()), str(saved))
    data = args.data or config.data.eval
    if data is None:
        raise ValueError("the run has no held-out prompts: give them with --data")
    folder, state = pick_checkpoint(RunDirectory(args.run), args.checkpoint)
    out = args.run / "eval" / folder.name
    model = prepare(config, folder, out, args.precision)
    result = evaluate(config, model, data, out / args.precision) | {
        "checkpoint": str(folder), "step": state.step, "precision": args.precision, "data": str(data),
    }  # fmt: skip
    write_atomic(out / args.precision / "summary.json", json.dumps(result, indent=1))
    show(result, out / args.precision)
    return 0


def pick_checkpoint(run: RunDirectory, name: str | None) -> tuple[Path, RunState]:
    """The named checkpoint, or the newest complete one. Raises ValueError."""
    seen = []
    for folder, damage in run.checked_checkpoints():
        if name is not None and folder.name != name:
            seen.append(folder.name)
            continue
        if damage is None:
            return folder, RunState.read(folder)
        print(f"checkpoint {folder} is skipped: {damage}", file=sys.stderr)
    if name is not None:
        raise ValueError(
            f"--checkpoint {name}: no usable one of that name in {run.checkpoints}; there are: {', '.join(seen) or 'none'}"
        )
    raise ValueError(f"{run.checkpoints} has no usable checkpoint")


def prepare(config: RunConfig, checkpoint: Path, out: Path, precision: str) -> Path:
    """The folder that the engine loads; conversions that are there already are kept."""
    from fp8slurm.checkpoint import hf_to_fp8, torch_dist_to_hf

    assert config.model.hf_checkpoint is not None
    hf = out / "hf"
    if not hf.exists():
        torch_dist_to_hf(checkpoint, hf, origin_hf_dir=config.model.hf_checkpoint)
    if precision == "bf16":
        return hf
    fp8 = out / "hf_fp8"
    if not fp8.exists():
        hf_to_fp8(hf, fp8)
    return fp8


def evaluate(config: RunConfig, model: Path, data: Path, out: Path) -> dict:
    """Greedy accuracy of a Hugging Face folder in SGLang; every answer goes to out/samples.jsonl."""
    from fp8slurm.engine.client import EngineClient
    from fp8slurm.engine.server import Engine
    from fp8slurm.rl.agent import engine_settings
    from fp8slurm.rl.rewards import RewardPool
    from fp8slurm.rl.rollout import Sampler, correct

    out.mkdir(parents=True, exist_ok=True)
    sampler = Sampler.load(config)
    prompts = sampler.prompts(data)
    engine = Engine(model, out, engine_settings(config))
    engine.start()
    try:
        engine.wait_ready()
        client = EngineClient(engine.url, engine.api_key, config.engine.request_timeout_s)
        start = time.perf_counter()
        groups = sampler.greedy(
            lambda requests: client.generate(requests, one_batch=config.run.deterministic), list(enumerate(prompts))
        )
        seconds = time.perf_counter() - start
    finally:
        engine.stop()
    with RewardPool(config.reward) as rewards:
        right = correct(groups, rewards)
    with open(out / "samples.jsonl", "w") as f:
        for group, ok in zip(groups, right):
            s = group.samples[0]
            row = {
                "index": group.prompt.index,
                "label": group.prompt.label,
                "response": s.text,
                "correct": ok,
                "finish_reason": s.finish_reason,
            }
            f.write(json.dumps(row) + "\n")
    tokens = sum(len(g.samples[0].response_ids) for g in groups)
    return {
        "accuracy": sum(right) / len(right), "correct": sum(right), "questions": len(right),
        "truncated": sum(g.samples[0].finish_reason == "length" for g in groups),
        "response_tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds,
    }  # fmt: skip


def show(result: dict, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['checkpoint']} in {result['precision'].upper()}")
    for column in ("questions", "correct", "accuracy", "truncated", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_row(
        str(result["questions"]),
        str(result["correct"]),
        f"{result['accuracy']:.4f}",
        str(result["truncated"]),
        f"{result['tokens_per_second']:.0f}",
    )
    Console().print(table)
    print(f"{out / 'summary.json'}  {out / 'samples.jsonl'}")
