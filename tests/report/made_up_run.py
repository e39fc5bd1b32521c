"""Runs made up for the report: every file of a real one, small."""

import json
import math
import random
from pathlib import Path

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://198.51.100.1/x onerror=alert(1)> & "
    "<b>\x1b[31m\x00\u202eevil\u202c \u2028 `|` ]]> <!-- \ud800"
)


def record(step, phase="rl", **more):
    rng = random.Random(f"{phase}/{step}")
    row = {"phase": phase, "step": step, "lr": 1e-4, "loss": rng.gauss(0, 0.01), "grad_norm": 1 + rng.random(),
    "time/train": 1.0,
           "time/step": 3.5 + rng.random()}  # fmt: skip
    if phase == "rl":
        row |= {
            "reward/mean": 0.3 + 0.4 * (1 - math.exp(-step / 500)) + rng.gauss(0, 0.02),
            "gap/mean_abs": 3e-3 * math.exp(rng.gauss(0, 0.1)),
            "gap/p99": 3e-2, "gap/max": 0.1, "gap/k1": 1e-6, "gap/k3": 3e-5, "entropy": 1.0, "ratio/clipped_low": 0.002,
            "ratio/clipped_high": 0.001, "rollout/response_length": 200 + rng.random(), "rollout/truncated": 0.0,
            "skipped": 0.0,
            "throughput/tokens_per_s": 2000.0, "time/rollout": 1.5, "time/logprobs": 0.4, "time/sync": 0.05,
        }  # fmt: skip
        if step % 10 == 0:
            row |= {"eval/accuracy": 0.4 + 0.4 * (1 - math.exp(-step / 500)), "time/eval": 1.0}
    return row | more


def sample(index, response="979", tokens=(24, 22, 24), reward=0.5, prompt="993|657=", label="997"):
    return {"index": index, "prompt": prompt, "label": label, "response": response, "reward": reward,
    "finish_reason": "stop",
            "tokens": list(tokens), "logprobs": [-0.5 - i / 8 for i in range(len(tokens))]}  # fmt: skip


def write_lines(path: Path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_json(path: Path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(path: Path, steps=20, sft=8, hostile=False, samples=6, name_of_model="models/tiny") -> Path:
    """A run with two attempts, evaluations, a comparison and saved rollouts with gaps."""
    from fp8slurm.config import read_recipe

    text = HOSTILE if hostile else "993|657="
    config = read_recipe("tiny-fp8").model_dump(mode="json")
    config["run"] |= {"name": path.name, "steps": steps}
    config["model"]["hf_checkpoint"] = HOSTILE if hostile else name_of_model
    write_json(path / "config.json", config)
    write_lines(
        path / "metrics.jsonl",
        [record(s, "sft", **{"loss/sft": 3 / s}) for s in range(1, sft + 1)] + [record(s) for s in range(steps + 1)],
    )
    packages = {"fp8slurm": "0.1.0", "torch": text}
    for n in (0, 1):
        folder = path / "attempts" / str(n)
        write_json(
            folder / "versions.json", {"command": ["fp8slurm", "train", text], "packages": packages, "changed": []}
        )
        write_json(folder / "tasks" / "0.json", {"host": "elsewhere", "pid": 1, "start": "1"})
    (path / "attempts/1/tasks/0.done").touch()
    write_json(
        path / "attempts/0/errors/task_0.json",
        {"time": 1.0, "task": 0, "primary": True, "text": f"Traceback\n  x\nKeyError: {text}"},
    )
    events = [
        ("skipped", "checkpoint step_000010 was skipped: a.bin was altered (SHA-256)"),
        ("continued", "step_000005"),
    ]
    write_lines(path / "attempts/1/events/task_0.jsonl", [{"time": 1.0, "kind": k, "text": t} for k, t in events])
    restart = {"time": 2.0, "kind": "engine restart", "text": "engine 0 failed (it died); restart 1"}
    write_lines(path / "attempts/1/events/task_2.jsonl", [restart])
    estimate = {"value": 0.85, "low": 0.82, "high": 0.88}
    for precision in ("fp8", "bf16"):
        write_json(path / f"eval/step_000010-{precision}/summary.json", {
            "format": 1, "checkpoint": text, "step": 10, "precision": precision, "made_by": "eval",
            "tokens_per_second": 1250.0,
            "tasks": {text: {"accuracy": estimate, "pass_at_k": {"1": estimate, "2": estimate}, "questions": 500,
            "samples": 1000,
                             "response_tokens": {"mean": 4.0}, "truncated": 0.01}},
        })  # fmt: skip
    write_json(path / "eval/compare-step_000010/compare.json", {
        "format": 1, "precision": ["fp8", "bf16"], "checkpoint": "step_000010", "speed_ratio": 1.02,
        "logprob_gap": {"mean_abs": 0.004},
        "tasks": {text: {"a": 0.85, "b": 0.854, "difference": {"value": -0.004, "low": -0.014, "high": 0.006},
        "questions": 500, "lost": ["1"], "won": []}},
    })  # fmt: skip
    for step in range(10, steps + 1, 10):
        rows = [sample(i, text, prompt=text, label=text, reward=i / 4) for i in range(samples)]
        write_lines(path / f"rollouts/step_{step:06d}.jsonl", rows)
        gaps = [
            {"index": i, "trainer_logprobs": [-0.5 - j / 8 + 0.05 * (i + 1) * (-1) ** j for j in range(3)]}
            for i in range(samples)
        ]
        write_lines(path / f"rollouts/trainer/step_{step:06d}.jsonl", gaps)
    return path
