"""A Slurm cluster of two nodes for the tests, and runs on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import last_step, make_folder, settings

from fp8slurm.observe.metrics import read_metrics
from fp8slurm.scheduler.job import fields

ROOT = Path(__file__).parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
TIMEOUT_S = 600.0
"""Of every wait: far more than any of them takes on a loaded machine."""


def why_no_lab() -> str | None:
    """What is missing for a Slurm cluster on this machine; with CI=true or INSTALL=1 the packages are installed first."""
    missing = [c for c in ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter") if not shutil.which(c)]
    ci = os.environ.get("CI") == "true"
    if missing and (ci or os.environ.get("INSTALL") == "1") and os.geteuid() == 0:
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-q", *command], check=True, stdout=subprocess.DEVNULL)
        missing = []
    if os.geteuid() != 0:
        return "a Slurm cluster with network namespaces needs root"
    return f"{', '.join(missing)} not installed: INSTALL=1 installs {' '.join(PACKAGES)}" if missing else None


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


class Lab:
    """tools/slurm_lab.sh, and questions to it."""

    def __init__(self, state: Path, process_tracking: str) -> None:
        self.state, self.process_tracking = state, process_tracking
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SRUN", "SBATCH"))}
        self.environment |= {
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": f"{state / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LAB_STATE": str(state),
            "LAB_PROC": process_tracking,
        }

    def do(self, *action: str) -> str:
        done = subprocess.run(
            [str(ROOT / "tools" / "slurm_lab.sh"), *action],
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"slurm_lab.sh {' '.join(action)}: status {done.returncode}"
        return done.stdout

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        return fields(self.ask("scontrol", "-o", "show", "job", job_id))

    def processes(self, node: int) -> dict[int, str]:
        """Command lines of a node's processes by id, Slurm's own daemons left out."""
        commands = {}
        for pid in map(int, self.do("pids", str(node)).split()):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if command and not command.startswith(("slurmd", "slurmstepd")):
                commands[pid] = command
        return commands

    def state_text(self) -> str:
        """Jobs, nodes and the end of the daemons' logs: why a job does not start."""
        commands = [["scontrol", "-o", "show", kind] for kind in ("job", "node")]
        answers = [
            subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout for command in commands
        ]
        files = sorted((self.state / "log").glob("*.log"))
        ends = [f"== {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-40:]) for p in files]
        return "\n".join([*answers, *ends])

    def wait_empty(self) -> None:
        """Until no job's process is left on any node."""

        def left() -> dict[int, str]:
            return self.processes(1) | self.processes(2)

        wait_until(lambda: not left(), "processes are left", left)


def wait_until(
    condition: Callable[[], Any], what: str, shown: Callable[[], Any] = lambda: "", timeout_s: float = TIMEOUT_S
) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} after {timeout_s:g} s: {shown()}")
        time.sleep(0.2)
    return value


