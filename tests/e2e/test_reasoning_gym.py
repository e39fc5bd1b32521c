"""A whole run on a task of reasoning-gym: rewards of its verifier, and the same after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from pip_folder import pip_folder
from tiny_runs import task_pids

from fp8slurm.observe.metrics import read_metrics, without_times

pytestmark = pytest.mark.slow
TASK = """reasoning_gym = "basic_arithmetic"
seed = {seed}
{size}
[settings]
min_terms = 2
max_terms = 2
min_digits = 1
max_digits = 1
"""


def records(run: Path) -> list[dict]:
    return [without_times(r) for r in read_metrics(run) if r["phase"] == "rl"]


@pytest.fixture
def task(tiny_runs, monkeypatch):
    """Runs on sums of two digits; what they are started with has questions of another seed."""
    try:
        package = pip_folder("reasoning-gym", "reasoning-gym.txt")
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH")))))
    from fp8slurm.data.reasoning_gym import read_task

    runs = tiny_runs(
        16, "--observe.no-plot", "--observe.no-tensorboard", "--rollout.no-drop-no-signal", run__steps=3, sft__max_steps=20,
        sft__batch_size=64, sft__warmup_steps=5, rollout__prompts_per_step=8, rollout__n_samples=4, rollout__max_tokens=6,
        rollout__save_every=1, rollout__truncated="keep", checkpoint__every=1, eval__every=0, slurm__ranks_per_node=1,
        reward__kind="fp8slurm.agents.reasoning_gym:score", data__max_prompt_tokens=100,
    )  # fmt: skip
    for name, seed, size in (("train", 0, ""), ("eval", 1, "size = 16"), ("sft", 2, "size = 500")):
        (runs.folder / f"{name}.toml").write_text(TASK.format(seed=seed, size=size))
    rows = [{"prompt": r["prompt"], "response": r["label"]} for r in read_task(runs.folder / "sft.toml").rows()]
    (runs.folder / "data" / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs.more |= {"data__train": runs.folder / "train.toml", "data__eval": runs.folder / "eval.toml"}
    return runs


def test_a_run_on_a_task_is_the_same_after_it_was_killed(task):
    whole, run = task.run("whole"), task.path("killed")
    steps = records(whole)[1:]
    assert [r["step"] for r in steps] == [1, 2, 3] and any(r["reward/mean"] > 0 for r in steps)
    assert all(r["reward/parts/failed"] == 0 for r in steps)
    files = [f"rollouts/step_{step:06d}.jsonl" for step in (1, 2, 3)]
    rows = [json.loads(line) for file in files for line in (whole / file).read_text().splitlines()]
    assert len({row["index"] for row in rows}) == 3 * 8 and "Calculate" in rows[0]["prompt"]

    killed = task.start("killed")
    try:
        task.wait_for_step(killed, "killed", 1)
        os.kill(task_pids(run, 0)[1], signal.SIGKILL)
        task.finish(killed, status=1)
    finally:
        task.stop(killed)
    task.run("killed")
    assert records(run) == records(whole)
    assert all((run / file).read_bytes() == (whole / file).read_bytes() for file in files)
