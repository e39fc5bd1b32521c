"""The next step's rollout, generated while the trainer works on this one's (rollout.max_staleness = 1).

    step s   take    the rollout that was begun in step s - 1, under the weights before that step
             sync    engines get the weights that step s starts from
             begin   engines generate step s + 1 under them, while the trainer takes step s

So every sample is trained on by weights that are one step newer than those that generated it, whoever is faster, and
the order of commands does not depend on a clock. Before a checkpoint and an evaluation the rollout under way is waited
for and kept (`finish`); a checkpoint has it (`write`), so that a resumed run trains on the same samples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.core.files import read_json
from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import PackedBatch, SampleGroup
from fp8slurm.rl.recompute import all_logprob_rows
from fp8slurm.rl.weights import Answers, EngineWeights

log = logging.getLogger(__name__)
OPEN_FILE = "open_prompts.json"
SCORED = 16
"""Samples of a step that engines score anew, under the weights that the trainer has, to measure the gap."""


@dataclass(frozen=True)
class Rollout:
    """Rollout workers' answers to "rollout", and the version of the weights that all their tokens come from."""

    answers: Answers
    version: int


class RolloutAhead:
    """A training rank's; all ranks make the same calls in the same order."""

    def __init__(self, weights: EngineWeights) -> None:
        self.weights = weights
        self._request: dict[str, Any] | None = None
        self._kept: Rollout | None = None

    @property
    def under_way(self) -> bool:
        """Whether engines generate for it; they take no other command then."""
        return self._request is not None

    def begin(self, version: int, **request: Any) -> None:
        """Have engines begin a rollout under `version`, which they are sent first; `request` as of "rollout"."""
        assert not self.under_way and self._kept is None
        self.weights.sync(version)
        self.weights.post("rollout", **request)
        self._request = request

    def finish(self, version: int, abandon: Callable[[], str] | None = None) -> None:
        """Wait for what was begun, and keep it. `version`: what the trainer has by now; where an engine lost its
        weights everything is generated anew under these. StepAbandoned: as RankChannel.collect; nothing is kept."""
        if self._request is None:
            return
        request, self._request = self._request, None
        answers = self.weights.collect("rollout", version, abandon, **request)
        assert self.weights.sent_version is not None
        self._kept = Rollout(answers, self.weights.sent_version)

    def take(self, version: int, abandon: Callable[[], str] | None = None) -> Rollout | None:
        """What was begun, waited for, or what a checkpoint had; None where nothing was."""
        self.finish(version, abandon)
        kept, self._kept = self._kept, None
        return kept

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> str:
        """Have the rollout workers put what is finished into a checkpoint; on all ranks alike why they could not, or
        ""."""
        if self._kept is None:
            return ""
        answers = self.weights.channel.call("keep", folder=str(folder), version=self._kept.version)
        return next((a["error"] for a, _ in answers if "error" in a), "")

    def read(self, folder: Path) -> None:
        """Have them take it from a checkpoint, where it has one; else the next step's prompts are asked anew."""
        answers = self.weights.channel.call("restore", folder=str(folder))
        if "version" not in answers[0][0]:
            log.info("%s has no rollout of the next step: its prompts are asked under the present weights", folder)
            return
        self._kept = Rollout(answers, answers[0][0]["version"])


class OpenPrompts:
    """Positions in the data before the cursor whose prompts no step has taken yet: they are asked, or asked again,
    before those behind the cursor. A training rank's; a checkpoint has them, so that none is lost or taken twice."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def write(self, folder: Path) -> None:
        """Put them into a checkpoint, if there are any. OSError."""
        if self.positions:
            (folder / OPEN_FILE).write_text(json.dumps({"positions": self.positions}))

    def read(self, folder: Path) -> None:
        """Take them from a checkpoint. BadCheckpoint: they are none."""
        path = folder / OPEN_FILE
        if not path.is_file():
            return
        found = read_json(path, BadCheckpoint).get("positions")
        if not isinstance(found, list) or not all(type(p) is int and p >= 0 for p in found):
            raise BadCheckpoint(f"{path}: whole numbers of 0 or more are expected")
        self.positions = found


# -- what is measured --------------------------------------------------------------------------------------------


def scored_numbers(groups: list[SampleGroup]) -> list[int]:
    """Up to SCORED of the samples of which every token is trained on, evenly from all of them: their numbers."""
    trained = [n for n, s in enumerate(s for g in groups for s in g.samples) if s.train and s.loss_mask is None]
    count = min(SCORED, len(trained))
    return [trained[i * len(trained) // count] for i in range(count)]


def gap_of_scored(trainer: Any, scored: dict[int, torch.Tensor], batches: list[PackedBatch]) -> dict[str, float]:
    """gap/* over the samples that engines scored under the weights that the trainer has."""
    if not scored:
        return {}
    rows = all_logprob_rows(trainer, batches)
    numbers = rows[:, 0].long()
    own = {n: rows[numbers == n, 1] for n in scored}
    there = [n for n in scored if own[n].numel()]  # an update may leave samples out
    if not there:
        return {}
    return gap_metrics(torch.cat([own[n] for n in there]), torch.cat([scored[n] for n in there]))
