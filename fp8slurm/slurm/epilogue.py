"""The last line of a job script: `python -m fp8slurm.slurm.epilogue STATUS RUN_DIR`, once srun has ended.

Where the tasks stopped as planned, or the run is finished, there is nothing left to do. Where one of them died, the job
goes back into the queue, as long as the run makes progress; else the reason is the last thing in the job's log.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import names_in, patiently, read_json, write_atomic
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.task_errors import ENDED, STOPPED, VERDICT, first_error, left_out, task_errors
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import Job, SlurmError
from fp8slurm.slurm import attempt, bad_nodes
from fp8slurm.slurm.requeue import go_on

LINGER_S = 60.0
"""Slurm ends the script of a job that was requeued; until then it must not look as if the job had ended by itself."""
LOOKS_AGAIN_S = (2.0, 10.0, 60.0, 120.0)
"""Pauses where the run directory or Slurm does not answer: with this process the run would end."""
FAILED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
LOST = re.compile(r"srun: error: (Aborting, io error.*|Node failure on .*)")
"""srun has lost a node, and ends the tasks of the others for it."""
CANCELLED = re.compile(r"slurmstepd\S*: error: \*\*\* (?:STEP|JOB) .* CANCELLED AT \S+(?: DUE TO (.+?))? \*\*\*")
"""Slurm ends the tasks: DUE TO JOB REQUEUE, PREEMPTION or TIME LIMIT; scancel gives no reason."""
OTHERS = re.compile(r"srun: |slurmstepd\S*: |submitit ")
"""Begins a line that is not the task's own."""


def after(status: int, path: Path, config: RunConfig | None = None) -> int:
    """What to do after the tasks ended with `status`; returns the job script's exit status.

    config: of a script of the user's own; left out: what `submit` wrote into the run directory.
    """
    job = Job.here()
    if job is None:
        raise InputError("this is no Slurm job: the command is the last line of a job script")
    for pause in LOOKS_AGAIN_S:
        try:
            return _after(status, path, job, config)
        except (OSError, TransientInputError, SlurmError) as error:
            _say(f"{error}; looks again in {pause:g} s")
            time.sleep(pause)
    return _after(status, path, job, config)


def _after(status: int, path: Path, job: Job, config: RunConfig | None) -> int:
    run = attempt.find(path, Job(job.id, job.restart, None))
    if run is None:
        return status if status == 0 or not _again_unbegun(path, job, config) else 0
    stopped = run.attempt_dir / STOPPED
    if stopped.is_file():
        record = read_json(stopped)
        _say(f"{record.get('why')}: {record.get('next') or record.get('why_not')}")
        if record.get("next") == "requeued":
            time.sleep(LINGER_S)
        return 0 if record.get("next") else status or 1
    if status == 0:
        return 0
    shown = slurm.show_job(job.id) or {}
    if shown.get("JobState") != "RUNNING" and (ended := patiently(lambda: _ended_by_slurm(run, shown))):
        _say(f"attempt {run.attempt} was {ended}")
        return status
    try:
        text = patiently(lambda: _verdict(run, shown))
    except TransientInputError as error:  # a file that stays torn: it is named, and the run goes on
        text = str(error)
    _say(f"attempt {run.attempt} failed:\n{text}")
    if shown.get("JobState") != "RUNNING":  # cancelled, out of time, or requeued by Slurm
        return status
    return status if not _again(_configuration(path), run, job, shown) else 0


def _configuration(path: Path) -> RunConfig:
    return RunConfig.model_validate(read_json(path / "config.json"))


def _again_unbegun(path: Path, job: Job, config: RunConfig | None) -> bool:
    """Requeue a job whose start began no attempt, unless it says that the next one would not either; whether it was.
    The reason is in the log already."""
    if (slurm.show_job(job.id) or {}).get("JobState") != "RUNNING":
        return False
    if config is None and not (path / "config.json").is_file():
        return False
    config = config or _configuration(path)
    folder = attempt.unbegun(path, job)
    folder.mkdir(parents=True, exist_ok=True)
    count = attempt.unbegun_starts(path, job)
    if not config.slurm.requeue or _permanent(folder):
        return False
    if count >= config.slurm.max_attempts_without_progress:
        _say(f"{path}: {count} starts in a row began no attempt (slurm.max_attempts_without_progress); the run ends")
        return False
    try:
        slurm.requeue(job.id)
    except SlurmError as refusal:
        _say(f"scontrol requeue: {refusal}")
        return False
    _say("no attempt was begun: requeued")
    time.sleep(LINGER_S)
    return True


def _permanent(folder: Path) -> bool:
    """Whether a task has said that another attempt would only meet its error again. A file that stays torn says
    nothing."""
    for name in names_in(folder / "errors"):
        if name.startswith("task_") and name.endswith(".json"):
            try:
                if patiently(lambda: read_json(folder / "errors" / name)).get("permanent") is True:
                    return True
            except TransientInputError as error:
                _say(str(error))
    return False


def _again(config: RunConfig, run: RunDirectory, job: Job, shown: dict[str, str]) -> bool:
    """Requeue the job if that makes sense; whether it was."""
    if not config.slurm.requeue:
        _say("slurm.requeue is off: submit the run again to go on")
        return False
    if _permanent(run.attempt_dir):
        _say("another attempt would only meet this again: the run ends")
        return False
    count = attempt.without_progress(run, Job(job.id, job.restart, None))
    if count >= config.slurm.max_attempts_without_progress:
        _say(attempt.no_progress(config, run, count))
        return False
    record: dict[str, Any] = {"why": "a task died", "at": "", "saved": False, "time": time.time(), "why_not": ""}
    record = go_on(run, job, record, dict(os.environ), _bad_node(config, run, shown))
    if left := record.get("left_out"):
        _say(f"{left['node']} is left out from here on ({left['why']})")
    _say(record["next"] or record["why_not"])
    if record["next"] == "requeued":
        time.sleep(LINGER_S)
    return bool(record["next"])


