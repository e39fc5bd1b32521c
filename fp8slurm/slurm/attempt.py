"""Beginning an attempt inside a Slurm job: one task creates it, the others find it by the job's number."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.formats.complete import damage
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import patiently, read_json, sha256, write_atomic
from fp8slurm.core.processes import process_of
from fp8slurm.eval.tasks import further_tasks
from fp8slurm.models.precision import engine_in_fp8, serves_fp8
from fp8slurm.run.directory import SLURM_FOLDER, RunDirectory, RunState, rl_step
from fp8slurm.run.phases import CHECKING, enter_phase, keep_phases
from fp8slurm.run.task_errors import VERDICT, describe, first_error, is_permanent, record_error
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import Job, SlurmError

JOIN_TIMEOUT_S = 600.0

GUARDED = (
    "model.hf_checkpoint", "model.dtype", "fp8.backend", "fp8.engine", "data.train", "data.sources", "data.prompt_key",
    "data.shuffle",
    "data.max_prompt_tokens", "data.on_bad_line", "data.chat_template_kwargs", "sft.data", "sft.prompt_key",
    "sft.response_key",
    "run.seed",
    "optim.distributed",
)  # fmt: skip
"""Settings that a run keeps: the weights it started from, its precision, and what its data cursors count."""
PATHS = ("model.hf_checkpoint", "data.train", "sft.data")
"""Those of them that are paths: another spelling of the same one is no change."""
DATA = "data.json"
"""Of a run's folder: what its data files were when it was last started."""
WAITING = ("dependency", "kill-on-invalid-dep")
"""Parameters of sbatch that say what one job waits for; they are no setting of the run."""


class NoProgressError(InputError):
    """Too many attempts in a row without a new checkpoint."""


def settle_configuration(config: RunConfig, run: RunDirectory) -> list[str]:
    """Write config.json; returns the settings that differ from the attempt before.

    Raises:
        InputError: as check_configuration.
    """
    changes = patiently(lambda: _changed_settings(config, run))
    changed_data, sums = patiently(lambda: _changed_data(config, run))
    settings = json.dumps(_without_waiting(config.model_dump(mode="json")), indent=1)
    patiently(lambda: write_atomic(run.path / "config.json", settings))
    patiently(lambda: write_atomic(run.path / DATA, json.dumps(sums, indent=1)))
    return changes + changed_data


def _without_waiting(settings: dict[str, Any]) -> dict[str, Any]:
    section = settings.get("slurm", {})
    sbatch = {k: v for k, v in section.get("sbatch", {}).items() if k.replace("_", "-") not in WAITING}
    return settings | {"slurm": section | {"sbatch": sbatch}}


def check_configuration(config: RunConfig, run: RunDirectory) -> list[str]:
    """The settings that differ from the attempt before; nothing is written.

    Raises:
        InputError: the directory belongs to a run of another model, precision or layout of data.
    """
    return _changed_settings(config, run) + _changed_data(config, run)[0]


def refuse_vain_changes(config: RunConfig, run: RunDirectory) -> None:
    """A finished run is not made again. InputError: it was made with other settings than these; how it is started
    (slurm, where the folder is) is no part of it."""
    changes = [c for c in check_configuration(config, run) if not c.startswith(("slurm.", "run.root:"))]
    if changes:
        raise InputError(
            f"{run.path} is finished, and other settings than its own change nothing: {'; '.join(changes)}. Leave it "
            f"out, or choose another name with --run.name"
        )


def _changed_settings(config: RunConfig, run: RunDirectory) -> list[str]:
    saved = run.path / "config.json"
    changes: list[str] = []
    if saved.is_file():
        settings = read_json(saved)
        if foreign := [key for key, values in settings.items() if not isinstance(values, dict)]:
            raise TransientInputError(f"{saved}: {', '.join(foreign):.200} is no section of settings")
        old = _without_waiting(settings)
        # Settings that an older version did not have were what they are by default.
        full = {name: values | old.get(name, {}) for name, values in RunConfig().model_dump(mode="json").items()}
        changes = changed_keys(full, _without_waiting(config.model_dump(mode="json")))
        guarded = set(GUARDED)
        if not _same_precision(old.get("model", {}).get("rollout_checkpoint"), config):
            guarded.add("model.rollout_checkpoint")
        if _counted(full["data"]["sources"]) == _counted(config.model_dump(mode="json")["data"]["sources"]):
            guarded.discard("data.sources")  # another reward or label, as with data.train
        foreign = [c for c in changes if c.split(":")[0] in guarded]
        if foreign and run.newest_checkpoint():
            raise InputError(f"{run.path} belongs to another run ({'; '.join(foreign)}): choose another --run.name")
    return changes


