"""What Slurm knows about jobs, asked without ever failing: squeue for those it remembers, sacct for older ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fp8slurm.scheduler.job import ACTIVE, ENDING, SlurmError, ask

TIMEOUT_S = 15.0
"""A controller that is down makes Slurm's commands wait; a status must not wait as long."""
FIELDS = ("state", "reason", "elapsed", "limit", "nodes", "start")
FORMAT = "%A|%T|%r|%M|%l|%N|%S"
"""%A: a task of an array has a number of its own, as in its SLURM_JOB_ID; %i would be ARRAY_TASK."""


@dataclass(frozen=True)
class SlurmJob:
    """One job as Slurm tells it; what it does not tell is empty."""

    id: str
    state: str
    reason: str = ""
    """Why it waits, or why it ended."""
    elapsed: str = ""
    """[days-]hours:minutes:seconds of this start."""
    limit: str = ""
    nodes: str = ""
    start: str = ""
    """When it started, or when Slurm expects it to."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE

    @property
    def over(self) -> bool:
        """Whether it has ended for good: one that is being ended may wait again."""
        return self.state not in (*ACTIVE, ENDING)


def query(*command: str) -> tuple[str | None, str]:
    """(standard output, "") of one of Slurm's commands, or (None, why there is none)."""
    try:
        return ask(*command, timeout_s=TIMEOUT_S), ""
    except SlurmError as error:
        return None, str(error).splitlines()[-1]


def jobs(ids: Iterable[str]) -> tuple[dict[str, SlurmJob], str]:
    """The jobs that Slurm still knows, by id, and why nothing is known ("" if Slurm answered)."""
    requested = sorted(set(ids))
    if not requested:
        return {}, ""
    known: dict[str, SlurmJob] = {}
    out, problem = query("squeue", "--noheader", "--states=all", f"--jobs={','.join(requested)}", f"--format={FORMAT}")
    if out is not None:
        known = parse_squeue(out)
    elif "Invalid job id" in problem:  # squeue's way to say that it has forgotten the only one
        problem = ""
    missing = [i for i in requested if i not in known]
    if missing and "no answer" not in problem:  # sacct would wait as long
        columns = "JobIDRaw,State,Elapsed,Timelimit,NodeList,Start"
        out, why = query("sacct", "--allocations", "--parsable2", f"--format={columns}", f"--jobs={','.join(missing)}")
        if out is not None:
            known = parse_sacct(out) | known
            problem = problem if any(i not in known for i in requested) else ""
        elif problem:
            problem = f"{problem}; {why}"
    return {i: known[i] for i in requested if i in known}, problem


def jobs_of_scripts(folders: Iterable[Path]) -> tuple[list[str], str]:
    """This user's waiting and running jobs whose script is in one of the folders; why nothing is known, or ""."""
    out, problem = query("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A|%T|%o")
    rows = [line.strip().split("|", 2) for line in (out or "").splitlines()]
    starts = tuple(f"{folder}/" for folder in folders)
    return [r[0] for r in rows if len(r) == 3 and r[1] in ACTIVE and r[2].startswith(starts)], problem


def parse_squeue(text: str) -> dict[str, SlurmJob]:
    """Lines in FORMAT."""
    parsed = {}
    for line in text.splitlines():
        values = [_known(v) for v in line.strip().split("|")]
        if len(values) == 1 + len(FIELDS):
            parsed[values[0]] = SlurmJob(values[0], **dict(zip(FIELDS, values[1:])))
    return parsed


def parse_sacct(text: str) -> dict[str, SlurmJob]:
    """A table of --parsable2 with its header; columns that are missing stay empty."""
    lines = text.splitlines()
    if not lines:
        return {}
    columns = {"State": "state", "Elapsed": "elapsed", "Timelimit": "limit", "NodeList": "nodes", "Start": "start"}
    header = lines[0].split("|")
    parsed = {}
    for line in lines[1:]:
        row = dict(zip(header, line.split("|")))
        state, _, rest = row.get("State", "").partition(" ")  # "CANCELLED by 1000"
        if (id := row.get("JobIDRaw") or row.get("JobID")) and state:
            values = {field: _known(row.get(column, "")) for column, field in columns.items()}
            parsed[id] = SlurmJob(id, **(values | {"state": state, "reason": rest}))
    return parsed


def _known(value: str) -> str:
    return "" if value in ("(null)", "None", "None assigned", "N/A", "Unknown") else value
