"""Nodes that die or lose the network, and what depends on signals under cgroup tracking. `make test-faults`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fp8slurm.core.processes import process_start

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.faults]

ONE_NODE = ("--slurm.nodes=1", "--run.steps=80", "--watchdog.timeout-s=300")
"""The controller takes a minute to notice a cut; until then the test holds the run up."""


@pytest.fixture(scope="module")
def lab(start_lab):
    return start_lab("linuxproc")


@pytest.fixture(scope="module")
def reference(lab, runs):
    """An undisturbed run on two nodes."""
    job = runs.submit(lab, "faults-reference")
    runs.wait_end(lab, "faults-reference", job)
    return "faults-reference"


@pytest.fixture(scope="module")
def one_node(lab, runs):
    """An undisturbed run on one node: what it computes depends on the number of engines."""
    job = runs.submit(lab, "one-node", *ONE_NODE)
    runs.wait_end(lab, "one-node", job)
    return "one-node"


def test_a_node_dies_and_comes_back(lab, runs, reference, same_run, measure):
    name = "node-death"
    job = runs.submit(lab, name)
    runs.wait_step(lab, name, job, 4)
    before = runs.step(name)
    with measure(lab, runs, name, "node killed", before):
        lab.do("kill-node", "2")
        # down for longer than the controller takes to notice: it requeues the job, which waits for the node
        time.sleep(20)
        lab.do("start-node", "2")
        runs.wait_attempt(lab, name, job, 1)
        runs.wait_step(lab, name, job, before + 1)
    runs.wait_end(lab, name, job)
    same_run(name, reference)


def test_a_cut_off_node_goes_on_writing_and_harms_nothing(lab, runs, one_node, same_run, measure):
    """The old attempt does not notice the cut (all its tasks are on the node) and goes on beside the new one."""
    name = "cut"
    job = runs.submit(lab, name, *ONE_NODE)
    runs.wait_step(lab, name, job, 3)
    old = [runs.task(name, i) for i in range(3)]
    cut = int(old[0]["host"].removeprefix("node"))
    before = runs.step(name)
    with measure(lab, runs, name, "node cut off", before):
        lab.do("cut-node", str(cut))
        runs.wait_step(lab, name, job, before + 2)  # the one that was under way, and one more
        with runs.held(lab, cut):
            runs.wait_attempt(lab, name, job, 1)
        runs.wait_step(lab, name, job, runs.step(name) + 1)
    assert runs.task(name, 0)["host"] != old[0]["host"]
    ended = lambda: all(process_start(t["pid"]) != t["start"] for t in old)  # noqa: E731
    runs.wait_until(ended, "the old attempt did not end", runs.shown(lab, name))
    lab.do("join-node", str(cut))
    runs.wait_end(lab, name, job)
    assert runs.attempt(name) == 1, "what the old attempt's srun still had to say met the new one"
    errors = [
        json.loads(p.read_text())["text"] for p in (runs.path(name) / "attempts" / "0" / "errors").glob("task_*.json")
    ]
    assert any("attempt 1 has begun; attempt 0 stops" in text for text in errors), errors
    same_run(name, one_node)


def test_a_node_that_breaks_every_time_is_left_out(lab, runs, one_node, same_run, tmp_path):
    """Its local disk is full. Two attempts end by it; the third is on the other node, and the run is the same run."""
    name, disk = "bad-node", tmp_path / "disk"
    disk.mkdir()
    lab.do("full-disk", "1", str(disk))
    job = runs.submit(lab, name, f"--slurm.setup=export TMPDIR={disk}", *ONE_NODE)
    runs.wait_end(lab, name, job)
    assert runs.attempt(name) == 2 and lab.job(job)["ExcNodeList"] == "node1"
    stopped = [json.loads((runs.path(name) / "attempts" / n / "stopped.json").read_text()) for n in "01"]
    assert "left_out" not in stopped[0] and stopped[1]["left_out"]["node"] == "node1"
    assert "No space left on device on its own file system" in stopped[1]["left_out"]["why"]
    status = subprocess.run(
        [sys.executable, "-m", "fp8slurm.cli", "status", str(runs.path(name))],
        env=lab.environment, capture_output=True, text=True,
    )  # fmt: skip
    assert "left out" in status.stdout and "node1: attempts 0 to 1" in status.stdout, status.stdout + status.stderr
    assert runs.task(name, 0)["host"] == "node2"
    same_run(name, one_node)


def test_a_failing_run_ends_with_the_reason(lab, runs, tmp_path):
    """The traceback of the task that failed is the last thing in the job's log; another attempt would only meet it again."""
    name = "failing"
    (tmp_path / "bad_reward.py").write_text("def reward(response, label):\n    raise KeyError('no such answer')\n")
    lab.environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    try:
        job = runs.submit(
            lab, name, "--reward.kind=bad_reward:reward", "--slurm.max-attempts-without-progress=1", *ONE_NODE
        )
    finally:
        del lab.environment["PYTHONPATH"]
    runs.wait_end(lab, name, job, "FAILED")
    output = (runs.path(name) / "slurm" / f"{job}_0_log.err").read_text()
    assert "no such answer" in output.strip().splitlines()[-2] + output.strip().splitlines()[-1], output