def _bad_node(config: RunConfig, run: RunDirectory, shown: dict[str, str]) -> dict[str, str] | None:
    """The node that the job is not to get again. Finding it must not cost the requeue."""
    try:
        hosts = bad_nodes.hosts_of(config, slurm.node_names(shown.get("NodeList", "")))
        node, fault = bad_nodes.blamed(run, _said(run, shown), hosts)
        if not node:
            return None
        verdict = run.attempt_dir / "errors" / VERDICT
        write_atomic(verdict, json.dumps(read_json(verdict) | {"node": node, "fault": fault}))
        _say(f"{node} brought this attempt down: {fault}")
        bad = bad_nodes.to_leave_out(config, run)
        total = slurm.nodes_of_partition(shown.get("Partition", ""))
        if bad and total is not None and total < config.slurm.nodes + len(left_out(run.attempts)) + 1:
            _say(f"{node} is not left out: partition {shown.get('Partition')} has {total} nodes")
            return None
        return bad
    except (OSError, TransientInputError, SlurmError) as error:
        _say(f"whether a node is to be left out is not known: {error}")
        return None


def _said(run: RunDirectory, job: dict[str, str]) -> list[str]:
    """The lines of the job's log since the attempt began."""
    log = Path(job.get("StdErr", ""))
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    begun = f"attempt {run.attempt}, logs in"
    return lines[max((i for i, line in enumerate(lines) if begun in line), default=0) :]


def _ended_by_slurm(run: RunDirectory, job: dict[str, str]) -> str:
    """Who ended the tasks of a job that does not run any more, in words, kept for readers of the attempt; "" where a
    task had failed before that."""
    reason: str | None = None
    for line in _said(run, job):
        if cancelled := CANCELLED.search(line):
            reason = (cancelled[1] or "cancelled").lower()
            break
        failed = FAILED.search(line)
        if LOST.search(line) or (failed and not re.search("exit code 143|Terminated", failed[3])):
            return ""
    errors = task_errors(run.attempt_dir)
    if "fail" in (reason or "") or (
        errors and not ENDED.fullmatch(min(errors, key=lambda e: e.get("time", 0.0))["text"].strip())
    ):
        return ""
    text = f"ended by Slurm ({reason or 'requeued or cancelled'})"
    _keep_verdict(run, {"text": text, "primary": False})
    return text


def _keep_verdict(run: RunDirectory, verdict: dict[str, Any]) -> None:
    (run.attempt_dir / "errors").mkdir(exist_ok=True)
    write_atomic(run.attempt_dir / "errors" / VERDICT, json.dumps({"time": time.time(), **verdict}))


def _verdict(run: RunDirectory, job: dict[str, str]) -> str:
    """Who failed first, by srun's word, and that task's own last words; kept for first_error."""
    first = next((m for line in _said(run, job) if (m := LOST.search(line) or FAILED.search(line))), None)
    text = first_error(run.attempt_dir) or "the tasks ended without a word"
    if first is not None and first.re is LOST:
        nodes = f" (nodes {job['NodeList']}, counted from 0)" if "on node " in first[1] and job.get("NodeList") else ""
        text = f"{first[1]}{nodes}"
    elif first is not None:
        task = re.split("[,-]", first[2])[0]
        own = run.attempt_dir / "errors" / f"task_{task}.json"
        error = read_json(own) if own.is_file() else None
        if error is None:
            text = f"task {first[2]} on {first[1]}: {first[3]}{_last_words(run, task)}"
        elif error["primary"]:
            text = f"task {task}: {error['text']}"
    _keep_verdict(run, {"text": text, "primary": True})
    return text


def _last_words(run: RunDirectory, task: str) -> str:
    """The last line that a task wrote before it had a log in its attempt, and where it stands; "" where it had one."""
    from fp8slurm.run.directory import SLURM_FOLDER

    assert run.attempt is not None
    job = (run.owner(run.attempt) or {}).get("job")
    file = run.path / SLURM_FOLDER / f"{job}_{task}_log.err"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    own = [line.strip() for line in lines if line.strip() and not OTHERS.match(line)]
    return f"; {file}: {own[-1]}" if own and "logs in" not in own[-1] else ""


def _say(text: str) -> None:
    print(f"fp8slurm: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """`fp8slurm after STATUS --recipe R [--section.key VALUE ...]`: for hand-written job scripts."""
    from fp8slurm.config import parse_command, recipe_parser

    asks = argv[:1] in (["-h"], ["--help"])
    if not asks and (not argv or not argv[0].isdigit()):
        raise InputError('the first argument must be the exit status of srun: exec fp8slurm after $? "${ARGS[@]}"')
    if "--dry-run" in argv:
        raise InputError("--dry-run: use fp8slurm submit --dry-run")
    parser = recipe_parser(
        "fp8slurm after STATUS",
        "The last line of a job script of your own, with srun's exit status and the settings of its workers: exec "
        'fp8slurm after $? "${ARGS[@]}". Requeues the job where a task died, as long as the run makes progress.',
    )
    _, config = parse_command(parser, argv if asks else argv[1:])
    return after(int(argv[0]), (config.run.root / config.run.name).resolve(), config)


if __name__ == "__main__":
    sys.exit(after(int(sys.argv[1]), Path(sys.argv[2])))
