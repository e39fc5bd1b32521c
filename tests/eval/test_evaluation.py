"""Evaluations with real engines: in the loop of a short run, from the command line, interrupted, in both precisions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_model
from tiny_task import write_data

from fp8slurm.cli import main
from fp8slurm.engine.client import EngineClient
from fp8slurm.eval import engines as engines_module
from fp8slurm.observe.metrics import read_metrics, without_times

pytestmark = pytest.mark.slow

TIMEOUT = 400


def rows_in(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def fp8slurm(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "fp8slurm.cli", *map(str, arguments)], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their evaluations only: after every step with a further task, and at the ends without."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    held_out = (folder / "data" / "eval.jsonl").read_text().splitlines()
    (folder / "data" / "eval.jsonl").write_text("\n".join(held_out[:64]) + "\n")
    (folder / "data" / "more.jsonl").write_text("\n".join(held_out[64:96]) + "\n")
    flags = {
        "run.root": folder / "runs",
        "run.steps": 2,
        "model.hf-checkpoint": folder / "model",
        "data.train": folder / "data" / "train.jsonl",
        "data.eval": folder / "data" / "eval.jsonl",
        "sft.data": folder / "data" / "sft.jsonl",
        "sft.max-steps": 20,
        "sft.batch-size": 64,
        "sft.eval-every": 0,
        "rollout.prompts-per-step": 6,
        "rollout.n-samples": 8,
        "checkpoint.every": 5,
        "slurm.ranks-per-node": 1,
        "observe.plot": False,
        "observe.tensorboard": False,
        "eval.n-samples": 2,
        "eval.temperature": 0.5,
    }
    for name, more in {
        "often": ["--eval.every=1", "--eval.tasks", str(folder / "data" / "more.jsonl")],
        "seldom": ["--eval.every=0"],
    }.items():
        values = [
            f"--{'no-' if v is False else ''}{k}" if isinstance(v, bool) else f"--{k}={v}" for k, v in flags.items()
        ]
        values = [v.replace("--no-observe.", "--observe.no-") for v in values]
        fp8slurm("train", "--recipe", "tiny-fp8", *values, f"--run.name={name}", *more)
    return folder / "runs"


def test_evaluation_does_not_disturb_the_run(runs):
    """Everything but the evaluations is the same to the last bit, and each evaluation has left its files."""
    often, seldom = (read_metrics(runs / name) for name in ("often", "seldom"))
    plain = [
        [{k: v for k, v in without_times(r).items() if not k.startswith("eval/")} for r in some]
        for some in (often, seldom)
    ]
    assert plain[0] == plain[1] and len(often) == 23
    evaluated = [r for r in often if r["phase"] == "rl"]
    assert all(
        {"eval/accuracy", "eval/pass_at_n", "eval/more/accuracy", "eval/more/pass_at_n", "eval/more/response_length"}
        <= r.keys()
        for r in evaluated
    )
    assert {r["step"] for r in seldom if "eval/accuracy" in r} == {0, 2}
    assert [r["eval/accuracy"] for r in seldom if "eval/accuracy" in r] == [
        often[20]["eval/accuracy"],
        often[22]["eval/accuracy"],
    ]
    for record in evaluated:
        folder = runs / "often" / "eval" / f"step_{record['step']:06d}-fp8-training"
        found, rows = summary_of(folder), rows_in(folder)
        assert (found["made_by"], found["step"], len(rows)) == ("training", record["step"], 2 * (64 + 32))
        assert found["tasks"]["more"]["accuracy"]["value"] == record["eval/more/accuracy"]
        assert found["tasks"]["held_out"]["pass_at_k"]["2"]["value"] == record["eval/pass_at_n"]


@pytest.fixture(scope="module")
def compared(runs):
    """The run's checkpoint, in both precisions, from the command line."""
    out = fp8slurm(
        "eval", "--run", runs / "often", "--precision", "both", "--fail-if-worse", "0.5", "--score-questions", "16"
    )
    return runs / "often" / "eval", out


