"""Checkpoints that are written while training goes on.

    main thread    begin the folder, copy the state (Snapshot) -> start
    background     every rank: write its file, tell rank 0; rank 0: index, seal, rename, prune, tell the others
    main thread    take: has it come to an end, and how

One save at a time. The threads agree over a connection of their own to the job's store, and send over groups that
nobody else uses: the others are the next step's. Until rank 0 has renamed the folder the checkpoint before is the
newest, whatever happens.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp8slurm.config.schema import CheckpointSection
from fp8slurm.run.directory import RunDirectory, RunState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """How a save ended; state and error are the same on all ranks."""

    state: RunState
    error: str
    """Why it was not written (disk full); "" where it was."""
    seconds: float
    """From `begun` to here."""


class CheckpointWriter:
    """One for each rank; all ranks make the same calls of `start`, in the same order."""

    def __init__(
        self, run_dir: RunDirectory, store: dist.Store, rank: int, ranks: int, settings: CheckpointSection
    ) -> None:
        self.run_dir, self.rank, self.ranks, self.settings = run_dir, rank, ranks, settings
        self._store = store.clone()  # type: ignore[attr-defined]  # every store has it
        self._thread: threading.Thread | None = None
        self._saves = self._forgotten = 0
        self._begun = 0.0
        self._saved: Saved | None = None
        self._failure: BaseException | None = None

    def start(self, state: RunState, folder: Path, snapshot: Any, begun: float) -> None:
        """Write `snapshot` (trainer/checkpoint.py) into `folder` and make that the checkpoint of `state`.

        begun: time.monotonic() at the beginning of this save. The save before must have been taken.
        """
        assert self._thread is None, "two saves at once"
        self._saves, self._begun = self._saves + 1, begun
        work = (f"saver/{self._saves}", state, folder, snapshot)
        self._thread = threading.Thread(target=self._run, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def take(self, wait: bool) -> Saved | None:
        """How the save under way ended; None if there is none, or (without `wait`) if it goes on.

        Raises what stopped it, where that was no OSError: FencedError, a newer attempt owns the run.
        """
        if self._thread is None or (self._thread.is_alive() and not wait):
            return None
        self._thread.join()
        self._thread = None
        if self._failure is not None:
            raise self._failure
        return self._saved

    def forget(self) -> None:
        """Rank 0, when all ranks have begun the same saves: delete how those before the newest ended."""
        for number in range(self._forgotten + 1, self._saves):
            self._store.delete_key(f"saver/{number}/error")
        self._forgotten = max(self._forgotten, self._saves - 1)

    def left(self, usual: float) -> float:
        """Seconds until the save under way has taken `usual` seconds; 0 if there is none."""
        busy = self._thread is not None and self._thread.is_alive()
        return max(0.0, self._begun + usual - time.monotonic()) if busy else 0.0

    def _run(self, tag: str, state: RunState, folder: Path, snapshot: Any) -> None:
        try:
            self._store.set(f"{tag}/written/{self.rank}", snapshot.write())
            if self.rank == 0:
                self._store.set(f"{tag}/error", self._seal(tag, state, folder, snapshot))
            error = self._store.get(f"{tag}/error").decode()
            self._saved = Saved(state, error, time.monotonic() - self._begun)
        except BaseException as failure:  # noqa: BLE001 - the main thread raises it
            self._failure = failure

    def _seal(self, tag: str, state: RunState, folder: Path, snapshot: Any) -> str:
        """Rank 0: the end of a save; returns why there is no checkpoint, or ""."""
        names = [f"{tag}/written/{rank}" for rank in range(self.ranks)]
        written = [self._store.get(name) for name in names]
        for name in names:
            self._store.delete_key(name)
        try:
            snapshot.finish(written)
            self.run_dir.commit_checkpoint(folder, state)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            return str(error) or type(error).__name__
        try:
            self.run_dir.prune(self.settings.keep_last, self.settings.keep_every)
        except OSError as error:  # the next save looks again
            log.error("old checkpoints may be left: %s", error)
        return ""
