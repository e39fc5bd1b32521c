"""One evaluation on several nodes: a Slurm step with one task a node, which meet in a folder that all of them see.

Task 0 owns the evaluation: it converts, says what is missing, reads what the others write, grades and summarizes. Every
task, task 0 too, takes the next batch by creating its claim file, which the file system lets only one of them do.
Nothing listens on the network, and there is nothing to trust but the folder's permissions.

    here-N               task N has started
    PRECISION/work.json  what task 0 says: the model, the folder of the samples, which of them are there already
    PRECISION/ready-N    task N's engines answer, and how many they are; nobody begins before all of them do
    PRECISION/claim-I    batch I is somebody's
    PRECISION/done-N     task N has no batch left; how many samples it wrote, its engines and their restarts
    failed-N             task N has failed, and why
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fp8slurm.core.errors import InputError
from fp8slurm.core.files import write_atomic
from fp8slurm.engine.pool import WorkQueue
from fp8slurm.engine.server import EngineError
from fp8slurm.eval.records import node_file
from fp8slurm.scheduler.job import Job

T = TypeVar("T")
POLL_S = 0.2
HERE_S = 600.0
"""Time for the other tasks to start and to be seen."""
SEEN_S = 120.0
"""Time for samples of another node to be seen after it has said that they are there."""
FOLDER = ".step-"


@dataclass(frozen=True)
class Place:
    """This task among those of its Slurm step."""

    number: int
    count: int
    step: str
    """JOB.RESTART.STEP: a name that no other start has."""

    @classmethod
    def here(cls) -> Place | None:
        """None: not a task of a step, or its only one. InputError: a step of several tasks a node."""
        job, names = Job.here(), ("PROCID", "STEP_NUM_TASKS", "STEP_NUM_NODES")
        number, count, nodes = (os.environ.get(f"SLURM_{name}", "") for name in names)
        if job is None or job.step is None or not (number.isdigit() and count.isdigit()) or int(count) < 2:
            return None
        if nodes != count:
            raise InputError(
                f"srun started {count} tasks of this evaluation on {nodes} nodes; one task a node drives all its "
                f"engines: srun --ntasks-per-node=1"
            )
        return cls(int(number), int(count), f"{job.id}.{job.restart}.{job.step}")


class StepRendezvous:
    """The folder of a step; task 0 removes it at the end."""

    def __init__(self, eval_dir: Path, place: Place) -> None:
        self.place, self.folder = place, eval_dir.resolve() / f"{FOLDER}{place.step}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._say(self.folder / f"here-{place.number}", socket.gethostname())

    @property
    def others(self) -> range:
        return range(1, self.place.count)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_old(self) -> None:
        """Remove what steps left that were killed: earlier starts of this job, and jobs that Slurm does not run."""
        from fp8slurm.scheduler.queue import jobs

        left = [p for p in self.folder.parent.glob(f"{FOLDER}*.*.*") if p != self.folder]
        job, restart, _ = self.place.step.split(".")
        names = {p: p.name.removeprefix(FOLDER).split(".") for p in left}
        known, problem = jobs({n[0] for n in names.values()} - {job})
        for path, (its_job, its_restart, _) in names.items():
            active = its_job in known and known[its_job].active
            if int(its_restart) < int(restart) if its_job == job else not (problem or active):
                shutil.rmtree(path, ignore_errors=True)

    def fail(self, reason: str) -> None:
        """Tell the others why this task ends."""
        try:
            write_atomic(self.folder / f"failed-{self.place.number}", json.dumps([socket.gethostname(), reason]))
        except OSError:
            pass  # task 0 has ended before, and removed the folder

    def check(self) -> None:
        """EngineError: another task has failed."""
        names = self._names(self.folder)
        if f"here-{self.place.number}" not in names:
            raise EngineError("node 0 has ended; what it says is the reason")
        for name in sorted(names):
            if name.startswith("failed-") and name != f"failed-{self.place.number}":
                host, reason = json.loads((self.folder / name).read_text())
                raise EngineError(f"node {name.removeprefix('failed-')} ({host}): {reason}")

    def wait(self, names: Sequence[str], part: str = "", within_s: float | None = None, of: str = "") -> None:
        """Until all of these files are there. EngineError: a task has failed, or they are not within the time."""
        started = time.monotonic()
        while missing := set(names) - self._names(self.folder / part):
            self.check()
            if within_s is not None and time.monotonic() - started > within_s:
                raise EngineError(f"no {', '.join(sorted(missing))} in {self.folder / part} within {within_s:g} s{of}")
            time.sleep(POLL_S)

    def wait_started(self) -> None:
        """Until every task has been seen."""
        of = ": is it on a file system that all nodes share (--eval-dir)?"
        self.wait([f"here-{i}" for i in self.others], within_s=HERE_S, of=of)

    def announce(self, precision: str, work: dict[str, Any]) -> None:
        """Task 0: say what is to be done."""
        (self.folder / precision).mkdir(exist_ok=True)
        self._say(self.folder / precision / "work.json", json.dumps(work))

    def work(self, precision: str) -> dict[str, Any]:
        """What task 0 has announced; waits for it."""
        self.wait([precision])
        self.wait(["work.json"], precision)
        return json.loads((self.folder / precision / "work.json").read_text())

    def all_ready(self, precision: str, engines: int) -> int:
        """This task's engines answer; returns, when everybody's do, how many they are together."""
        self._say(self.folder / precision / f"ready-{self.place.number}", str(engines))
        names = [f"ready-{i}" for i in range(self.place.count)]
        self.wait(names, precision)
        return sum(int((self.folder / precision / name).read_text()) for name in names)

    def done(self, precision: str, rows: int, engines: int, restarts: int) -> None:
        """This task has no batch left, and its samples are on disk."""
        report = {"rows": rows, "engines": engines, "restarts": restarts}
        self._say(self.folder / precision / f"done-{self.place.number}", json.dumps(report))

    def reports(self, precision: str) -> list[dict[str, int]]:
        """Task 0: what the others said in `done`; waits for it."""
        names = [f"done-{i}" for i in self.others]
        self.wait(names, precision)
        return [json.loads((self.folder / precision / name).read_text()) for name in names]

    def claims(self, precision: str) -> Path:
        """Folder in which batches are claimed."""
        return self.folder / precision

    def _say(self, path: Path, text: str) -> None:
        try:
            write_atomic(path, text)
        except FileNotFoundError:
            self.check()
            raise

    @staticmethod
    def _names(folder: Path) -> set[str]:
        try:
            return set(os.listdir(folder))  # not is_file(): network file systems remember that a name was missing
        except FileNotFoundError:
            return set()


class SharedWorkQueue(WorkQueue[T]):
    """Pieces of work that the tasks of a step share: all have the same list, and a piece is whose claims it.

    What an engine gives back stays with its task.
    """

    def __init__(self, work: Sequence[list[T]], most: int, claims: Path, engines: int) -> None:
        """engines: of all tasks together."""
        super().__init__(work, most, engines, one_by_one=False)
        self._claims, self._count, self._seen = claims, len(work), 0

    def take(self, busy: int) -> list[list[T]]:
        pieces: list[list[T]] = []
        with self.changed:
            while self.waiting and not self.over and not (busy and busy + len(self.waiting[0]) > self._room):
                new = len(self.waiting) == self._count - self._seen
                piece = self.waiting.popleft()
                if new:
                    self._seen += 1
                    if not self._claim(self._seen - 1):
                        self.left -= 1
                        continue
                pieces.append(piece)
                busy += len(piece)
            self.changed.notify_all()
        return pieces

    def _claim(self, number: int) -> bool:
        try:
            os.close(os.open(self._claims / f"claim-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True


class Tail:
    """New whole lines of a growing JSONL file, which need not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, 0
        self._at = 0

    def poll(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as f:
                f.seek(self._at)
                data = f.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        rows = [json.loads(line) for line in whole.splitlines()]
        self.rows += len(rows)
        return rows


class ResultCollector:
    """Task 0: hands on what the other tasks write, while they write it; a context manager."""

    def __init__(
        self, rendezvous: StepRendezvous, folder: Path, answered: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        self.rendezvous, self.answered = rendezvous, answered
        self._tails = {i: Tail(node_file(folder, i)) for i in rendezvous.others}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, name="other nodes", daemon=True)

    def __enter__(self) -> ResultCollector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self, precision: str) -> list[dict[str, int]]:
        """Wait until all rows of the others are handed on. EngineError: one failed, or rows do not appear."""
        reports = self.rendezvous.reports(precision)
        deadline = time.monotonic() + SEEN_S
        while any(self._tails[i].rows < r["rows"] for i, r in zip(self.rendezvous.others, reports)):
            self.rendezvous.check()
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                seen = [t.rows for t in self._tails.values()]
                wrote = [r["rows"] for r in reports]
                raise EngineError(f"the other nodes wrote {wrote} samples; {seen} are seen here after {SEEN_S:g} s")
            self._poll()
            time.sleep(POLL_S)
        return reports

    def _poll(self) -> None:
        with self._lock:
            for tail in self._tails.values():
                rows = tail.poll()
                if rows:
                    self.answered(rows)

    def _follow(self) -> None:
        try:
            while not self._stop.wait(1.0):
                self._poll()
        except BaseException as error:
            self._error = error
