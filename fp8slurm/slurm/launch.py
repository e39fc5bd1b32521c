"""Start a run's tasks through submitit and watch them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Callable

from fp8slurm.checkpoint.run import RunDirectory, RunState, damage, write_atomic
from fp8slurm.config import RunConfig
from fp8slurm.slurm.monitor import first_error
from fp8slurm.slurm.placement import place
from fp8slurm.slurm.task import run_task


END_GRACE_S = 20.0
"""Time for all tasks to end by themselves once one has failed."""


class RunFailed(RuntimeError):
    """The attempt ended with an error; the message is the first failing task's."""


def open_run(config: RunConfig) -> RunDirectory:
    """Create or reopen the run directory and begin an attempt.

    Raises:
        RunBusyError: another process holds it.
        ValueError: it belongs to a run of another model or layout of data.
    """
    run = RunDirectory(config.run.root / config.run.name)
    run.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    run.acquire()
    try:
        saved = run.path / "config.json"
        if saved.is_file():
            changes = changed_keys(json.loads(saved.read_text()), config.model_dump(mode="json"))
            for key in changes:
                if key.split(":")[0] in ("model.hf_checkpoint", "model.dtype", "data.train", "run.seed"):
                    raise ValueError(f"{run.path} belongs to another run ({key}): choose another name with --run.name")
        write_atomic(saved, config.model_dump_json(indent=1))
        versions = {"command": sys.argv, "packages": package_versions()}
        write_atomic(run.attempt_dir / "versions.json", json.dumps(versions, indent=1))
    except BaseException:
        run.release()
        raise
    return run


def finished(config: RunConfig, run: RunDirectory) -> bool:
    """Whether the newest checkpoint is that of the last step."""
    last = RunState("rl", config.run.steps).name
    return run.checkpoint_names()[:1] == [last] and not damage(run.checkpoints / last)


def changed_keys(old: dict, new: dict) -> list[str]:
    """ "section.key: old -> new" for every setting that differs."""
    out = []
    for section, values in new.items():
        for key, value in values.items():
            before = old.get(section, {}).get(key)
            if before != value:
                out.append(f"{section}.{key}: {before!r} -> {value!r}")
    return out


def package_versions() -> dict[str, str]:
    from importlib import metadata

    names = ("fp8slurm", "torch", "megatron-core", "sglang", "transformers", "transformer-engine", "submitit")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def run_local(config: RunConfig, run: RunDirectory, watch: Callable[[], None] = lambda: None) -> None:
    """Run every task on this machine and wait; `watch` is called a few times a second.

    Raises:
        RunFailed: a task ended with an error.
        KeyboardInterrupt: after every task was ended.
    """
    import submitit

    placement = place(config)
    executor = submitit.LocalExecutor(folder=run.attempt_dir / "logs")
    executor.update_parameters(tasks_per_node=placement.tasks_per_node, timeout_min=60 * 24 * 365)
    environment = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        p for p in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if p
    )
    job = executor.submit(run_task, config.model_dump_json(), str(run.path.resolve()), run.attempt)
    os.environ.clear()
    os.environ.update(environment)
    process = job._process
    assert process is not None
    try:
        failed_at: float | None = None
        killed = False
        while process.poll() is None:
            watch()
            time.sleep(0.2)
            if failed_at is None and any((run.attempt_dir / "errors").glob("task_*.json")):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > END_GRACE_S:
                _end_tasks(run)  # a stopped process ends with nobody: it does not even notice
                killed = True
                failed_at = time.monotonic()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        _end_tasks(run)
        process.wait(30)
        raise
    watch()
    error = first_error(run.attempt_dir, vanished=not killed)
    if error is not None:
        raise RunFailed(error)
    done = len(list((run.attempt_dir / "tasks").glob("*.done")))
    if done < placement.tasks_per_node:
        raise RunFailed(
            f"{placement.tasks_per_node - done} tasks ended without a word; their logs are in {run.attempt_dir / 'logs'}"
        )


def _end_tasks(run: RunDirectory, grace_s: float = 10.0) -> None:
    """Ask this attempt's tasks to end, by pid, and end those that do not."""
    from fp8slurm.checkpoint.run import process_start

    def living() -> list[int]:
        tasks = [
            json.loads(p.read_text()) for p in (run.attempt_dir / "tasks").glob("*.json") if not p.name.startswith(".")
        ]
        return [t["pid"] for t in tasks if process_start(t["pid"]) == t["start"]]

    for pid in living():
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while living() and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in living():
        os.kill(pid, signal.SIGKILL)
