"""Where runs stand, from their directories and from Slurm; nothing is written, and nothing has to be whole."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.core.numbers import number
from fp8slurm.observe.console import TIMES, format_duration
from fp8slurm.observe.metrics import Record
from fp8slurm.run.alerts import alerts, bound_of
from fp8slurm.run.attempts import Attempt, holder_state, read_attempt, run_state
from fp8slurm.run.directory import SLURM_FOLDER, RunDirectory, is_run
from fp8slurm.run.gpu_use import NodeGpus, read_gpus
from fp8slurm.run.phases import read_phases
from fp8slurm.run.read_json import read_json
from fp8slurm.run.reader import parse_records
from fp8slurm.run.task_errors import left_out
from fp8slurm.run.timeline import who_waits
from fp8slurm.scheduler.queue import SlurmJob, jobs

TAIL_BYTES = 1 << 18
"""As much of metrics.jsonl is read, from its end."""
SPEED_WINDOW = 10
"""Steps of the latest phase whose mean time is the speed."""


@dataclass(frozen=True)
class Link:
    """One job of a chain (chain.json)."""

    name: str
    job_id: str | None
    """None: it was done already when the chain was submitted."""
    state: str
    """Slurm's, in lower case; done for a link that was skipped; unknown where Slurm has forgotten the job."""
    log: str


@dataclass(frozen=True)
class RunStatus:
    """One run; None is "not known" or "not yet"."""

    name: str
    path: str
    state: str
    """A Slurm job's state in lower case while it waits or runs; running, held (by a process on another machine),
    finished, failed, stopped or new without one; unknown where Slurm was asked about a job and did not answer."""
    attempt: int | None
    job_id: str | None
    job: SlurmJob | None
    doing: str | None
    """What keeps an attempt that runs from training, and for how long (run/phases.py); None: it trains, or is over."""
    phase: str | None
    step: int | None
    total: int | None
    """Steps of the phase, from config.json."""
    reward: float | None
    """reward/mean of the newest step that has one."""
    accuracy: float | None
    """eval/accuracy of the newest step that has one."""
    step_seconds: float | None
    """Mean of the last steps, saving included."""
    tokens_per_s: float | None
    remaining_s: float | None
    waits: dict[str, float]
    """Where the time of the last steps went: phase (as in time/PHASE) -> its share, largest first."""
    alerts: tuple[str, ...]
    """What somebody should look at (run/alerts.py)."""
    gpus: tuple[NodeGpus, ...]
    """Of each node, while the newest attempt goes on."""
    record_age_s: float | None
    """Since metrics.jsonl was written to."""
    checkpoint: str | None
    """Newest complete one; sizes are compared, checksums are not."""
    checkpoint_age_s: float | None
    stop: str | None
    """How the newest attempt stopped as planned, and what follows (stopped.json)."""
    left_out: tuple[str, ...]
    """Nodes that the job does not get any more, and why."""
    error: str | None
    """Of the newest attempt that left one."""
    error_attempt: int | None
    links: tuple[Link, ...]
    notes: tuple[str, ...]
    """What could not be read, and why."""
    problem: str | None
    """Why Slurm could not be asked about the run's job."""
    who_waits: str = ""
    """Who waits for whom in the newest step that says it (timeline.who_waits)."""


def find_runs(root: Path) -> list[Path]:
    """Run directories in `root`, by name."""
    try:
        return sorted(p for p in root.iterdir() if _is_run(p))
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    try:
        return path.is_dir() and is_run(path)
    except OSError:  # somebody else's: run directories are 0700
        return False


def find_run(name: str, root: Path) -> Path:
    """A run by its path or by its name in `root`. InputError: there is none."""
    for path in (Path(name), root / name):
        if path in find_runs(path.parent):
            return path
    there = ", ".join(p.name for p in find_runs(root)) or "none"
    raise InputError(f"{name}: no run directory of that path, and none of that name in {root} (--root); there: {there}")


def statuses(paths: Iterable[Path], now: float | None = None) -> tuple[list[RunStatus], str]:
    """The runs' statuses, and why Slurm could not be asked ("": it answered, or no run has a job)."""
    gathered = [Facts(path, time.time() if now is None else now) for path in paths]
    known, problem = jobs(i for facts in gathered for i in facts.job_ids)
    return [facts.status(known, problem) for facts in gathered], problem