SCRIPT = """#!/bin/bash
#SBATCH --time=30
#SBATCH --signal=USR2@60
#SBATCH --open-mode=append
#SBATCH --output={log}
trap : TERM USR2
srun --unbuffered --kill-on-bad-exit=1 {command} worker "$@"
exec {command} after $? "$@"
"""


def test_a_job_script_that_may_not_be_requeued_submits_itself_again(lab, runs, reference, same_run, tmp_path):
    """What sbatch was told besides the script is told again: its own flags, and the script's arguments."""
    name = "by-script"
    script = tmp_path / "train.sbatch"
    script.write_text(SCRIPT.format(command=f"{sys.executable} -m fp8slurm.cli", log=tmp_path / "log"))
    flags = ("--no-requeue", "--partition=low", "--nodes=2", "--ntasks-per-node=3")
    arguments = [*runs.flags(name), "--slurm.setup=true # two words"]
    job = lab.ask("sbatch", "--parsable", *flags, str(script), *arguments).strip()

    def resubmitted(attempt: int, job: str) -> str:
        stopped = runs.path(name) / "attempts" / str(attempt) / "stopped.json"
        runs.wait_end(lab, name, job, empty=False)  # the next job may have begun
        output = json.loads(stopped.read_text())
        assert (
            "presently disabled" in output["why_not"]
            and output["next"] == f"resubmitted as job {output['resubmitted']}"
        )
        again = lab.job(output["resubmitted"])
        assert (again["Partition"], again["Requeue"]) == ("low", "0") and again["NumNodes"] in ("2", "2-2")
        return output["resubmitted"]

    runs.wait_attempt(lab, name, job, 0)
    runs.wait_step(lab, name, job, 3)
    os.kill(runs.task(name, 1)["pid"], signal.SIGKILL)
    job = resubmitted(0, job)
    runs.wait_attempt(lab, name, job, 1)
    runs.wait_step(lab, name, job, runs.step(name) + 2)
    lab.ask("scancel", "--signal=USR2", job)
    job = resubmitted(1, job)
    assert json.loads((runs.path(name) / "attempts" / "1" / "stopped.json").read_text())["saved"]
    runs.wait_end(lab, name, job)
    assert runs.attempt(name) == 2
    same_run(name, reference)


def test_signals_under_cgroup_tracking(start_lab, runs, reference, same_run, measure):
    """Engine kill, notice before a preemption and before the time limit, scancel: only the tasks themselves get Slurm's
    signals here."""
    lab, name = start_lab("cgroup"), "cgroup"
    job = runs.submit(lab, name, "--slurm.partition=graced")
    runs.wait_step(lab, name, job, 2)
    engines = [pid for pid, command in lab.processes(1).items() if command.endswith("fp8slurm.engine.child")]
    before = runs.step(name)
    with measure(lab, runs, name, "engine killed", before):
        os.kill(min(engines), signal.SIGKILL)
        runs.wait_step(lab, name, job, before + 1)
    assert runs.attempt(name) == 0
    before = runs.step(name)
    with measure(lab, runs, name, "preemption with notice", before):
        lab.ask("srun", "--partition=main", "--nodes=2", "--exclusive", "--time=1", "sleep", "1")
        runs.wait_attempt(lab, name, job, 1)
        runs.wait_step(lab, name, job, runs.step(name) + 1)  # one of its own: the last attempt went on after the notice
    before = runs.step(name)
    with measure(lab, runs, name, "time limit with notice", before):
        runs.meet_time_limit(lab, name, job)
        runs.wait_attempt(lab, name, job, 2)
        runs.wait_step(lab, name, job, before + 1)
    lab.ask("scancel", job)  # at once: steps are short, and the run must not be over before
    runs.wait_end(lab, name, job, "CANCELLED")
    for attempt in "01":
        stopped = json.loads((runs.path(name) / "attempts" / attempt / "stopped.json").read_text())
        assert stopped["saved"] and stopped["next"] == "requeued"
    job = runs.submit(lab, name)
    runs.wait_end(lab, name, job)
    same_run(name, reference)
