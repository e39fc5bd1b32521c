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
from safetensors import safe_open
from safetensors.torch import save

from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import NOT_GENERATED, PackedBatch, SampleGroup
from fp8slurm.rl.recompute import all_logprob_rows
from fp8slurm.rl.weights import Answers, EngineWeights

log = logging.getLogger(__name__)
FILE = "next_rollout.safetensors"
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

    def write(self, folder: Path) -> None:
        """Put what is finished into a checkpoint. OSError."""
        if self._kept is None:
            return
        values = [answer for answer, _ in self._kept.answers]
        tensors = {str(i): payload for i, (_, payload) in enumerate(self._kept.answers)}
        metadata = {"version": str(self._kept.version), "answers": json.dumps(values)}
        (folder / FILE).write_bytes(save(tensors, metadata))

    def read(self, folder: Path) -> None:
        """Take it from a checkpoint, where it has one; else the next step's prompts are asked anew."""
        path = folder / FILE
        if not path.is_file():
            log.info("%s has no rollout of the next step: its prompts are asked under the present weights", folder)
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            payloads = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        values = json.loads(metadata["answers"])
        self._kept = Rollout(list(zip(values, payloads, strict=True)), int(metadata["version"]))


# -- what is measured --------------------------------------------------------------------------------------------


def scored_sequences(groups: list[SampleGroup]) -> dict[int, list[list[int]]]:
    """Up to SCORED of the samples of which every token is trained on, evenly from all of them: number -> [prompt,
    response] ids."""
    samples = [(g.prompt, s) for g in groups for s in g.samples]
    trained = [n for n, (_, s) in enumerate(samples) if s.train and s.loss_mask is None]
    count = min(SCORED, len(trained))
    chosen = [trained[i * len(trained) // count] for i in range(count)]
    return {n: [list(s.prompt_of(prompt)), list(s.response_ids)] for n in chosen for prompt, s in samples[n : n + 1]}


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


def staleness(groups: list[SampleGroup], version: int) -> float:
    """Versions that the weights behind the tokens are older than `version`, on average."""
    versions = [v for g in groups for s in g.samples for v in s.weight_versions if v != NOT_GENERATED]
    return version - sum(versions) / len(versions) if versions else 0.0


def as_lag(record: dict[str, float], versions: float) -> dict[str, float]:
    """gap/* of samples from weights that were `versions` behind: how far the policy has moved since, and the gap."""
    renamed = {key.replace("gap/", "lag/"): value for key, value in record.items()}
    return {**renamed, "lag/versions": versions}