def _counted(sources: dict[str, dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What of data.sources a data cursor counts."""
    return [(n, str(Path(s["file"]).resolve()), s.get("weight"), s.get("prompt_key")) for n, s in sources.items()]


def _changed_data(config: RunConfig, run: RunDirectory) -> tuple[list[str], dict[str, Any]]:
    """(the data files whose content is not that of the run's last start, what data.json has to say from now on).

    InputError: there is a checkpoint to go on from, and data.on_changed_file is "error".
    """
    try:
        before = read_json(run.path / DATA)
        if not all(isinstance(said, dict) and "bytes" in said and "sha256" in said for said in before.values()):
            raise TransientInputError(f"{run.path / DATA}: allowed are settings with bytes and sha256 of their files")
    except FileNotFoundError:  # a first start, or a run of a version that kept no sums
        before = {}
    present = _data_files(config)
    changed = [f"{key}: other content ({present[key]['bytes']} bytes, {before[key]['bytes']} at the last start)"
               for key in present if key in before and before[key] != present[key]]  # fmt: skip
    if changed and config.data.on_changed_file == "error" and run.newest_checkpoint():
        raise InputError(
            f"{run.path}: {'; '.join(changed)}: its checkpoints count rows of the file that was there; put it back, "
            f"choose another name with --run.name, or go on with --data.on-changed-file warn"
        )
    return changed, before | present  # a file that is away for a moment keeps its sum


def _data_files(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of the data files that are there, by their settings."""
    files = {"data.train": config.data.train, "data.eval": config.data.eval, "sft.data": config.sft.data}
    files |= {f"data.sources {name}": source.file for name, source in config.data.sources.items()}
    files |= {f"eval.tasks {task.name}": task.data for task in further_tasks(config)}
    return {
        key: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for key, path in files.items()
        if path is not None and path.is_file()
    }


def _same_precision(before: str | None, config: RunConfig) -> bool:
    """Whether engines that loaded the folder `before` (None: made from the model) had the precision of now."""
    try:
        return serves_fp8(before, config.fp8.engine, config.fp8.backend) == engine_in_fp8(config)
    except (OSError, InputError):  # the folder is gone
        return True


def changed_keys(old: dict, new: dict) -> list[str]:
    """ "section.key: old -> new" for every setting that differs."""
    out = []
    for section, values in new.items():
        for key, value in values.items():
            before = old.get(section, {}).get(key)
            if before != value and not (f"{section}.{key}" in PATHS and same_path(before, value)):
                out.append(f"{section}.{key}: {before!r} -> {value!r}")
    return out


def same_path(a: str | None, b: str | None) -> bool:
    """Whether two paths, relative ones taken from this process's folder, lead to the same place."""
    return a == b or (a is not None and b is not None and Path(a).resolve() == Path(b).resolve())


def write_versions(run: RunDirectory, changes: list[str]) -> None:
    """versions.json of the attempt: the command, the packages, and what was changed since the attempt before."""
    versions = {"command": sys.argv, "packages": package_versions(), "changed": changes}
    patiently(lambda: write_atomic(run.attempt_dir / "versions.json", json.dumps(versions, indent=1)))


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


def finished(config: RunConfig, run: RunDirectory, verify: bool = False) -> bool:
    """Whether the newest sealed checkpoint is that of the last step, or of a later one; verify: and undamaged, which
    means to read it all."""
    newest = run.newest_checkpoint()
    return rl_step(newest) >= config.run.steps and not (verify and damage(run.checkpoints / newest))


def last_checkpoint(config: RunConfig, run: RunDirectory) -> str:
    """Name of the checkpoint that a run ends with: the newest, if it is of run.steps or later, else the one to come."""
    return run.newest_checkpoint() if finished(config, run) else RunState("rl", config.run.steps).name


def holder(held: dict[str, Any]) -> str | None:
    """The living holder of an attempt in words: a job that waits or runs, or a process of this machine; None if gone.

    A start of one's own job is no holder: Slurm begins the next one when the one before is over, or cut off.
    """
    if "job" not in held:
        return process_of(held)
    mine = Job.here()
    if mine is not None and held["job"] == mine.id:
        return None
    try:
        return f"job {held['job']}" if slurm.is_active(held["job"]) else None
    except SlurmError as error:
        print(f"fp8slurm: cannot ask Slurm about job {held['job']}, which held the run ({error})", file=sys.stderr)
        return None  # the attempt number fences it off


def without_progress(run: RunDirectory, job: Job) -> int:
    """Attempts in a row, the newest included, of this job (or of one that it was resubmitted from), that began at the
    checkpoint that is still the newest."""
    newest, id, count = run.newest_checkpoint(), job.id, 0
    for attempt in range(run.newest_attempt(), -1, -1):
        try:
            owner = run.owner(attempt) or {}
            if "job" not in owner or owner.get("checkpoint") != newest:
                break
            if owner["job"] != id and _stopped(run.attempts / str(attempt)).get("resubmitted") != id:
                break
        except TransientInputError:  # torn: whose it was is not known any more
            break
        id = owner["job"]
        count += 1
    return count


def begin(config: RunConfig, path: Path, job: Job) -> RunDirectory:
    """Begin the next attempt for this start of the job (one task calls this).

    Raises:
        RunBusyError: another job or process holds the run directory.
        NoProgressError: slurm.max_attempts_without_progress attempts in a row made no new checkpoint.
        InputError: as settle_configuration.
    """
    run = RunDirectory(path)
    patiently(lambda: run.path.mkdir(parents=True, exist_ok=True, mode=0o700))
    count = patiently(lambda: without_progress(run, job))
    if count >= config.slurm.max_attempts_without_progress:
        text = no_progress(config, run, count)
        _say_the_end(run, text)
        raise NoProgressError(text)
    owner = {"job": job.id, "restart": job.restart, "step": job.step, "checkpoint": patiently(run.newest_checkpoint)}
    owner["arguments"] = slurm.script_arguments(job.id)
    run.acquire(owner, holder)
    keep_phases(run.attempt_dir, 0)
    enter_phase(CHECKING)
    try:  # an attempt that has not begun is found by nobody else
        changes = settle_configuration(config, run)
        write_versions(run, changes)
        patiently(lambda: (run.attempt_dir / "logs").mkdir(exist_ok=True))
    except Exception as error:
        record_error(run.attempt_dir / "errors", 0, describe(error), permanent=is_permanent(error))
        if not is_permanent(error):
            patiently((run.attempt_dir / "begun").touch)  # for the job script, which puts the job back into the queue
        raise
    patiently((run.attempt_dir / "begun").touch)
    return run


def unbegun(path: Path, job: Job) -> Path:
    """The folder in which a start of the job that began no attempt says why."""
    return path / SLURM_FOLDER / f"unbegun_{job.id}_{job.restart}"


def unbegun_starts(path: Path, job: Job) -> int:
    """Starts in a row, this one included, that began no attempt."""
    count = 0
    while job.restart - count >= 0 and unbegun(path, Job(job.id, job.restart - count, None)).is_dir():
        count += 1
    return count


def no_progress(config: RunConfig, run: RunDirectory, count: int) -> str:
    """Why the run is not started again."""
    last = run.newest_attempt()
    folder = run.attempts / str(last)
    error = _planned_stop(config, folder) or first_error(folder) or "it ended without a word"
    head = f"{run.path}: {count} attempts in a row without a new checkpoint"
    if error.startswith(head):  # said before, to an earlier start of the job
        return error
    return f"{head} (slurm.max_attempts_without_progress); the run ends. Attempt {last}: {error}"


def _planned_stop(config: RunConfig, folder: Path) -> str:
    """How the attempt stopped, and what would leave it more time; "" where it did not stop as planned."""
    record = _stopped(folder)
    if not record or record.get("why") == "a task died":
        return ""
    why = record.get("why") or "as planned"
    how = why.removeprefix("stopped ") if why.startswith("stopped ") else f"({why})"
    s, where = config.slurm, f" at {record['at']}" if record.get("at") else ""
    after = ""
    if record.get("time") and (folder / "owner.json").is_file():
        after = f" {record['time'] - (folder / 'owner.json').stat().st_mtime:.0f} s after its start"
    return (
        f"it stopped {how}{where}{after}; --slurm.time {s.time} with --slurm.signal-delay-s {s.signal_delay_s} leaves "
        f"no time for a step (or preemptions came sooner)"
    )


def _stopped(folder: Path) -> dict[str, Any]:
    path = folder / "stopped.json"
    return read_json(path) if path.is_file() else {}


def _say_the_end(run: RunDirectory, text: str) -> None:
    """The run ends before there is another attempt: the newest one's folder says so, for `fp8slurm status`."""
    folder = run.attempts / str(run.newest_attempt())
    if record := _stopped(folder):
        write_atomic(
            folder / "stopped.json",
            json.dumps(record | {"next": "", "why_not": "too many attempts without a new checkpoint"}),
        )
    if not (folder / "errors" / VERDICT).is_file():
        (folder / "errors").mkdir(exist_ok=True)
        write_atomic(folder / "errors" / VERDICT, json.dumps({"time": time.time(), "text": text}))


def find(path: Path, job: Job) -> RunDirectory | None:
    """The attempt of this start of the job, once it has been begun. What stays torn is another's."""
    run = RunDirectory(path)
    newest = run.newest_attempt()
    try:
        owner = patiently(lambda: run.owner(newest))
    except TransientInputError:
        return None
    if owner is None or (owner.get("job"), owner.get("restart")) != (job.id, job.restart):
        return None
    if job.step is not None and owner.get("step") != job.step:  # a step of the same allocation before this one
        return None
    run.attempt = newest
    return run if (run.attempt_dir / "begun").exists() else None


def join(path: Path, job: Job, timeout_s: float = JOIN_TIMEOUT_S) -> RunDirectory:
    """Wait for the attempt of this start of the job. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while (run := patiently(lambda: find(path, job))) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: task 0 did not begin an attempt for job {job.id} within {timeout_s:g} s")
        time.sleep(0.1)
    return run
