"""Start a run's tasks on this machine, and watch them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import names_in, patiently, read_json
from fp8slurm.core.processes import process_start, python_path
from fp8slurm.core.signals import ended_is_interrupted
from fp8slurm.process.environment import GPUS
from fp8slurm.process.monitor import LAUNCHER, launcher
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.task_errors import first_error
from fp8slurm.slurm import attempt
from fp8slurm.slurm.task import run_task

Seen = TypeVar("Seen")

END_GRACE_S = 20.0
"""Time for all tasks to end by themselves once one has failed."""


class RunFailed(RuntimeError):
    """The attempt ended with an error; the message is the first failing task's."""


def open_run(config: RunConfig) -> RunDirectory:
    """Create or reopen the run directory and begin an attempt on this machine.

    Raises:
        RunBusyError: a process or a job holds it.
        InputError: it belongs to a run of another model, precision or layout of data.
    """
    run = RunDirectory(config.run.root / config.run.name)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    run.acquire(holder=attempt.holder)
    try:
        attempt.write_versions(run, attempt.settle_configuration(config, run))
    except BaseException:
        run.release()
        raise
    return run


class Tasks(Protocol):
    """Processes on this machine that end together."""

    def poll(self) -> int | None: ...

    def end(self) -> None: ...


class LocalTasks:
    """The tasks under submitit's local executor, each with its own log files."""

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        import submitit

        executor = submitit.LocalExecutor(folder=run.attempt_dir / "logs")
        executor.update_parameters(tasks_per_node=place(config).tasks_per_node, timeout_min=60 * 24 * 365)
        environment = dict(os.environ)
        os.environ["PYTHONPATH"] = python_path()
        os.environ["PYTHONSAFEPATH"] = "1"  # as in a job's script
        os.environ[GPUS] = environment.get("CUDA_VISIBLE_DEVICES", "all")
        os.environ[LAUNCHER] = launcher()
        job = executor.submit(run_task, config.model_dump_json(), str(run.path.resolve()), run.attempt)
        os.environ.clear()
        os.environ.update(environment)
        assert isinstance(job, submitit.LocalJob) and job._process is not None
        self._process = job._process

    def poll(self) -> int | None:
        return self._process.poll()

    def end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


class ForegroundTasks:
    """slurm.executor debug: plain child processes, everything that they say on this terminal."""

    def __init__(self, config: RunConfig, run: RunDirectory) -> None:
        (run.attempt_dir / "logs").mkdir(exist_ok=True)  # of the engines
        path = run.attempt_dir / "config.json"
        path.write_text(config.model_dump_json())
        command = [sys.executable, "-u", "-m", "fp8slurm.slurm.foreground", str(path), str(run.path.resolve())]
        environment = os.environ | {"PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1", LAUNCHER: launcher()}
        self._processes = [
            subprocess.Popen([*command, str(run.attempt), str(task.index)], env=environment)
            for task in place(config).tasks
        ]

    def poll(self) -> int | None:
        codes = [code for p in self._processes if (code := p.poll()) is not None]
        return max(codes, key=abs) if len(codes) == len(self._processes) else None

    def end(self) -> None:
        for p in self._processes:
            p.wait(30)


def run_here(config: RunConfig, run: RunDirectory, watch: Callable[[], None] = lambda: None) -> None:
    """Run every task on this machine and wait; `watch` is called a few times a second.

    Raises:
        RunFailed: a task ended with an error.
        KeyboardInterrupt: after every task was ended; SIGTERM and SIGHUP do that too.
    """
    with ended_is_interrupted():
        _run_here(config, run, watch)


def _run_here(config: RunConfig, run: RunDirectory, watch: Callable[[], None]) -> None:
    kinds: dict[str, type] = {"local": LocalTasks, "debug": ForegroundTasks}
    tasks: Tasks = kinds[config.slurm.executor](config, run)
    try:
        failed_at: float | None = None
        killed = False
        while tasks.poll() is None:
            _in_passing(watch, None)
            time.sleep(0.2)
            if failed_at is None and _in_passing(lambda: any((run.attempt_dir / "errors").glob("task_*.json")), False):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > END_GRACE_S:
                _end_tasks(run)  # a stopped process ends with nobody: it does not even notice
                killed = True
                failed_at = time.monotonic()
    except BaseException:
        _end_tasks(run)
        tasks.end()
        raise
    _in_passing(watch, None)
    error = patiently(lambda: first_error(run.attempt_dir, vanished=not killed))
    if error is not None:
        raise RunFailed(error)
    expected = place(config).tasks_per_node
    done = sum(name.endswith(".done") for name in patiently(lambda: names_in(run.attempt_dir / "tasks")))
    if done < expected:
        raise RunFailed(f"{expected - done} tasks ended without a word; their logs are in {run.attempt_dir / 'logs'}")


def _in_passing(look: Callable[[], Seen], otherwise: Seen) -> Seen:
    """What `look` sees of a run that goes on; `otherwise` where a shared file system stumbles: the next look is soon,
    and the run needs none."""
    try:
        return look()
    except (OSError, TransientInputError):
        return otherwise


def _end_tasks(run: RunDirectory, grace_s: float = 10.0) -> None:
    """Ask this attempt's tasks to end, by pid, and end those that do not."""

    def read() -> list[dict[str, Any]]:
        return [read_json(p) for p in (run.attempt_dir / "tasks").glob("[0-9]*.json")]

    try:
        tasks = patiently(read)
    except (OSError, TransientInputError) as error:  # submitit's own process ends them too
        print(f"fp8slurm: who the run's tasks are cannot be read: {error}", file=sys.stderr)
        tasks = []

    def living() -> list[int]:
        return [t["pid"] for t in tasks if process_start(t["pid"]) == t["start"]]

    for pid in living():
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while living() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in living():
        os.kill(pid, signal.SIGKILL)