def test_both_precisions_of_a_run(runs, compared):
    """Sampled answers of the checkpoint in FP8 are those of the loop's last evaluation; the gap is measured."""
    folder, out = compared
    fp8, bf16, looped = (folder / f"step_000002-{name}" for name in ("fp8", "bf16", "fp8-training"))
    answers = [
        {(r["task"], r["id"], r["sample"]): (r["response"], r["correct"]) for r in rows_in(f)}
        for f in (fp8, looped, bf16)
    ]
    assert answers[0] == answers[1] and answers[0].keys() == answers[2].keys() and len(answers[0]) == 192
    for task in ("held_out", "more"):
        loop_entry = summary_of(looped)["tasks"][task]
        assert {k: v for k, v in summary_of(fp8)["tasks"][task].items() if k != "data"} == {
            k: v for k, v in loop_entry.items() if k != "data"
        }
    found = json.loads((folder / "compare-step_000002" / "compare.json").read_text())
    assert (
        found["precision"] == ["fp8", "bf16"] and set(found["tasks"]) == {"held_out", "more"} and found["worse"] == []
    )
    assert (
        0 < found["logprob_gap"]["mean_abs"] < 0.5
        and found["logprob_gap"]["tokens"] > 32
        and found["speed_ratio"] is None
    )
    assert "step of a run" in out and "not significantly worse" in out and "tokens/s" in out
    row = rows_in(fp8)[0]
    assert (
        row["prompt"].endswith("<|im_start|>assistant\n")
        and row["finish_reason"] in ("stop", "length")
        and row["response_ids"]
    )


def test_what_is_there_is_used_again(compared, runs):
    """The same command asks nothing, starts no engine and converts nothing."""
    folder, _ = compared
    before = {p: p.stat().st_mtime_ns for p in (folder / "step_000002-fp8").iterdir()}
    out = fp8slurm("eval", "--run", runs / "often", "--precision", "both", "--score-questions", "16")
    assert "converted earlier" in out and "FP8 against BF16" in out
    after = {p: p.stat().st_mtime_ns for p in (folder / "step_000002-fp8").iterdir()}
    unchanged = {p for p in before if p.name in ("samples.jsonl", "summary.json", "scored.jsonl", "engine-0.log")}
    assert len(unchanged) == 4 and all(before[p] == after[p] for p in unchanged)


def own_task(compared, path):
    """Questions whose right answers are the BF16 engine's: what any change of the weights spoils."""
    folder, _ = compared
    rows = [r for r in rows_in(folder / "step_000002-bf16") if r["sample"] == 0 and r["response"].strip()]
    path.write_text("".join(json.dumps({"prompt": r["prompt"], "label": r["response"].strip()}) + "\n" for r in rows))
    return len(rows)


def test_a_damaged_fp8_checkpoint_ends_with_status_three(compared, tmp_path):
    """The BF16 folder's own greedy answers are the labels; zeroed attention outputs of the FP8 folder spoil them."""
    folder, _ = compared
    bf16, fp8 = (folder / "models" / f"step_000002-{p}" for p in ("bf16", "fp8"))
    questions = own_task(compared, tmp_path / "q.jsonl")
    common = [
        "--checkpoint",
        bf16,
        "--eval-dir",
        tmp_path / "eval",
        "--grader",
        "exact",
        "--max-tokens",
        8,
        "--engine.max-running-requests",
        128,
    ]
    common += ["--engine.context-length", 128, "--engine.mem-fraction", 0.3, "--precision", "both"]
    fp8slurm("eval", *common, "--tasks", tmp_path / "q.jsonl", "--limit", 40, "--precision", "bf16")
    greedy = {r["prompt"]: r["response"].strip() for r in rows_in(tmp_path / "eval" / "step_000002-bf16-bf16")}
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "label": a}) + "\n" for p, a in greedy.items() if a)
    )
    assert questions > 40 and sum(map(bool, greedy.values())) > 30
    damaged = tmp_path / "damaged"
    shutil.copytree(fp8, damaged)
    tensors = load_file(damaged / "model.safetensors")
    for name in [n for n in tensors if n.endswith("o_proj.weight_scale_inv")]:  # no token sees another one
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    own = ["--tasks", tmp_path / "own.jsonl", "--fail-if-worse", "0.1", "--fp8-checkpoint"]
    out = fp8slurm("eval", *common, *own, damaged, status=3)
    assert "FP8 is worse on own, by more than 10 points" in out
    gaps = {}
    for path in (tmp_path / "eval").glob("compare-*/compare.json"):
        found = json.loads(path.read_text())
        gaps[path.parent.name] = found["logprob_gap"]["mean_abs"]
        assert found["tasks"]["own"]["b"] > 0.9 and found["tasks"]["own"]["difference"]["high"] < -0.1
        assert len(found["tasks"]["own"]["lost"]) > 10 and found["worse"] == ["own"]
    assert len(gaps) == 1 and max(gaps.values()) > 0.05


