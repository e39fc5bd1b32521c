"""The checkpoints of a run: which one a rank starts from, when a save begins, and what follows from how it ended."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp8slurm.checkpoint.formats.complete import damage as damage_of
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import patiently
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.run.checkpoint_writer import CheckpointWriter
from fp8slurm.run.directory import RunDirectory, RunState
from fp8slurm.run.events import CONTINUED, NOT_SAVED, SKIPPED, record_event
from fp8slurm.run.step_times import StepTimes

log = logging.getLogger(__name__)
MAX_FAILED_SAVES = 3
"""Checkpoints in a row that may fail to be written, those of `again` left out. A run that goes on for longer works for
nothing."""
LOOK_AGAIN_S = 1.0
"""Before a checkpoint that seems damaged is set aside: one torn read is no damage."""


def load_newest(config: RunConfig, run_dir: RunDirectory, trainer: Any, store: dist.Store) -> RunState | None:
    """Load the newest complete checkpoint, on all ranks; its state. Newer, damaged ones are set aside.

    None where there is none: the trainer has the Hugging Face weights then. InputError: no run can go on from it so.
    """
    if trainer.rank == 0:
        store.set("resume", patiently(lambda: _newest_complete(run_dir)))
    store.wait(["resume"])
    name = store.get("resume").decode()
    kl_coef = config.algorithm.kl_coef
    trainer.load_hf(config.model.hf_checkpoint)
    if kl_coef:
        trainer.snapshot_reference()
    if not name:
        return None
    folder = run_dir.checkpoints / name
    has_reference = trainer.load(folder)
    state = patiently(lambda: RunState.read(folder))
    if config.control.freeze_engine and state.phase == "rl" and state.step:
        raise InputError(
            f"--control.freeze-engine: {folder} has other weights than those that the engines kept; such a run cannot "
            f"go on; allowed: another --run.name"
        )
    if kl_coef and not has_reference and state.phase == "rl" and state.sft_steps:
        raise InputError(
            f"--algorithm.kl-coef {kl_coef:g}: {folder} was saved without a reference model, which "
            f"would have to be the one that its supervised phase ended with; allowed: 0, or another --run.name"
        )
    log.info("continuing from %s", folder)
    record_event(CONTINUED, name)
    return state


def _newest_complete(run_dir: RunDirectory) -> str:
    for folder, damage in run_dir.checked_checkpoints():
        if damage is not None:
            time.sleep(LOOK_AGAIN_S)
            damage = damage_of(folder)
        if damage is None:
            return folder.name
        log.warning("checkpoint %s is skipped: %s; set aside as %s", folder, damage, run_dir.set_aside(folder).name)
        record_event(SKIPPED, f"checkpoint {folder.name} was skipped: {damage}")
    return ""


def first_state(config: RunConfig, on_disk: RunState | None) -> RunState:
    """Where the loop begins: on_disk as of `load_newest`."""
    if on_disk is None:
        return RunState("sft" if config.sft.data is not None else "rl", 0)
    if on_disk.bad_steps >= config.run.max_bad_steps:  # the run ended for it; somebody has changed a setting
        return replace(on_disk, bad_steps=0)
    return on_disk


class Saver:
    """A training rank's. All ranks make the same calls in the same order."""

    def __init__(
        self, config: RunConfig, run_dir: RunDirectory, trainer: Any, store: dist.Store, ranks: int, watch: Stopwatch,
        times: StepTimes, on_disk: RunState | None, beside: Callable[[Path], str] = lambda folder: "",
        first_beside: Callable[[Path], None] = lambda folder: None,
    ) -> None:  # fmt: skip
        """beside(folder): called on all ranks for every checkpoint; puts into it what belongs to it but is no state of
        the trainer, and says why it could not, or "". first_beside: the same, called on rank 0 alone; OSError."""
        self.run_dir, self.trainer, self.store, self.watch, self.times = run_dir, trainer, store, watch, times
        self.asynchronous = config.checkpoint.asynchronous
        self.writer = CheckpointWriter(run_dir, store, trainer.rank, ranks, config.checkpoint)
        self.beside, self.first_beside, self.on_disk = beside, first_beside, on_disk
        """State of the newest checkpoint."""
        self._saves = self._forgotten = self._failed = 0
        self._due = True
        self._error = ""
        """Of the last save that has ended; "" where it was written, or another goes on."""
        self._seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the last save that has ended could not be written. Ranks learn that at different times."""
        return bool(self._error)

    def save(self, state: RunState, due: bool = True) -> None:
        """Begin a checkpoint of the trainer as it is. A full disk is reported, and the run goes on with the older one;
        OSError after MAX_FAILED_SAVES in a row. due: False for one in place of a save that has failed."""
        tag, self._saves = f"save/{self._saves}", self._saves + 1
        with self.watch.timed("checkpoint"):
            self.collect()
            self._due, self._error = due, ""
            begun = time.monotonic()
            if self.trainer.rank == 0:
                try:
                    folder = self.run_dir.begin_checkpoint(state)
                    self.first_beside(folder)
                    answer = {"folder": str(folder)}
                except OSError as error:
                    answer = {"error": str(error)}
                self.store.set(tag, json.dumps(answer))
            self.store.wait([tag])
            answer = json.loads(self.store.get(tag))
            if why := answer.get("error") or self.beside(Path(answer["folder"])):
                self._save_failed(state, why)
                return
            snapshot = self.trainer.snapshot(answer["folder"], copy=self.asynchronous)
            self.writer.start(state, Path(answer["folder"]), snapshot, begun)
            if not self.asynchronous:
                self.collect()

    def collect(self, wait: bool = True) -> None:
        """Take note of a save that has ended; wait: for the one under way."""
        saved = self.writer.take(wait)
        if saved is None:
            return
        self._seconds = saved.seconds
        if saved.error:
            self._save_failed(saved.state, saved.error)
            return
        self.on_disk, self._failed, self._error = saved.state, 0, ""
        if self.trainer.rank == 0:
            self.times.save_s = saved.seconds
            try:
                self.times.write(self.run_dir)
            except OSError as error:
                log.error("%s", error)

    def save_if_new(self, state: RunState) -> bool:
        """Save `state` if no save of it was made, and wait until it is on disk; whether it is, as rank 0 sees it."""
        self.collect()
        if self.trainer.rank == 0:
            self.store.set("stop/saved", "yes" if self.on_disk == state else "no")
        self.store.wait(["stop/saved"])
        if self.store.get("stop/saved") == b"no":
            self.save(state)
            self.collect()
        return self.on_disk == state

    def check_saved(self, state: RunState) -> None:
        """At the end of a run. OSError: `state` could not be saved; another attempt may find room for it."""
        self.collect()
        if self._error:
            self.save(state, due=False)
            self.collect()
        if self._saves and self.on_disk != state:
            raise OSError(
                f"the run is over, but its last checkpoint, {state.name}, could not be written: {self._error}"
            )

    def forget(self) -> None:
        """Delete what older saves have left in the store. On rank 0, when all ranks are between two steps: the answers
        to "save" are read then, and how a save ended before the next one began."""
        for number in range(self._forgotten, self._saves):
            self.store.delete_key(f"save/{number}")
        self.writer.forget()
        self._forgotten = self._saves

    def left_s(self) -> float:
        """Seconds that the save under way will take from now on, by the one before; 0 where there is none."""
        return self.writer.left(self.times.save_s)

    def figures(self) -> dict[str, float]:
        """For the next record: seconds of a save that has ended since the one before, and how many failed in a row."""
        figures = {} if self._seconds is None else {"time/checkpoint_write": self._seconds}
        self._seconds = None
        return figures | ({"checkpoint/failed": float(self._failed)} if self._failed else {})

    def _save_failed(self, state: RunState, error: str) -> None:
        """On all ranks. Raises OSError after too many in a row: another attempt may find room."""
        self._failed += self._due
        self._error = f"{error} ({_free(self.run_dir.path)})"
        message = f"checkpoint {state.name} was not written, the one before is kept: {self._error}"
        log.error("%s", message)
        record_event(NOT_SAVED, message)
        if self._failed >= MAX_FAILED_SAVES:
            kept = self.on_disk.name if self.on_disk is not None else "none"
            raise OSError(
                f"{self._failed} checkpoints in a row could not be written; the newest is {kept}: {self._error}"
            )


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 1e9:.2f} GB are free in {path}"
    except OSError as error:
        return f"what is free in {path} is not known: {error.strerror}"
