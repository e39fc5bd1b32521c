"""A mixture of experts whose experts lie on two nodes of a real Slurm, requeued on the way."""

from __future__ import annotations

import json

import pytest

from fp8slurm.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.faults]

SHORT = (
    "--slurm.ranks-per-node=1", "--run.steps=8", "--sft.max-steps=4", "--checkpoint.every=2", "--eval.every=4",
    "--sync.verify=always",
)  # fmt: skip
"""One rank and one rollout worker a node: the two ranks that share the experts reach each other over the network alone."""


def test_a_requeue_changes_nothing(start_lab, expert_runs, same_run, measure) -> None:
    """tiny-moe-fp8, EP2 across the nodes, routing replayed: the records and weights of an undisturbed run."""
    lab, runs = start_lab("linuxproc"), expert_runs
    job = runs.submit(lab, "experts-reference", *SHORT)
    runs.wait_end(lab, "experts-reference", job)
    assert runs.attempt("experts-reference") == 0
    config = json.loads((runs.path("experts-reference") / "config.json").read_text())
    assert config["parallel"]["expert_parallel_size"] == 2 and config["rollout"]["routing_replay"]
    assert {runs.task("experts-reference", rank)["host"] for rank in (0, 2)} == {"node1", "node2"}

    name = "experts"
    # weights sent straight into the engines of both nodes: the way they take changes nothing either
    job = runs.submit(lab, name, *SHORT, "--sync.transport=gloo-direct")
    runs.wait_step(lab, name, job, 3)
    before = runs.step(name)
    with measure(lab, runs, name, "scontrol requeue, experts on two nodes", before):
        lab.ask("scontrol", "requeue", job)
        runs.wait_attempt(lab, name, job, 1)
        runs.wait_step(lab, name, job, before + 1)
    runs.wait_end(lab, name, job)
    assert runs.attempt(name) == 1
    same_run(name, "experts-reference", runs)
    first, *_, last = (r for r in read_metrics(runs.path(name)) if r["phase"] == "rl")
    assert first["gap_no_replay/mean_abs"] > 0 and last["final_gap_no_replay/mean_abs"] > 0
