"""Runs on a real two-node Slurm: undisturbed, disturbed in every way, and equal in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from fp8slurm.core.processes import process_start
from fp8slurm.run.task_errors import first_error

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(scope="module")
def lab(start_lab):
    return start_lab("linuxproc")


@pytest.fixture(scope="module")
def reference(lab, runs):
    """An undisturbed run, followed from where it was submitted."""
    command = runs.command("train", "reference", "--slurm.executor=slurm")
    cyclic = {"SBATCH_DISTRIBUTION": "cyclic"}  # the tasks are dealt in blocks all the same
    done = subprocess.run(command, env=lab.environment | cyclic, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr + runs.log("reference")
    assert "COMPLETED" in done.stderr and "rl 44/44" in done.stdout
    lab.wait_empty()
    assert runs.attempt("reference") == 0
    return "reference"


class Fault:
    """Faults of one run, one after the other."""

    def __init__(self, lab, runs, name: str, measure) -> None:
        self.lab, self.runs, self.name, self.measure = lab, runs, name, measure

    def happens(self, what: str, act, job: str, new_attempt: bool = True, after: int = 2) -> str:
        """Once two more steps than now are recorded, `act` on the job; until the run is past that. Returns the job's id."""
        runs = self.runs
        runs.wait_step(self.lab, self.name, job, runs.step(self.name) + after)
        before, attempt = runs.step(self.name), runs.attempt(self.name)
        with self.measure(self.lab, runs, self.name, what, before):
            job = act(job) or job
            if new_attempt:
                runs.wait_attempt(self.lab, self.name, job, attempt + 1)
            runs.wait_step(self.lab, self.name, job, before + 1)
        assert runs.attempt(self.name) == attempt + new_attempt, f"{what}\n{runs.log(self.name)}"
        return job


def test_the_reference_run(lab, runs, reference):
    run = runs.path(reference)
    owner = json.loads((run / "attempts" / "0" / "owner.json").read_text())
    assert owner["restart"] == 0 and owner["job"] and owner["checkpoint"] == ""
    assert "megatron-core" in json.loads((run / "attempts" / "0" / "versions.json").read_text())["packages"]
    hosts = {runs.task(reference, i)["host"] for i in range(6)}
    assert hosts == {"node1", "node2"}
    assert len(list((run / "attempts" / "0" / "logs").glob("[0-5]_log.err"))) == 6
    assert json.loads((run / "pace.json").read_text())["save_s"] > 0


def test_a_finished_run_says_so(lab, runs, reference):
    done = subprocess.run(runs.command("submit", reference), env=lab.environment, capture_output=True, text=True)
    assert done.returncode == 0 and "is finished: 44 steps" in done.stdout
    assert runs.attempt(reference) == 0


