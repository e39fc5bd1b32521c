"""Conversations with a tool in whole runs: examples/lookup.py, and what becomes of it when something dies."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TIMEOUT_S, last_step, task_pids

from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.run.attempts import read_attempts

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    made = tiny_runs(
        16, "--observe.no-plot", "--observe.no-tensorboard", "--rollout.no-drop-no-signal", run__steps=3, sft__max_steps=30,
        sft__batch_size=64, sft__warmup_steps=5, rollout__prompts_per_step=8, rollout__n_samples=4, rollout__max_tokens=12,
        rollout__save_every=1, rollout__truncated="keep", checkpoint__every=1, eval__every=0, eval__temperature=1,
        slurm__ranks_per_node=1, rollout__generate="examples.lookup:generate",
    )  # fmt: skip
    runpy.run_path(str(ROOT / "examples" / "lookup.py"))["write_data"](made.folder / "data", train=1000, held_out=16)
    return made


def rollouts(run: Path, step: int, *folder: str) -> list[dict]:
    path = run.joinpath("rollouts", *folder, f"step_{step:06d}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def records(run: Path) -> list[dict]:
    return [without_times(r) for r in read_metrics(run) if r["phase"] == "rl"]


def check_masks(run: Path, steps: int) -> int:
    """Every token that a tool said is masked, and nothing else; how many conversations had a tool's answer."""
    called = 0
    for step in range(1, steps + 1):
        for row, line in zip(rollouts(run, step), rollouts(run, step, "trainer"), strict=True):
            said = [any(a <= i < b for a, b in row["turns"]) for i in range(len(row["tokens"]))]
            assert row.get("loss_mask", [1] * len(said)) == [int(m) for m in said]
            if line["trainer_logprobs"] is not None:
                assert [p is not None for p in line["trainer_logprobs"]] == said
            assert [p == 0 for p, m in zip(row["logprobs"], said) if not m] == [True] * said.count(False)
            called += len(row["turns"]) > 1
    return called


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    return runs.run("whole")


