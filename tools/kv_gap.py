#!/usr/bin/env python3
"""The gap between trainer and engine by position in the response, with an FP8 KV cache and without; no GPU needed.

usage: kv_gap.py WORK [--tokens 512] [--json FILE]

The tiny model with random weights, FP8 on both sides, one RL step of 64 responses (an end token comes by chance) for every
setting. And the same again of the same function with values 1/256 as large: v_proj is divided by 256, o_proj multiplied.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import write_model  # noqa: E402
from tiny_task import write_data  # noqa: E402

from fp8slurm.observe.metrics import read_metrics  # noqa: E402

SETTINGS = {
    "auto": [],
    "fp8, unit": ["--engine.kv-cache", "fp8", "--engine.kv-scales", "unit"],
    "fp8, calibrated": ["--engine.kv-cache", "fp8"],
    "fp8, unit, quantize_kv": ["--engine.kv-cache", "fp8", "--engine.kv-scales", "unit", "--train.quantize-kv"],
    "fp8, calibrated, quantize_kv": ["--engine.kv-cache", "fp8", "--train.quantize-kv"],
}
SMALL = 256


def make_models(work: Path) -> dict[str, Path]:
    """ "as it is" and "small values": two folders with the same function."""
    plain, small = work / "model", work / "model-small-values"
    if not small.is_dir():
        plain.mkdir(parents=True)
        write_model(plain)
        shutil.copytree(plain, small)
        tensors = load_file(plain / "model.safetensors")
        for name in tensors:
            if "v_proj" in name or "o_proj" in name:
                tensors[name] = tensors[name] * (1 / SMALL if "v_proj" in name else SMALL)
        save_file(tensors, small / "model.safetensors", metadata={"format": "pt"})
    return {"as it is": plain, "small values": small}


def measure(work: Path, model: Path, name: str, flags: list[str], tokens: int) -> dict[str, float]:
    """gap/* and gap_position/* of a run's first step."""
    data = work / "data"
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    settings = {
        "run.name": name, "run.root": work / "runs", "run.steps": 1, "model.hf-checkpoint": model, "sft.max-steps": 0,
        "data.train": data / "train.jsonl", "rollout.prompts-per-step": 8, "rollout.n-samples": 8,
        "rollout.max-tokens": tokens, "rollout.truncated": "keep", "engine.max-total-tokens": 64 * (tokens + 64),
        "engine.context-length": tokens + 64, "train.updates-per-step": 1, "slurm.ranks-per-node": 1, "eval.every": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", "tiny-fp8"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    command += ["--sft.data=None", "--data.eval=None", "--rollout.no-drop-no-signal", "--observe.no-plot", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    record = next(r for r in read_metrics(work / "runs" / name) if r["phase"] == "rl" and r["step"] == 1)
    return {k: v for k, v in record.items() if k.startswith(("gap", "kv_cache"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = make_models(args.work)
    if not (args.work / "data").is_dir():
        (args.work / "data").mkdir()
        write_data(args.work / "data")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for label, model in models.items():
        for number, (setting, flags) in enumerate(SETTINGS.items()):
            name = f"{label.replace(' ', '-')}-{number}"
            rows = found.setdefault(label, {})[setting] = measure(args.work, model, name, flags, args.tokens)
            cells = [f"{v:.2e}" for k, v in rows.items() if k.startswith("gap_position/") or k == "gap/mean_abs"]
            print(f"| {label} | {setting} | {' | '.join(cells)} |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