def test_the_same_tasks_without_slurm(lab, runs, reference, same_run):
    """Four ranks and two rollout workers started by hand on one machine: the same run, to the last bit."""
    tasks = []
    for index in range(6):
        environment = os.environ | {
            "SLURM_JOB_ID": "1000000", "SLURM_PROCID": str(index), "SLURM_NTASKS": "6", "SLURM_NODEID": str(index // 3),
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_CONF": "/nonexistent",
        }  # fmt: skip
        tasks.append(
            subprocess.Popen(runs.command("worker", "by-hand"), env=environment, stderr=subprocess.PIPE, text=True)
        )
    outputs = [t.communicate(timeout=600)[1] for t in tasks]
    assert [t.returncode for t in tasks] == [0] * 6, "\n".join(outputs) + runs.log("by-hand")
    same_run("by-hand", reference)


@pytest.fixture
def foreign(lab, tmp_path, monkeypatch):
    """foreign(place): the next process of a job, submitted from here on, that comes to this place of
    foreign_errors/sitecustomize.py meets the ValueError of another library, once."""
    path = [str(Path(__file__).parent / "foreign_errors"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setitem(lab.environment, "PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setitem(lab.environment, "FOREIGN_ERRORS", str(tmp_path / "armed"))
    (tmp_path / "armed").mkdir()
    return lambda place: (tmp_path / "armed" / place).touch()


def check_foreign(runs, name: str, attempt: int, error: str) -> None:
    """The attempt ended with this error of another library: not for good, and with the frames that lead to it."""
    folder = runs.path(name) / "attempts" / str(attempt)
    errors = [json.loads(path.read_text()) for path in (folder / "errors").glob("task_*.json")]
    assert not any(e["permanent"] for e in errors), errors
    assert any("Traceback" in e["text"] and "sitecustomize.py" in e["text"] and error in e["text"] for e in errors), (
        errors
    )
    assert error in (first_error(folder) or ""), first_error(folder)


def test_a_run_survives_everything(lab, runs, reference, same_run, measure, foreign):
    name = "long"
    fault = Fault(lab, runs, name, measure)

    def kill(index: int, number: signal.Signals):
        return lambda job: os.kill(runs.task(name, index)["pid"], number)

    def engine(job: str) -> None:
        found = [pid for pid, command in lab.processes(1).items() if command.endswith("fp8slurm.engine.child")]
        os.kill(min(found), signal.SIGKILL)

    def preempt(job: str) -> None:
        lab.ask("srun", "--partition=main", "--nodes=2", "--exclusive", "--time=1", "sleep", "1")

    def cancel_and_submit(job: str) -> str:
        lab.ask("scancel", job)
        runs.wait_end(lab, name, job, "CANCELLED")
        return runs.submit(lab, name, "--slurm.partition=low")

    foreign("start")
    job = runs.submit(lab, name, "--slurm.partition=low")
    refused = subprocess.run(runs.command("submit", name), env=lab.environment, capture_output=True, text=True)
    assert refused.returncode == 2 and f"held by job {job}" in refused.stderr

    runs.wait_attempt(lab, name, job, 1)
    check_foreign(runs, name, 0, "JSONDecodeError")
    fault.happens("controller restarted", lambda job: lab.do("restart-controller") and None, job, new_attempt=False)
    fault.happens("engine killed", engine, job, new_attempt=False, after=1)
    fault.happens("scontrol requeue", lambda job: lab.ask("scontrol", "requeue", job) and None, job, after=1)
    fault.happens("foreign error in a rollout worker", lambda job: foreign("decoding"), job)
    check_foreign(runs, name, runs.attempt(name) - 1, "UnicodeDecodeError")
    fault.happens("rank killed", kill(1, signal.SIGKILL), job)
    fault.happens("preemption without notice", preempt, job)
    fault.happens("foreign error in a save", lambda job: foreign("save"), job)
    check_foreign(runs, name, runs.attempt(name) - 1, "zip() argument 2 is shorter")
    fault.happens("rank stopped", kill(3, signal.SIGSTOP), job)
    stacks = runs.path(name) / "attempts" / str(runs.attempt(name) - 1) / "stacks"
    # Whoever's watchdog is the first, all say where they stand before it ends the step. The stopped one may too: Slurm
    # lets a stopped process go on in order to end it.
    found = {path.name: path.read_text() for path in stacks.glob("task_*.txt")}
    assert set(found) >= {f"task_{i}.txt" for i in (0, 1, 2, 4, 5)}
    assert "loop.py" in found["task_0.txt"]
    fault.happens("time limit with notice", lambda job: runs.meet_time_limit(lab, name, job), job)
    stopped = runs.path(name) / "attempts" / str(runs.attempt(name) - 1) / "stopped.json"
    assert json.loads(stopped.read_text())["saved"] and json.loads(stopped.read_text())["next"] == "requeued"
    lab.ask("scontrol", "update", f"jobid={job}", "timelimit=30")
    job = fault.happens("scancel, submitted again", cancel_and_submit, job)
    runs.wait_end(lab, name, job)
    same_run(name, reference)
    for attempt in range(runs.attempt(name) + 1):
        for path in (runs.path(name) / "attempts" / str(attempt) / "tasks").glob("[0-9].json"):
            task = json.loads(path.read_text())
            assert process_start(task["pid"]) != task["start"]


def test_a_setting_that_cannot_be_is_not_tried_again(lab, runs):
    """It shows only where the tasks run: preflight does not see what slurm.setup does to their environment."""
    name = "refused"
    job = runs.submit(lab, name, "--slurm.setup=export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0")
    runs.wait_end(lab, name, job, "FAILED")
    assert runs.attempt(name) == 0 and lab.job(job)["Restarts"] == "0"
    errors = list((runs.path(name) / "attempts" / "0" / "errors").glob("task_*.json"))
    reasons = [json.loads(path.read_text()) for path in errors]
    assert any(e["permanent"] and e["text"].startswith("NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0") for e in reasons), (
        reasons
    )
    said = (runs.path(name) / "slurm" / f"{job}_0_log.err").read_text()
    assert "contradicts the FP32 scales" in said and "Traceback" not in said
    assert said.strip().endswith("another attempt would only meet this again: the run ends"), said