def test_rewards_and_masks_flow_and_an_evaluation_has_the_tool_too(runs, whole):
    assert check_masks(whole, 3) > 0
    for r in records(whole)[1:]:
        assert 1 < r["rollout/turns"] <= 2 and r["rollout/given_tokens"] > 0 and r["rollout/failed"] == 0
        assert r["rollout/branches"] == 1 and r["reward/mean"] > 0 and r["gap/mean_abs"] < 0.1
    command = [sys.executable, "-m", "fp8slurm.cli", "eval", "--run", str(whole), "--precision", "fp8"]
    done = subprocess.run([*command, "--temperature", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    by_itself, in_training = (
        [json.loads(line) for line in (whole / "eval" / name / "samples.jsonl").read_text().splitlines()]
        for name in ("step_000003-fp8", "step_000003-fp8-training")
    )
    keys = ("id", "conversation", "score")
    assert [[r[k] for k in keys] for r in by_itself] == [[r[k] for k in keys] for r in in_training]
    told = [r["conversation"][1] for r in by_itself if len(r["conversation"]) == 3]
    assert told and all(who == "tool" and text.startswith("=") for who, text in told)


def test_a_run_with_a_tool_is_the_same_after_it_was_killed(runs, whole):
    """Deterministic, with a tool that answers the same: records, conversations and their masks."""
    killed, run = runs.start("killed"), runs.path("killed")
    try:
        runs.wait_for_step(killed, "killed", 1)
        os.kill(task_pids(run, 0)[1], signal.SIGKILL)  # the rollout worker, within a rollout as like as not
        runs.finish(killed, status=1)
    finally:
        runs.stop(killed)
    runs.run("killed")
    assert records(run) == records(whole) and [r["step"] for r in records(run)] == [0, 1, 2, 3]
    assert all(rollouts(run, step) == rollouts(whole, step) for step in (1, 2, 3))


def test_by_openais_client_it_is_the_same_run(runs, whole):
    """examples/lookup_openai.py: the same token ids, log-probabilities, rewards and updates as by the session's calls."""
    model = runs.folder / "with-template"
    command = [sys.executable, "-m", "examples.lookup_openai", runs.folder / "model", model]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    how = {"rollout__generate": "examples.lookup_openai:generate", "model__hf_checkpoint": model}
    run = runs.run("openai", **how)
    assert any(len(row["turns"]) == 2 for row in rollouts(run, 3))
    assert all(rollouts(run, step) == rollouts(whole, step) for step in (1, 2, 3))
    assert records(run) == records(whole)


WAITS = '''
import asyncio
from pathlib import Path


async def waits(session, prompt):
    """As examples/lookup.py, but that in step 2, the first with new weights, the tool answers when the test says so."""
    folder, table = Path(__file__).parent, prompt.row["table"]
    turn = await session.complete(prompt.token_ids)
    (folder / f"version-{turn.weight_versions[0]}").touch()
    if turn.finish_reason == "stop" and turn.text in table:
        if len(list(folder.glob("version-*"))) == 2:
            (folder / "called").touch()
            while not (folder / "answer").exists():
                await asyncio.sleep(0.05)
        await session.complete(turn.ids + session.tokenize(f"={table[turn.text]}>"))
    return session.sample()
'''


def test_slurms_notice_while_a_tool_is_at_work(runs, whole, monkeypatch):
    """SIGUSR2 to the tasks of a job, as Slurm sends it: the step is ended, saved, and the next start goes on from there
    with the conversations of an undisturbed run."""
    user, run = runs.folder / "waits", runs.path("noticed")
    user.mkdir()
    (user / "waiting.py").write_text(WAITS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(user), str(ROOT)]))
    for command in ("scontrol", "squeue"):  # a real one looks for its controller for half a minute
        (user / command).write_text("#!/bin/sh\nexit 1\n")
        (user / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(user), prepend=os.pathsep)

    def start(restart: int) -> list[subprocess.Popen]:
        command = runs.command("noticed", "--slurm.no-requeue", rollout__generate="waiting:waits")
        command[command.index("train")] = "worker"
        job = {"SLURM_JOB_ID": "1000000", "SLURM_CONF": "/nonexistent", "SLURM_RESTART_COUNT": str(restart)}
        job |= {"SLURM_NTASKS": "2", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
        return [
            subprocess.Popen(
                command, env=os.environ | job | {"SLURM_PROCID": str(i)}, stderr=subprocess.PIPE, text=True
            )
            for i in range(2)
        ]

    def said() -> str:
        return "\n".join(p.read_text() for p in sorted(run.glob("attempts/*/logs/*_log.err")))

    def wait_for(condition) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline and all(t.poll() is None for t in tasks), said()
            time.sleep(0.05)

    tasks = start(0)
    try:
        wait_for((user / "called").exists)
        for task in tasks:
            task.send_signal(signal.SIGUSR2)
        wait_for(lambda: "notice (SIGUSR2)" in said())
        (user / "answer").touch()
        for task in tasks:
            task.wait(TIMEOUT_S)
        stopped = json.loads((run / "attempts" / "0" / "stopped.json").read_text())
        assert stopped["why"] == "stopped as planned" and stopped["saved"] and last_step(run) == 2, said()
        tasks = start(1)
        assert [task.wait(TIMEOUT_S) for task in tasks] == [0, 0], said()
    finally:
        for task in tasks:
            task.kill()
            task.communicate()
    assert records(run) == records(whole)
    assert all(rollouts(run, step) == rollouts(whole, step) for step in (1, 2, 3))


KILLS = '''
import os
from pathlib import Path

import psutil

from examples.lookup import generate


async def kills(session, prompt):
    """The first conversation ends one of the two engines between its turns."""
    turn = await session.complete(prompt.token_ids, max_tokens=4)
    try:
        os.close(os.open(Path(__file__).with_name("done"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pass
    else:
        children = psutil.Process().children(recursive=True)
        engines = [p for p in children if p.cmdline()[-1:] == ["fp8slurm.engine.child"] and p.pid == os.getpgid(p.pid)]
        assert len(engines) == 2
        engines[0].kill()
    await session.complete(turn.ids + session.tokenize("=123>"))
    return session.sample()
'''


def test_a_conversation_goes_on_elsewhere_when_its_engine_dies_and_no_token_differs(runs, monkeypatch):
    """Two engines, single requests, model.exact: over both turns, on whichever engine, the trainer's log-probabilities
    are the engines', bit for bit."""
    (runs.folder / "user").mkdir()
    (runs.folder / "user" / "talks.py").write_text(KILLS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.folder / "user"), str(ROOT)]))
    more = {"rollout__generate": "talks:kills", "engine__per_node": 2, "run__steps": 2, "sft__max_steps": 2}
    run = runs.run("exact", "--model.exact", "--run.no-deterministic", **more)
    assert [a.engine_restarts for a in read_attempts(run, [])] == [1]
    assert [r["step"] for r in records(run)] == [0, 1, 2] and all(r["gap/max"] == 0 for r in records(run))
    assert all(r["rollout/turns"] == 2 and r["rollout/failed"] == 0 for r in records(run)[1:])
    assert check_masks(run, 2) == 2 * 8 * 4
    for step in (1, 2):
        for row, line in zip(rollouts(run, step), rollouts(run, step, "trainer"), strict=True):
            assert [p for p in line["trainer_logprobs"] if p is not None] == [
                p for p, m in zip(row["logprobs"], row["loss_mask"]) if m
            ]