def test_killed_and_resumed_and_the_engine_killed_too(compared, tmp_path, monkeypatch, capsys):
    """Kill -9 in the middle; what goes on asks for what is missing, once, although its engine is killed under it."""
    folder, _ = compared
    fp8 = folder / "models" / "step_000002-fp8"
    own_task(compared, tmp_path / "q.jsonl")
    arguments = [
        "eval",
        "--checkpoint",
        fp8,
        "--eval-dir",
        tmp_path,
        "--tasks",
        tmp_path / "q.jsonl",
        "--grader",
        "exact",
        "--n-samples",
        3,
        "--temperature",
        1,
        "--max-tokens",
        8,
        "--batch-size",
        2,
        "--engine.max-running-requests",
        2,
        "--engine.context-length",
        128,
        "--engine.mem-fraction",
        0.3,
    ]
    arguments = [str(a) for a in arguments]
    results = tmp_path / "step_000002-fp8-fp8"
    process = subprocess.Popen(
        [sys.executable, "-m", "fp8slurm.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + TIMEOUT
    samples = results / "samples.jsonl"
    while not (samples.is_file() and samples.read_bytes().count(b"\n") >= 12):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = samples.read_bytes()
    first = first[: first.rfind(b"\n") + 1]
    there = first.count(b"\n")
    assert not (results / "summary.json").exists()

    answered, killed, servers = [], [], []
    generate = EngineClient.generate

    class Engine(engines_module.Engine):
        def start(self):
            servers.append(self)
            super().start()

    def counting(self, requests, one_batch=False):
        if len(answered) == 5 and not killed:
            killed.append(servers[-1]._process.pid)
            os.kill(killed[0], signal.SIGKILL)
        done = generate(self, requests, one_batch)
        if all(r.max_tokens > 1 for r in requests):  # not the warm-up
            answered.append([r.seed for r in requests])
        return done

    monkeypatch.setattr(engines_module, "Engine", Engine)
    monkeypatch.setattr(EngineClient, "generate", counting)
    assert main(arguments) == 0
    rows, summary = rows_in(results), summary_of(results)
    total = 3 * summary["tasks"]["q"]["questions"]
    assert f"going on, {there} of {total} samples are there" in capsys.readouterr().out
    answered_seeds = [seed for seeds in answered for seed in seeds]
    assert len(answered_seeds) == len(set(answered_seeds)) == total - there, "a sample was answered twice"
    assert len({(r["id"], r["sample"]) for r in rows}) == len(rows) == total
    kept = {json.dumps([r["id"], r["sample"], r["response_ids"]]) for r in map(json.loads, first.splitlines())}
    assert kept == {json.dumps([r["id"], r["sample"], r["response_ids"]]) for r in rows if r["attempt"] == 0}
    assert summary["engine_restarts"] == 1 and len(killed) == 1 and {r["attempt"] for r in rows} == {0, 1}
    assert not (results / "owner.json").exists()


def test_two_engines_share_a_torch_dist_checkpoint(compared, runs, tmp_path):
    """Any form gives the same greedy answers: torch_dist with its origin, and the Hugging Face folder made from it."""
    folder, _ = compared
    shutil.copytree(
        runs / "often" / "checkpoints" / "step_000002",
        tmp_path / "dist",
        ignore=shutil.ignore_patterns("state.json", "COMPLETE"),
    )
    common = [
        "--tasks",
        runs.parent / "data" / "more.jsonl",
        "--grader",
        "exact",
        "--max-tokens",
        8,
        "--engine.context-length",
        128,
        "--eval-dir",
        tmp_path,
    ]
    common += ["--engine.mem-fraction", 0.3, "--engine.max-running-requests", 16]
    out = fp8slurm(
        "eval", "--checkpoint", tmp_path / "dist", "--origin-hf-dir", runs.parent / "model", "--engines", 2, *common
    )
    assert "torch_dist (config and tokenizer:" in out and "2 engines" in out
    fp8slurm("eval", "--checkpoint", folder / "models" / "step_000002-fp8", *common)
    dist, hf = (rows_in(tmp_path / f"{name}-fp8") for name in ("dist", "step_000002-fp8"))
    assert [(r["id"], r["response_ids"]) for r in dist] == [(r["id"], r["response_ids"]) for r in hf] and len(hf) == 32
    assert list(Path(tmp_path / "dist-fp8").glob("engine-1.log"))
