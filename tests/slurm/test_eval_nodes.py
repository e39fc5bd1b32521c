"""One evaluation on the two nodes of a real Slurm: the same answers as on one node, killed and resumed, and refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.slurm]
TIMEOUT_S = 600.0
QUESTIONS = 96


class Evaluation:
    """The tiny model with random weights in FP8, its greedy answers to some of the training prompts."""

    def __init__(self, lab, runs, folder: Path) -> None:
        self.lab, self.folder, self.results = lab, folder, folder / "model-fp8"
        flags = {
            "checkpoint": runs.folder / "model", "tasks": runs.folder / "data" / "train.jsonl", "grader": "exact",
            "limit": QUESTIONS, "max-tokens": 24, "batch-size": 2, "eval-dir": folder, "engine.context-length": 128,
            "engine.max-running-requests": 2, "engine.mem-fraction": 0.3,
        }  # fmt: skip
        self.flags = [f"--{k}={v}" for k, v in flags.items()]
        self.nodes = ["--nodes=2", "--srun=--cpus-per-task=1", "--srun=--time=20"]

    def start(self, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fp8slurm.cli", "eval", *self.flags, *more]
        return subprocess.Popen(
            command,
            env=self.lab.environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *more: str) -> str:
        process = self.start(*more)
        out, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, out
        return out

    def summary(self) -> dict:
        return json.loads((self.results / "summary.json").read_text())

    def rows(self, file: str = "samples.jsonl") -> list[dict]:
        text = (self.results / file).read_text() if (self.results / file).is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def answers(self) -> list:
        return [(r["id"], r["sample"], r["response_ids"], r["finish_reason"], r["correct"]) for r in self.rows()]


@pytest.fixture(scope="module")
def one_node(start_lab, runs, tmp_path_factory):
    found = Evaluation(start_lab("linuxproc"), runs, tmp_path_factory.mktemp("one"))
    found.run()
    return found


def test_two_nodes_give_the_answers_of_one(one_node, runs, tmp_path):
    two = Evaluation(one_node.lab, runs, tmp_path)
    out = two.run(*two.nodes)
    assert two.answers() == one_node.answers() and len(two.answers()) == QUESTIONS
    assert two.summary()["tasks"] == one_node.summary()["tasks"]
    counts = [[s[k] for k in ("nodes", "engines", "engine_restarts")] for s in (two.summary(), one_node.summary())]
    assert counts == [[2, 2, 0], [1, 1, 0]]
    assert {r.get("node", 0) for r in two.rows()} == {0, 1}, "both nodes have answered"
    assert out.count("Hugging Face") == 1 and "2 engines" in out, out
    left = {p.name for p in two.results.iterdir()}
    assert left == {"engine-0.log", "node-1", "samples.jsonl", "settings.json", "summary.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"model-fp8", "models"}
    two.lab.wait_empty()


def test_a_killed_node_ends_the_step_and_one_node_goes_on(one_node, runs, tmp_path):
    """Kill -9 of the second node's task: what both have written is kept, and nothing is asked twice."""
    lab, two = one_node.lab, Evaluation(one_node.lab, runs, tmp_path)
    process = two.start(*two.nodes)
    deadline = time.monotonic() + TIMEOUT_S
    while not (two.rows("samples.node-1.jsonl") and two.rows()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    (task,) = [pid for pid, command in lab.processes(2).items() if "fp8slurm.cli eval" in command]
    os.kill(task, signal.SIGKILL)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0 and "task 1: Killed" in out, out
    lab.wait_empty()
    there = {r["id"]: r["response_ids"] for f in ("samples.jsonl", "samples.node-1.jsonl") for r in two.rows(f)}
    assert 2 <= len(there) < QUESTIONS and not (two.results / "summary.json").exists()
    out = two.run()
    assert f"going on, {len(there)} of {QUESTIONS} samples are there" in out
    assert two.answers() == one_node.answers()
    kept = {r["id"]: r["response_ids"] for r in two.rows() if r["attempt"] == 0}
    assert kept == there, "a sample was lost, or asked again"
    assert not list(two.results.glob("samples.node-*")) and not (two.results / "owner.json").exists()


def test_a_node_that_would_ask_something_else_is_named(one_node, runs, tmp_path):
    """Every node reads the task files itself: one that has another version of them must not take part."""
    two = Evaluation(one_node.lab, runs, tmp_path)
    command = [sys.executable, "-m", "fp8slurm.cli", "eval", *two.flags]
    script = f'[ "$SLURM_PROCID" = 0 ] || set -- "$@" --limit={QUESTIONS - 1}; exec "$@"'
    expected = ["srun", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--kill-on-bad-exit=1", "--time=20"]
    done = subprocess.run(
        [*expected, "bash", "-c", script, "_", *command],
        env=two.lab.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode != 0
    assert "node 1 (node2): this node has other questions or settings than node 0" in done.stderr, done.stderr
    assert not (two.results / "summary.json").exists()
    two.lab.wait_empty()
