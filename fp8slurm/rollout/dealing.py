"""Samples go to the ranks that train on them, and to nobody else.

    rollout worker   describes its groups to all ranks: lengths, rewards, versions, masks    (describe_groups)
    ranks            decide from that who trains on what, each for itself and all alike      (rl/packing.py)
    rank 0           tells the workers which samples go where: the command "deal"            (rl/exchange.py)
    rollout worker   sends every rank its samples' tokens, log-probabilities, experts        (Holder.parts)
    rank             puts them where their descriptions were                                 (fill_in)

A sample's number counts all samples of all workers, in order. A worker holds its groups until its next rollout; what a
checkpoint is to have of them it writes itself (Holder.write).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from fp8slurm.core.types import SampleGroup
from fp8slurm.rollout.channel import Part
from fp8slurm.rollout.serialization import decode_groups, describe_groups, encode_groups

KEPT = "next_rollout"
"""What a checkpoint has of a rollout begins with this: KEPT.safetensors, or KEPT.WORKER.safetensors for each of several
workers. Tensor "0" (and "1", ... in files of one writer for all workers, as earlier states wrote) is a worker's groups;
metadata: "answers", JSON, and "version" of the weights behind all tokens."""


class Holder:
    """A rollout worker's groups of the newest rollout, and what it answered about them."""

    def __init__(self, number: int, workers: int) -> None:
        self.number, self.workers = number, workers
        self.groups: list[SampleGroup] = []
        self.answer: dict[str, Any] = {}

    def hold(self, answer: dict[str, Any], groups: list[SampleGroup]) -> torch.Tensor:
        """Keep the groups; what all ranks are told of them (uint8 [bytes])."""
        self.answer, self.groups = answer, groups
        return describe_groups(groups)

    def parts(self, wanted: list[list[int]], first: int, to: list[list[int]], texts: bool) -> list[Part]:
        """Of each list of numbers the samples that are here, with their prompts, and who gets them.

        first: the number of the first sample here. texts: with the responses' text."""
        return [(self._encoded(set(numbers), first, texts), ranks) for numbers, ranks in zip(wanted, to, strict=True)]

    def _encoded(self, numbers: set[int], first: int, texts: bool) -> torch.Tensor:
        chosen = []
        for group in self.groups:
            samples = [s for number, s in enumerate(group.samples, first) if number in numbers]
            first += len(group.samples)
            if samples:
                kept = samples if texts else [replace(s, text="") for s in samples]
                chosen.append(SampleGroup(group.prompt, kept))
        return encode_groups(chosen) if chosen else torch.empty(0, dtype=torch.uint8)

    def write(self, folder: Path, version: int) -> None:
        """Into a checkpoint. OSError."""
        name = f"{KEPT}.safetensors" if self.workers == 1 else f"{KEPT}.{self.number}.safetensors"
        metadata = {"version": str(version), "answers": json.dumps(self.answer.get("answers", [self.answer]))}
        (folder / name).write_bytes(save({"0": encode_groups(self.groups)}, metadata))

    def read(self, folder: Path) -> torch.Tensor | None:
        """Hold this worker's share of what a checkpoint has, however many workers wrote it; what all ranks are told, or
        None where it has nothing. The answer says which answers and which version these are. OSError, ValueError."""
        paths = sorted(folder.glob(f"{KEPT}*.safetensors"), key=lambda p: (len(p.name), p.name))
        stored = []  # (file, tensor) and answers of each worker that there was
        version = None
        for path in paths:
            with safe_open(path, "pt") as file:
                metadata, names = file.metadata(), sorted(file.keys(), key=int)
            answers = json.loads(metadata["answers"])
            version = int(metadata["version"])
            for i, name in enumerate(names):
                stored.append((path, name, answers[i : i + 1] if len(names) > 1 else answers))
        if version is None:
            return None
        groups, mine = [], []
        for i, (path, name, answers) in enumerate(stored):
            if i * self.workers // len(stored) == self.number:
                with safe_open(path, "pt") as file:
                    groups += decode_groups(file.get_tensor(name))
                mine += answers
        return self.hold({"answers": mine, "version": version}, groups)


def fill_in(groups: list[SampleGroup], numbers: Sequence[int], payloads: Sequence[torch.Tensor]) -> None:
    """Put the samples of these numbers (ascending) and their prompts where their descriptions are in `groups`.

    payloads: one of each worker (uint8 [bytes], Holder.parts; empty: it has none of them), in order. ValueError.
    """
    places = [(group, place) for group in groups for place in range(len(group.samples))]
    chosen = iter([places[number] for number in numbers])
    for payload in payloads:
        for got in decode_groups(payload) if payload.numel() else ():
            for sample in got.samples:
                group, place = next(chosen)
                if (got.prompt.index, len(sample.response_ids)) != (
                    group.prompt.index,
                    len(group.samples[place].response_ids),
                ):
                    raise ValueError(f"a sample of prompt {got.prompt.index} came in place of {group.prompt.index}'s")
                group.prompt, group.samples[place] = got.prompt, sample
    if next(chosen, None) is not None:
        raise ValueError("fewer samples came than were asked for")