class Facts:
    """What a run directory says, before Slurm is asked."""

    def __init__(self, path: Path, now: float) -> None:
        self.path, self.now = path, now
        self.notes: list[str] = []
        self.run = RunDirectory(path)
        self.config = read_json(path / "config.json", self.notes)
        self.attempts = sorted(int(p.name) for p in path.glob("attempts/*") if p.name.isdigit())
        self.newest = self.attempts[-1] if self.attempts else None
        self.records = self._records()
        self.chain = [
            link for link in read_json(path / "chain.json", self.notes).get("links") or () if isinstance(link, dict)
        ]
        self.attempt: Attempt | None = None
        self.owner: dict[str, Any] = {}
        if self.newest is not None:
            # Slurm's word of a job that holds it comes first, see _state.
            self.attempt = read_attempt(path, self.newest, True, self.notes, job_over=True)
            self.owner = read_json(self.run.attempts / str(self.newest) / "owner.json", [])
            if self.attempt.state == "held":
                self.notes.append(f"attempt {self.newest}: {self.attempt.why}")
        pickles = [(p.stat().st_mtime, p.name.partition("_")[0]) for p in (path / SLURM_FOLDER).glob("*_submitted.pkl")]
        newest = max(pickles)[1] if pickles else None  # a queued job has no attempt before it starts
        named = (self.attempt.resubmitted, self.attempt.job, newest) if self.attempt else (newest,)
        self.training_jobs = [str(i) for i in named if i]

    @property
    def job_ids(self) -> list[str]:
        """Every job that Slurm should be asked about."""
        ids = [link.get("job_id") for link in self.chain]
        return [i for i in ids if isinstance(i, str) and i] + self.training_jobs

    def status(self, known: dict[str, SlurmJob], problem: str = "") -> RunStatus:
        """The status, given what Slurm knows; problem: why it knows nothing of other jobs, "" if it has forgotten
        them."""
        links = tuple(_link(link, known) for link in self.chain)
        alive = [i for i in self.training_jobs if i in known and known[i].active]
        job_id = next(iter(alive + self.training_jobs), None)
        job = known.get(job_id or "")
        silent = problem if any(i not in known for i in self.training_jobs) and not alive else ""
        checkpoint, age = self._checkpoint()
        state = self._state(job, checkpoint, bool(silent))
        last = self.records[-1] if self.records else {}
        phase = last.get("phase")
        total = self._total(phase)
        same = [r for r in self.records if r["phase"] == phase and number(r.get("time/step"))][-SPEED_WINDOW:]
        seconds = _mean([(number(r["time/step"]) or 0.0) + (number(r.get("time/checkpoint")) or 0.0) for r in same])
        error_attempt, error = self._error()
        return RunStatus(
            name=self.path.resolve().name,
            path=str(self.path),
            state=state,
            attempt=self.newest,
            job_id=job_id,
            job=job,
            doing=self._doing(state) or None,
            phase=phase,
            step=last.get("step"),
            total=total,
            reward=self._latest("reward/mean"),
            accuracy=self._latest("eval/accuracy"),
            step_seconds=seconds,
            tokens_per_s=_mean([number(r.get("throughput/tokens_per_s")) for r in same]),
            remaining_s=None if seconds is None or total is None else max(0, total - last["step"]) * seconds,
            waits=_shares(same),
            alerts=tuple(alerts(self.records, self._first_records(), bound_of(self.config))),
            gpus=self._gpus(state),
            record_age_s=self._age(self.path / "metrics.jsonl") if self.records else None,
            checkpoint=checkpoint,
            checkpoint_age_s=age,
            stop=(self.attempt.stop or None) if self.attempt else None,
            left_out=tuple(f"{r['node']}: {r.get('why', '')}" for r in self._left_out()),
            error=error,
            error_attempt=error_attempt,
            links=links,
            notes=tuple(self.notes),
            problem=silent or None,
            who_waits=next((text for r in reversed(self.records) if (text := who_waits(r))), ""),
        )

    # -- parts ---------------------------------------------------------------------------------------------------

    def _state(self, job: SlurmJob | None, checkpoint: str | None, silent: bool) -> str:
        """Slurm's word where a job is active, then the files', then Slurm's of a job that is over."""
        if job is not None and job.active:
            return job.state.lower()
        last = next((r["step"] for r in reversed(self.records) if r["phase"] == "rl"), None)
        state = run_state(self._total("rl"), checkpoint or "", last, self.attempt)
        if state in ("running", "held", "finished"):
            return state
        if silent:  # its job may wait or run
            return "unknown"
        return job.state.lower() if job is not None and job.state != "COMPLETED" else state

    def held(self) -> str | None:
        """Whether a process outside Slurm that holds the newest attempt is alive, or on another machine; None: gone."""
        return None if "job" in self.owner else holder_state(self.owner) or None

    def _records(self) -> list[Record]:
        """The last whole records of metrics.jsonl, in the order of the run."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as f:
                size = f.seek(0, 2)
                f.seek(max(0, size - TAIL_BYTES))
                lines = f.read().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            self.notes.append(f"metrics.jsonl cannot be read: {error.strerror}")
            return []
        lines = lines[1 if size > TAIL_BYTES else 0 : -1]  # the first may be half a line, the last is not finished
        records, broken = parse_records(lines)
        if broken:
            self.notes.append(f"metrics.jsonl: {broken} of the last {len(lines)} lines cannot be read")
        return records

    def _first_records(self) -> list[Record]:
        """The records at the beginning of metrics.jsonl, those that `_records` has too among them."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as f:
                return parse_records(f.read(TAIL_BYTES).split(b"\n")[:-1])[0]
        except OSError:
            return []

    def _latest(self, key: str) -> float | None:
        return next((v for r in reversed(self.records) if (v := number(r.get(key))) is not None), None)

    def _total(self, phase: str | None) -> int | None:
        section, key = ("sft", "max_steps") if phase == "sft" else ("run", "steps")
        value = self.config.get(section)
        total = value.get(key) if isinstance(value, dict) else None
        return total if isinstance(total, int) and phase else None

    def _checkpoint(self) -> tuple[str | None, float | None]:
        """(name, age) of the newest checkpoint whose files have the sizes that COMPLETE says."""
        try:
            names = self.run.checkpoint_names()
        except OSError as error:
            self.notes.append(f"checkpoints/ cannot be read: {error.strerror}")
            return None, None
        for name in names:
            folder = self.run.checkpoints / name
            reason = size_damage(folder)
            if reason is None:
                return name, self._age(folder / "COMPLETE")
            self.notes.append(f"checkpoint {name}: {reason}")
        return None, None

    def _error(self) -> tuple[int | None, str | None]:
        """(attempt, text) of the newest attempt that left an error of its own; tasks that Slurm ended, or
        that ended with another, count for the newest attempt alone."""
        for n in reversed(self.attempts):
            newest = n == self.newest
            a = self.attempt if newest else read_attempt(self.path, n, False, self.notes)
            if a is not None and a.error and (a.primary or newest):
                return n, a.error
        return None, None

    def _gpus(self, state: str) -> tuple[NodeGpus, ...]:
        if self.newest is None or state not in ("running", "held"):
            return ()
        return read_gpus(self.run.attempts / str(self.newest), self.now)

    def _doing(self, state: str) -> str:
        if self.newest is None or state not in ("running", "held"):
            return ""
        return phase_words(self.run.attempts / str(self.newest), self.now)

    def _left_out(self) -> list[dict[str, Any]]:
        try:
            return left_out(self.path / "attempts")
        except OSError as error:
            self.notes.append(f"attempts/ cannot be read: {error.strerror}")
            return []

    def _age(self, path: Path) -> float | None:
        try:
            return max(0.0, self.now - path.stat().st_mtime)
        except OSError:
            return None


