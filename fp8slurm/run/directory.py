"""A run directory: attempts, and checkpoints that are there completely or not at all.

    runs/NAME/config.json            what is run
    runs/NAME/attempts/0, 1, ...     one folder each time the run was started
    runs/NAME/checkpoints/step_000010/COMPLETE

A checkpoint is written into a folder whose name ends in .tmp; COMPLETE, with the size and SHA-256 of every file, is
written last; then the folder is renamed. Before the rename the attempt's number is compared with the newest one on
disk: a process that was believed dead and still writes loses. A file that grows (metrics.jsonl) is the attempt's own
and appears in the run directory as a second name of it: an old attempt appends to a file that nobody reads any more.
No lock is taken: locks do not work on every shared file system.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.formats.complete import damage
from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.core.files import fsync_folder, names_in, patiently, read_json, write_atomic
from fp8slurm.core.processes import process_of, process_start

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"(sft|step)_\d+", re.ASCII)
"""Names of checkpoint folders; others beside them are the user's, and damaged ones that were set aside."""


class RunBusyError(InputError):
    """Another living process holds the run directory."""


class FencedError(RuntimeError):
    """A newer attempt owns the run directory; this one must stop without writing."""

    permanent = True


@dataclass(frozen=True)
class RunState:
    """Where a run stands; stored with every checkpoint."""

    phase: str
    """"sft" or "rl"."""
    step: int
    """Completed steps of the phase."""
    cursor: int = 0
    """Prompts taken from the training data so far, over all epochs."""
    sft_cursor: int = 0
    """Sequences taken from the supervised data so far."""
    bad_steps: int = 0
    """Steps skipped in a row because of a NaN or infinity."""
    sft_steps: int = 0
    """Steps that the supervised phase took, once it is over."""

    @property
    def version(self) -> int:
        """Version of the weights: training steps of both phases."""
        return self.sft_steps + self.step

    @property
    def name(self) -> str:
        return f"{'sft' if self.phase == 'sft' else 'step'}_{self.step:06d}"

    @classmethod
    def read(cls, folder: Path) -> RunState:
        """The state stored in a checkpoint folder. BadCheckpoint: it is none, or one of another version."""
        path = folder / "state.json"
        found = read_json(path, BadCheckpoint)
        counts = [f.name for f in fields(cls) if f.name != "phase"]
        unknown = ", ".join(sorted(f"{key:.50}" for key in found if key not in ("phase", *counts)))
        if unknown:
            raise BadCheckpoint(f"{path}: unknown: {unknown}; known are phase, {', '.join(counts)}")
        if found.get("phase") not in ("sft", "rl"):
            raise BadCheckpoint(f"{path}: phase {found.get('phase')!r:.50}: allowed are 'sft' and 'rl'")
        for key in counts:
            value = found.get(key, None if key == "step" else 0)
            if type(value) is not int or value < 0:
                raise BadCheckpoint(f"{path}: {key} {value!r:.50}: allowed is a whole number, 0 or more")
        return cls(**found)


def is_run(folder: Path) -> bool:
    """Whether a folder has a run's files: a model's config.json is none, a torn one counts. OSError: no rights."""
    if any((folder / mark).exists() for mark in ("metrics.jsonl", "attempts", "chain.json")):
        return True
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or "run" in config


