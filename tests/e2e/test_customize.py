"""The files of examples/ in runs of the tiny model."""

from __future__ import annotations

import json
import os
import re
import signal
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TinyRuns, task_pids, weights

from fp8slurm.data.sources import MixedOrder
from fp8slurm.observe.metrics import read_metrics, without_times

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> TinyRuns:
    more = {
        "run__steps": 2,
        "sft__max_steps": 4,
        "rollout__prompts_per_step": 8,
        "eval__every": 0,
        "checkpoint__every": 9,
    }
    return TinyRuns(tmp_path_factory.mktemp("runs"), 8, **more)


@pytest.fixture(scope="module")
def several(runs) -> tuple[list[str], dict[str, Any]]:
    """Names and flags of a run on the sources of examples/sources.toml; the second one's reward masks what comes behind
    the answer."""
    sources = tomllib.loads((ROOT / "examples" / "sources.toml").read_text())["data"]["sources"]
    sources = {name: s | {"file": str(runs.folder / "data" / "train.jsonl")} for name, s in sources.items()}
    sources["whole"]["reward"] = "examples.reward:answer_only"
    more = {"data__train": "None", "rollout__save_every": 1, "rollout__truncated": "keep"}
    more |= {"run__steps": 3, "checkpoint__every": 1}
    switches = ["--rollout.no-drop-no-signal", "--observe.no-plot", "--data.sources", json.dumps(sources)]
    runs.run("sources", *switches, **more)
    return list(sources), {"switches": switches, "more": more}


def test_several_sources_and_tokens_that_are_left_out_of_the_loss(runs, several):
    names, _ = several
    run, order, left_out = runs.path("sources"), MixedOrder([8000, 8000], [Fraction(3), Fraction(1)], 0), 0
    for record, cursor in zip(steps(run), (0, 8, 16), strict=True):
        files = (run / folder / f"step_{record['step']:06d}.jsonl" for folder in ("rollouts", "rollouts/trainer"))
        rows, lines = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        expected = [divmod(i, 8000) for i in order.take(cursor, 8)[0]]
        taken = dict.fromkeys((names.index(row["source"]), row["index"]) for row in rows)
        assert list(taken) == expected, "a step begins where the one before ended"
        for row, line in zip(rows, lines, strict=True):
            mask = [i < 3 for i in range(len(row["tokens"]))] if row["source"] == "whole" else None
            assert row.get("loss_mask") == (None if mask is None else list(map(int, mask)))
            assert [p is not None for p in line["trainer_logprobs"]] == (mask or [True] * len(row["tokens"]))
            left_out += mask is not None and not all(mask)
        by_source = [record[f"source/{name}/reward"] for name in names]
        assert record["reward/mean"] == pytest.approx(0.75 * by_source[0] + 0.25 * by_source[1])
    assert left_out, "some response was longer than its label"


def test_several_sources_killed_and_resumed_are_the_same_run(runs, several, tmp_path):
    """Every rank and the rollout worker are killed; what was taken from each source goes on where the checkpoint ends."""
    flags = several[1]
    process, run = runs.start("sources-killed", *flags["switches"], **flags["more"]), runs.path("sources-killed")
    runs.wait_for_step(process, "sources-killed", 2)
    for pid in task_pids(run, 0).values():
        os.kill(pid, signal.SIGKILL)
    runs.finish(process, status=1)
    runs.run("sources-killed", *flags["switches"], **flags["more"])
    began = "".join(p.read_text() for p in (run / "attempts" / "1" / "logs").glob("*_log.err"))
    assert re.search("continuing from .*step_00000[12]", began)
    whole, again = (read_metrics(runs.path(name)) for name in ("sources", "sources-killed"))
    assert [without_times(r) for r in again] == [without_times(r) for r in whole]
    want, got = (weights(runs.path(name), tmp_path / name) for name in ("sources", "sources-killed"))
    assert sorted(want) == sorted(got)
    assert not [name for name, tensor in want.items() if not torch.equal(tensor, got[name])]


def steps(run: Path) -> list[dict[str, float]]:
    return [r for r in read_metrics(run) if r["phase"] == "rl" and r["step"]]


def trained(run: Path) -> list[dict[str, float]]:
    """Records of the steps that had an update: a model that has hardly been taught may find no signal in one."""
    records = [r for r in steps(run) if "loss" in r]
    assert records and any(r["grad_norm"] > 0 for r in records)
    return records


def test_a_loss_and_an_advantage_of_the_users(runs):
    algorithm = {"loss": "examples.loss:two_sided", "advantage": "examples.advantage:against_median", "tis_cap": 0}
    run = runs.run("own", **{f"algorithm__{key}": value for key, value in algorithm.items()})
    for record in trained(run):
        assert 0 <= record["custom/masked"] < 1 and record["grad_norm"] > 0 and "tis/mean" not in record


@pytest.mark.parametrize(
    "name, switches, more",
    [
        (
            "gspo",
            ["--algorithm.no-divide-by-std"],
            {"advantage": "rloo", "loss_mean": "sequence", "tis_level": "sequence"},
        ),
        (
            "cispo",
            ["--rollout.no-drop-no-signal"],
            {"advantage": "reinforce_pp", "loss_mean": "constant", "tis_excess": "mask"},
        ),
    ],
)
def test_the_other_objectives_run(runs, name, switches, more):
    run = runs.run(name, *switches, algorithm__loss=name, **{f"algorithm__{key}": value for key, value in more.items()})
    for record in trained(run):
        assert record["ratio/mean"] == pytest.approx(1, abs=0.2) and record["grad_norm"] >= 0