def phase_words(attempt_dir: Path, now: float, with_time: bool = True) -> str:
    """What keeps an attempt from training: "loading ranks 0:42, starting engines 0:40"; "" where it trains."""
    return ", ".join(
        p.text + (f" {format_duration(max(0.0, now - p.since))}" if with_time else "") for p in read_phases(attempt_dir)
    )


def size_damage(folder: Path) -> str | None:
    """Why a checkpoint is not complete, without reading its files; None if names and sizes are as COMPLETE says."""
    try:
        files = json.loads((folder / "COMPLETE").read_text())["files"]
        for name, want in files.items():
            size = (folder / name).stat().st_size
            if size != want["bytes"]:
                return f"{name} has {size} bytes instead of {want['bytes']}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return error.strerror or "cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "COMPLETE cannot be read"
    return None


def _link(link: dict[str, Any], known: dict[str, SlurmJob]) -> Link:
    job_id = link.get("job_id")
    state = "done" if not job_id else known[job_id].state.lower() if job_id in known else "unknown"
    return Link(str(link.get("name")), job_id, state, str(link.get("log") or ""))


def _shares(records: list[Record]) -> dict[str, float]:
    """Of time/step and of a save that training waited for, by phase; what no phase claims is "other"."""
    whole = sum((number(r["time/step"]) or 0.0) + (number(r.get("time/checkpoint")) or 0.0) for r in records)
    spent = {n: sum(number(r.get(f"time/{n}")) or 0.0 for r in records) for n in TIMES}
    spent["other"] = whole - sum(spent.values())
    return {n: s / whole for n, s in sorted(spent.items(), key=lambda i: -i[1]) if whole and s >= 0.01 * whole}


def _mean(values: list[float | None]) -> float | None:
    return statistics.fmean(v for v in values if v is not None) if any(v is not None for v in values) else None