class RunDirectory:
    """runs/NAME."""

    def __init__(self, path: Path, attempt: int | None = None) -> None:
        self.path = Path(path)
        self.attempt = attempt

    # -- attempts ------------------------------------------------------------------------------------------------

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def attempt_dir(self) -> Path:
        assert self.attempt is not None
        return self.attempts / str(self.attempt)

    def newest_attempt(self) -> int:
        """Number of the newest attempt, -1 if there is none."""
        return max((int(name) for name in names_in(self.attempts) if name.isdigit()), default=-1)

    def owner(self, attempt: int) -> dict[str, Any] | None:
        """Who began an attempt; None if that is not known (any more)."""
        try:
            return read_json(self.attempts / str(attempt) / "owner.json")
        except FileNotFoundError:
            return None

    def check_free(self, holder: Callable[[dict[str, Any]], str | None] | None = None) -> int:
        """Number of the newest attempt, -1 for none. RunBusyError: its holder (as for acquire) is still alive."""
        newest = self.newest_attempt()
        held = self.owner(newest)
        living = (holder or process_of)(held) if held is not None else None
        if living:
            raise RunBusyError(
                f"{self.path} is held by {living} (attempt {newest}): fp8slurm status {self.path} --follow shows it; "
                f"wait for it, end it, or choose another name with --run.name"
            )
        return newest

    def acquire(
        self, more: dict[str, Any] | None = None, holder: Callable[[dict[str, Any]], str | None] | None = None
    ) -> None:
        """Begin the next attempt; self.attempt is its number.

        more: further keys of owner.json. holder: names the living holder that an owner.json describes, None if it is
        gone; left out: a process of this machine.

        Raises:
            RunBusyError: the newest attempt's holder is still alive, or another one began at the same moment.
        """
        patiently(lambda: self.attempts.mkdir(parents=True, exist_ok=True, mode=0o700))
        os.chmod(self.path, 0o700)
        newest = patiently(lambda: self.check_free(holder))
        try:
            (self.attempts / str(newest + 1)).mkdir(mode=0o700)
        except FileExistsError:
            raise RunBusyError(f"{self.path}: another process began attempt {newest + 1} at the same moment") from None
        self.attempt = newest + 1
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
        text = json.dumps({**me, **(more or {})})
        patiently(lambda: write_atomic(self.attempt_dir / "owner.json", text))

    def release(self) -> None:
        """The attempt is over: another may begin. A file that stays says of a process that it has ended, too."""
        try:
            patiently(lambda: (self.attempt_dir / "owner.json").unlink(missing_ok=True))
        except OSError as error:
            log.error("%s", error)

    def replaced(self) -> bool:
        """Whether a newer attempt has begun."""
        return self.newest_attempt() != self.attempt

    def check_fence(self) -> None:
        """Raises FencedError where a newer attempt has begun."""
        if self.replaced():
            newest = self.newest_attempt()
            raise FencedError(f"{self.path}: attempt {newest} has begun; attempt {self.attempt} stops without writing")

    # -- files that grow -----------------------------------------------------------------------------------------

    def own_copy(self, name: str) -> Path:
        """This attempt's own copy of the run's file `name`, which may be appended to; `publish` makes it the run's."""
        self.check_fence()
        own = self.attempt_dir / name
        if (self.path / name).exists():
            shutil.copyfile(self.path / name, own)
        return own

    def publish(self, name: str) -> None:
        """Make this attempt's file the run's, if it is not already. FencedError: nothing may be written any more."""
        self.check_fence()
        own, shown = self.attempt_dir / name, self.path / name
        if shown.exists() and os.path.samefile(own, shown):
            return
        link = self.path / f".{name}.{self.attempt}.tmp"
        link.unlink(missing_ok=True)
        os.link(own, link)
        os.replace(link, shown)
        fsync_folder(self.path)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def begin_checkpoint(self, state: RunState) -> Path:
        """An empty folder to save into (one process calls this)."""
        self.check_fence()
        tmp = self.checkpoints / f"{state.name}.{self.attempt}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        return tmp

    def commit_checkpoint(self, tmp: Path, state: RunState) -> Path:
        """Seal what was saved into `tmp` and give it its name. Raises FencedError, OSError (disk full)."""
        (tmp / "state.json").write_text(json.dumps(asdict(state)))
        files = sorted(p for p in tmp.rglob("*") if p.is_file())
        with ThreadPoolExecutor(4) as pool:
            sums = list(pool.map(_sum_and_sync, files))
        manifest = {str(p.relative_to(tmp)): {"bytes": p.stat().st_size, "sha256": s} for p, s in zip(files, sums)}
        write_atomic(tmp / "COMPLETE", json.dumps({"files": manifest}, indent=1))
        for folder in {p.parent for p in files}:
            fsync_folder(folder)
        self.check_fence()
        final = self.checkpoints / state.name
        try:
            os.rename(tmp, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # An earlier attempt's: damaged and skipped at load, or sealed after this attempt had looked. If a newer
            # attempt's, the fence says so now.
            self.check_fence()
            old = final.with_name(f"{state.name}.{self.attempt}.old.tmp")
            os.rename(final, old)
            os.rename(tmp, final)
            shutil.rmtree(old, ignore_errors=True)
        fsync_folder(self.checkpoints)
        return final

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Remove old checkpoints and what interrupted saves left behind."""
        for name in names_in(self.checkpoints):
            if name.endswith(".tmp") and not name.endswith(f".{self.attempt}.tmp"):
                shutil.rmtree(self.checkpoints / name, ignore_errors=True)
        names = self.checkpoint_names()
        for name in names[keep_last:]:
            phase, step = name.split("_")
            if not (phase == "step" and keep_every and int(step) % keep_every == 0):
                shutil.rmtree(self.checkpoints / name, ignore_errors=True)

    def checkpoint_names(self) -> list[str]:
        """Checkpoint folders, newest first; nothing is said about their contents."""
        names = [n for n in names_in(self.checkpoints) if CHECKPOINT.fullmatch(n) and (self.checkpoints / n).is_dir()]
        return sorted(names, key=lambda n: (n.startswith("step"), int(n.partition("_")[2])), reverse=True)

    def newest_checkpoint(self) -> str:
        """Name of the newest checkpoint that was sealed, "" if there is none; its contents are not read."""
        return next((n for n in self.checkpoint_names() if (self.checkpoints / n / "COMPLETE").is_file()), "")

    def checked_checkpoints(self) -> Iterator[tuple[Path, str | None]]:
        """(folder, None) for complete checkpoints and (folder, reason) for damaged ones, newest first."""
        for name in self.checkpoint_names():
            folder = self.checkpoints / name
            reason = damage(folder)
            yield folder, reason

    def set_aside(self, folder: Path) -> Path:
        """Rename a damaged checkpoint to NAME.damaged.ATTEMPT; returns the new path. Raises FencedError.

        Under its own name it would count for keep_last, and good checkpoints would be removed in its place.
        """
        self.check_fence()
        aside = folder.with_name(f"{folder.name}.damaged.{self.attempt}")
        os.rename(folder, aside)
        fsync_folder(self.checkpoints)
        return aside


def _sum_and_sync(path: Path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.fsync(f.fileno())
    return digest


SLURM_FOLDER = "slurm"
"""Of a run directory: what submitit writes (job script, pickled call), and the output of the job scripts."""


def rl_step(checkpoint: str) -> int:
    """The step of an RL checkpoint's name; -1 for any other name."""
    phase, _, step = checkpoint.partition("_")
    return int(step) if phase == "step" and step.isdigit() else -1
