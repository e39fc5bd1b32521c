"""Step boundaries: between two steps all ranks go on together or stop together."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch.distributed as dist

from fp8slurm.core.stopping import StopPolicy, StopRequested
from fp8slurm.rl.saving import Saver
from fp8slurm.rl.tracing import traced
from fp8slurm.run.directory import RunState
from fp8slurm.run.step_times import StepTimes
from fp8slurm.run.trace import take_request

log = logging.getLogger(__name__)


class StepBoundary:
    """A training rank's end; the ranks agree through the store on what rank 0's policy says."""

    def __init__(
        self, store: dist.Store, first: bool, policy: StopPolicy, saver: Saver, times: StepTimes,
        attempt_dir: Path | None = None, meet: Callable[[], None] | None = None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """first: whether this is rank 0. attempt_dir: where traces are asked for (None: nowhere). meet: returns on a
        rank when all ranks are there (None: names stay in the store). forget: called on rank 0 then."""
        self.attempt_dir = attempt_dir
        self.store, self.first, self.policy, self.saver, self.times = store, first, policy, saver, times
        self.meet, self.forget = meet, forget
        self._crossed, self._crossed_at = 0, 0.0
        self.traced: list[int] = []
        """Ranks that trace the step that follows (`fp8slurm trace`)."""

    def cross(self) -> bool:
        """Between two steps, on all ranks; whether a save has failed and is to be made up for here, the same on all of
        them. Raises StopRequested on all, or on none."""
        self.saver.collect(wait=False)
        now = time.monotonic()
        key, self._crossed = f"boundary/{self._crossed}", self._crossed + 1
        if self.meet is not None:
            self.meet()
            if self.first:  # what all ranks have read by now
                self.forget()
                self.saver.forget()
                self.store.delete_key(f"boundary/{self._crossed - 2}")
        if self.first:
            if self._crossed > 1:
                self.times.step_took(now - self._crossed_at)
            noticed = self.policy.noticed() or self.store.check(["noticed"])
            busy = max(self.times.step_s, self.saver.left_s())  # the next save waits for this one
            stop = self.policy.at_step_boundary(noticed, busy, self.times.save_s)
            said = {"stop": stop, "save": self.saver.failed, "trace": []}
            if self.attempt_dir is not None:
                said["trace"] = take_request(self.attempt_dir)
            self.store.set(key, json.dumps(said))
        elif self.policy.noticed():
            self.store.set("noticed", "")
        self._crossed_at = now
        self.store.wait([key])
        said = json.loads(self.store.get(key))
        if said["stop"]:
            raise StopRequested(said["stop"])
        self.traced = said["trace"]
        return said["save"]

    def trace(self, rank: int, name: str) -> AbstractContextManager[None]:
        """Around the step that follows: traced, where that was asked of this rank (`fp8slurm trace`)."""
        if self.attempt_dir is None or rank not in self.traced:
            return nullcontext()
        return traced(self.attempt_dir, rank, name)

    def too_late(self) -> str:
        """Why what the engines generate is not waited for any longer, or ""."""
        return self.policy.in_rollout(self.times.save_s + self.saver.left_s())

    def stop(self, state: RunState, reason: StopRequested) -> None:
        """All ranks stop here: save what is not saved yet, and tell the policy."""
        if self.first:
            log.warning("stopping after %s step %d: %s", state.phase, state.step, reason)
        saved = self.saver.save_if_new(state)
        if self.first:
            self.policy.stopped(state.name, saved)
