"""An evaluation's folder: what was asked, every sample as it arrives, and who is writing."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import fsync_folder, read_json, write_atomic
from fp8slurm.core.processes import process_start
from fp8slurm.scheduler.job import Job, SlurmError, ask, is_active

FORMAT = 1
SETTINGS, SAMPLES, SUMMARY = "settings.json", "samples.jsonl", "summary.json"
SCORED, OWNER = "scored.jsonl", "owner.json"

Key = tuple[str, str, int]
"""(task, question's id, number of the sample)."""


def key_of(row: dict[str, Any]) -> Key:
    return row["task"], row["id"], row["sample"]


def settings_hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def choose_folder(eval_dir: Path, name: str, settings: dict[str, Any], out: Path | None) -> Path:
    """The folder for these settings: eval_dir/name, or with their hash behind the name if that holds other ones.

    InputError: `out` was asked for and holds an evaluation with other settings.
    """
    if out is not None:
        there = read_settings(out)
        if there is not None and there != settings:
            changed = sorted(k for k in {*there, *settings} if there.get(k) != settings.get(k))
            raise InputError(f"--out {out} holds an evaluation of other settings ({', '.join(changed)}); give another")
        return out
    there = read_settings(eval_dir / name)
    return eval_dir / name if there is None or there == settings else eval_dir / f"{name}-{settings_hash(settings)}"


def read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / SETTINGS)
    except FileNotFoundError:
        return None


class Records:
    """The folder of one evaluation, held by this process; a context manager.

    InputError: another living process holds it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.rows: dict[Key, dict[str, Any]] = {}
        """Every sample that is on disk."""
        self.attempt = 0
        """How many starts of this evaluation have left samples."""

    def __enter__(self) -> Records:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold()
        try:
            write_atomic(self.folder / SETTINGS, json.dumps(self.settings, indent=1))
            path = self.folder / SAMPLES
            if path.is_file():
                repair(path)
                self.rows = {key_of(row): row for row in read_rows(path)}
            self._file = open(path, "ab")
            self._take_in_nodes()
            self.attempt = 1 + max((row["attempt"] for row in self.rows.values()), default=-1)
            fsync_folder(self.folder)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._release()

    @property
    def complete(self) -> bool:
        return (self.folder / SUMMARY).is_file()

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Put samples on disk; they are there when this returns."""
        append_rows(self._file, rows)
        self.rows |= {key_of(row): row for row in rows}

    def finish(self, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Replace the samples by the graded ones, then write the summary."""
        write_atomic(self.folder / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
        write_atomic(self.folder / SUMMARY, json.dumps(summary, indent=1))
        for path in node_files(self.folder):
            path.unlink()

    def _take_in_nodes(self) -> None:
        """What other nodes wrote before an evaluation on several was killed."""
        for path in node_files(self.folder):
            repair(path)
            rows = {key_of(row): row for row in read_rows(path)}
            self.append([row for key, row in rows.items() if key not in self.rows])
            path.unlink()

    def _hold(self) -> None:
        owner = self.folder / OWNER
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        if (job := Job.here()) is not None:
            me |= {"job": job.id, "restart": job.restart, "step": job.step}
        while True:
            try:
                with open(owner, "x") as f:
                    json.dump(me, f)
                return
            except FileExistsError:
                held = _read_owner(owner)
            if held is not None and _lives(held, me):
                raise InputError(
                    f"{self.folder} is being written by process {held['pid']} on {held['host']}: wait for it, or end "
                    f"it (and remove {OWNER} there if that machine is gone)"
                )
            owner.unlink(missing_ok=True)

    def _release(self) -> None:
        (self.folder / OWNER).unlink(missing_ok=True)


def _lives(held: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the holder of a folder may still write; of one on another machine only Slurm can say that it does not."""
    if held["host"] == me["host"]:
        return process_start(held["pid"]) == held["start"]
    if "job" not in held:
        return True
    if held["job"] == me.get("job"):  # Slurm ends a start of a job before it makes the next
        return held["restart"] == me["restart"] and (held["step"] is None or _step_lives(held))
    try:
        return is_active(held["job"])
    except SlurmError:
        return True


def _step_lives(held: dict[str, Any]) -> bool:
    try:
        return "StepId=" in ask("scontrol", "show", "step", f"{held['job']}.{held['step']}")
    except SlurmError as error:
        return "Invalid" not in str(error)


def node_file(folder: Path, number: int) -> Path:
    """Where task `number` (from 1) of an evaluation on several nodes writes its samples, until they are merged."""
    return folder / f"samples.node-{number}.jsonl"


def node_files(folder: Path) -> list[Path]:
    """Those that are there."""
    return sorted(folder.glob("samples.node-*.jsonl"))


def _read_owner(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # torn by a crash
        return None


def append_rows(file: BinaryIO, rows: list[dict[str, Any]]) -> None:
    """Put rows on disk; they are there when this returns."""
    file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    file.flush()
    os.fsync(file.fileno())


def repair(path: Path) -> None:
    """Cut off a last line that a crash tore."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with open(path, "r+b") as f:
            f.truncate(end)
            os.fsync(f.fileno())


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a samples.jsonl or scored.jsonl. InputError names a line that is none."""
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line.decode())
            except (ValueError, RecursionError):
                raise TransientInputError(f"{path}:{number} is not JSON; remove the file to ask again") from None
            if not isinstance(row, dict):
                raise TransientInputError(f"{path}:{number} is no JSON object; remove the file to ask again")
            yield row