class Runs:
    """Runs of one tiny model, on 2 nodes x (2 ranks + 1 rollout worker) unless the flags say otherwise."""

    def __init__(self, folder: Path, moe: bool = False) -> None:
        self.folder, self.recipe = folder, "tiny-moe-fp8" if moe else "tiny-fp8"
        make_folder(folder, 16, moe)

    def flags(self, name: str, *more: str) -> list[str]:
        flags = settings(
            self.folder, name, run__steps=44, sft__max_steps=8, sft__warmup_steps=2, sft__batch_size=32,
            rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=0, checkpoint__every=3,
            eval__every=10, train__updates_per_step=1, slurm__nodes=2, slurm__ranks_per_node=2, slurm__cpu_threads=1,
            slurm__engine_threads=1, slurm__time=30, slurm__signal_delay_s=60, watchdog__timeout_s=120,
        )  # fmt: skip
        switches = ["--rollout.no-drop-no-signal", "--observe.no-tensorboard", "--observe.no-plot"]
        return ["--recipe", self.recipe, *flags, *switches, *more]

    def command(self, command: str, name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "fp8slurm.cli", command, *self.flags(name, *more)]

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def submit(self, lab: Lab, name: str, *more: str) -> str:
        done = subprocess.run(self.command("submit", name, *more), env=lab.environment, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("job "), done.stdout + done.stderr
        return done.stdout.split()[1].rstrip(":")

    def step(self, name: str) -> int:
        """The last RL step that was recorded, -1 if none was."""
        return last_step(self.path(name))

    def attempt(self, name: str) -> int:
        folders = [int(p.name) for p in self.path(name).glob("attempts/*") if (p / "begun").exists()]
        return max(folders, default=-1)

    def task(self, name: str, index: int) -> dict[str, Any]:
        """What task `index` of the newest attempt says about itself: host, pid, start."""
        return json.loads(
            (self.path(name) / "attempts" / str(self.attempt(name)) / "tasks" / f"{index}.json").read_text()
        )

    def log(self, name: str) -> str:
        """Everything that the jobs and the tasks of a run have said."""
        files = [*self.path(name).glob("slurm/*.err"), *self.path(name).glob("attempts/*/logs/*_log.err")]
        return "\n".join(f"== {p}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(files))

    def shown(self, lab: Lab, name: str) -> Callable[[], str]:
        """What a wait that failed shows: the run's words and Slurm's."""
        return lambda: self.log(name) + lab.state_text()

    wait_until = staticmethod(wait_until)

    def wait_attempt(self, lab: Lab, name: str, job_id: str, attempt: int) -> None:
        """Until an attempt has begun; fails at once when the job has ended before."""

        def begun() -> bool:
            if self.attempt(name) >= attempt:
                return True
            job = lab.job(job_id)
            assert job["JobState"] not in ENDED, f"job {job_id} is {job['JobState']}\n{self.log(name)}"
            return False

        wait_until(begun, f"attempt {attempt} of {name} did not begin", self.shown(lab, name))

    def wait_step(self, lab: Lab, name: str, job_id: str, step: int) -> None:
        """Until a step is recorded; fails at once when the job has ended before."""

        def reached() -> bool:
            if self.step(name) >= step:
                return True
            state = lab.job(job_id)["JobState"]
            if state in ENDED:
                assert self.step(name) >= step, f"job {job_id} is {state}\n{self.log(name)}"
                return True
            return False

        wait_until(reached, f"step {step} of {name} was not reached", self.shown(lab, name))

    def meet_time_limit(self, lab: Lab, name: str, job_id: str) -> None:
        """Shorten the job's time limit until its notice comes: up to half a minute after it is due, so that until then
        the engine holds the run up."""
        with self.held(lab, 1):
            self._meet_time_limit(lab, name, job_id)

    def _meet_time_limit(self, lab: Lab, name: str, job_id: str) -> None:
        elapsed = sum(int(x) * f for x, f in zip(reversed(lab.job(job_id)["RunTime"].split(":")), (1, 60, 3600)))
        lab.ask("scontrol", "update", f"jobid={job_id}", f"timelimit={(elapsed + 60 + 30 + 59) // 60}")
        log = self.path(name) / "attempts" / str(self.attempt(name)) / "logs" / "0_log.err"
        wait_until(lambda: "notice (SIGUSR2)" in log.read_text(), "no notice came", lambda: self.log(name))

    @contextmanager
    def held(self, lab: Lab, node: int) -> Iterator[None]:
        """A run does not come to its end: the engines of one of its nodes stand still."""
        engines = [pid for pid, command in lab.processes(node).items() if command.startswith("sglang::scheduler")]
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in engines:
                with suppress(
                    ProcessLookupError
                ):  # held for longer than the watchdog allows, it was ended and started again
                    os.kill(pid, signal.SIGCONT)

    def wait_end(self, lab: Lab, name: str, job_id: str, state: str = "COMPLETED", empty: bool = True) -> None:
        """empty: no process of any job is left on any node."""
        wait_until(lambda: lab.job(job_id)["JobState"] in ENDED, f"job {job_id} did not end", self.shown(lab, name))
        assert lab.job(job_id)["JobState"] == state, self.log(name)
        if empty:
            lab.wait_empty()


@pytest.fixture(scope="session")
def start_lab(tmp_path_factory) -> Iterator[Callable[[str], Lab]]:
    """start_lab(process tracking): a running lab; skipped where that is impossible, but never with CI=true."""
    labs: dict[str, Lab] = {}
    made: list[Path] = []

    def start(process_tracking: str) -> Lab:
        if process_tracking not in labs:
            reason = why_no_lab()
            if reason:
                (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
            state = tmp_path_factory.getbasetemp() / f"lab-{process_tracking}"
            if len(str(state)) > 60:  # the sockets of Slurm and munge lie in it
                made.append(Path(tempfile.mkdtemp(prefix="fp8slurm-")))
                state = made[-1] / "lab"
            labs[process_tracking] = Lab(state, process_tracking)
            labs[process_tracking].do("up")
        return labs[process_tracking]

    yield start
    for lab in labs.values():
        lab.do("down")
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("slurm-runs"))


@pytest.fixture(scope="session")
def expert_runs(tmp_path_factory) -> Runs:
    """Runs of the tiny mixture of experts."""
    return Runs(tmp_path_factory.mktemp("slurm-expert-runs"), moe=True)


TABLE = ROOT / ".cache" / "faults.json"
"""Measured: seconds and steps lost to every fault."""


@pytest.fixture(scope="session")
def measure() -> Callable[..., Any]:
    """measure(lab, runs, name, what, before): a context from a fault until the run is past step `before` again."""

    @contextmanager
    def measured(lab: Lab, runs: Runs, name: str, what: str, before: int) -> Iterator[None]:
        begun = time.monotonic()
        attempt = runs.attempt(name)
        yield
        steps = 0
        if runs.attempt(name) > attempt:
            owner = json.loads((runs.path(name) / "attempts" / str(runs.attempt(name)) / "owner.json").read_text())
            phase, _, step = owner["checkpoint"].rpartition("_")
            steps = before - int(step) if phase == "step" else before
        TABLE.parent.mkdir(exist_ok=True)
        table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
        table[f"{what} ({lab.process_tracking})"] = {
            "seconds": round(time.monotonic() - begun, 1),
            "steps": max(0, steps),
        }
        TABLE.write_text(json.dumps(table, indent=1))

    return measured


def weight_bytes(run: Path, out: Path) -> dict[str, bytes]:
    """Every tensor of a run's newest checkpoint as bytes, by its Hugging Face name."""
    import torch
    from safetensors.torch import load_file

    from fp8slurm.checkpoint import torch_dist_to_hf

    newest = max((run / "checkpoints").glob("step_*"), key=lambda p: p.name)
    config = json.loads((run / "config.json").read_text())
    torch_dist_to_hf(newest, out, origin_hf_dir=config["model"]["hf_checkpoint"])
    tensors = {k: v for f in sorted(out.glob("*.safetensors")) for k, v in load_file(f).items()}
    return {k: v.contiguous().view(torch.uint8).numpy().tobytes() for k, v in tensors.items()}


@pytest.fixture
def same_run(runs, tmp_path) -> Callable[..., None]:
    """same_run(name, reference): equal records (no step twice, none missing) and equal weights in every byte."""
    from fp8slurm.observe.metrics import without_times

    def compare(name: str, reference: str, runs: Runs = runs) -> None:
        got, want = ([without_times(r) for r in read_metrics(runs.path(n))] for n in (name, reference))
        steps = [(r["phase"], r["step"]) for r in got]
        assert steps == [(r["phase"], r["step"]) for r in want], steps
        assert got == want
        a, b = weight_bytes(runs.path(name), tmp_path / "got"), weight_bytes(runs.path(reference), tmp_path / "want")
        assert a.keys() == b.keys() and not [k for k in b if a[k] != b[k]]
        shutil.rmtree(tmp_path / "got")
        shutil.rmtree(tmp_path / "want")

    return compare
