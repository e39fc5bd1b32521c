"""Saved rollouts: what `rollout.save_every` writes, and the trainer's view of the same tokens.

    rollouts/step_000010.jsonl           one sample a line, by the rollout worker (of several: step_000010.0.jsonl, ...)
    rollouts/trainer/step_000010.jsonl   by rank 0: line i is about the i-th sample of those, rollout workers in order

The second file holds the log-probabilities that the gap of the step is computed from: the trainer's, before the step's
first update, at the temperature of the rollout.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fp8slurm.core.files import write_atomic
from fp8slurm.core.types import PackedBatch, SampleGroup


def is_saved(step: int, save_every: int) -> bool:
    """Whether the rollout of an RL step is written (step 0 and the probes are not)."""
    return bool(save_every and step and step % save_every == 0)


def rollout_file(run: Path, step: int, worker: int = 0, workers: int = 1) -> Path:
    """Where a rollout worker writes the samples of a step."""
    return run / "rollouts" / (f"step_{step:06d}.jsonl" if workers == 1 else f"step_{step:06d}.{worker}.jsonl")


def trainer_file(run: Path, step: int) -> Path:
    """Where rank 0 writes the trainer's log-probabilities of a step."""
    return run / "rollouts" / "trainer" / f"step_{step:06d}.jsonl"


def write_rollout(path: Path, groups: list[SampleGroup], prompts: list[str]) -> None:
    """One sample a line; `prompts` are the decoded prompts of `groups`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for group, prompt in zip(groups, prompts, strict=True):
        for s in group.samples:
            row = {"index": group.prompt.index, "prompt": prompt, "label": group.prompt.label, "response": s.text}
            row |= {"reward": s.reward, "finish_reason": s.finish_reason}
            row |= {key: value for key, value in (("parts", s.parts), ("source", group.prompt.source)) if value}
            row |= {"tokens": s.response_ids, "logprobs": s.logprobs}
            if s.rollout is not None:
                row |= {"rollout": s.rollout, "turns": s.turns} | ({"error": s.error} if s.error else {})
            row |= {"prompt_tokens": s.prompt_ids} if s.prompt_ids is not None else {}
            if s.loss_mask is not None:
                row["loss_mask"] = [int(m) for m in s.loss_mask]
            row |= {"teacher_logprobs": s.teacher_logprobs} if s.teacher_logprobs is not None else {}
            lines.append(json.dumps(row) + "\n")
    write_atomic(path, "".join(lines))


def logprob_rows(batches: list[PackedBatch]) -> torch.Tensor:
    """float32 [N, 2] (number of the sample, trainer's log-probability) of each trained token, in order in a sample."""
    rows = []
    for b in batches:
        assert b.trainer_logprobs is not None and (not b.samples or max(b.samples) < 2**24)
        logprobs = b.trainer_logprobs
        number = torch.zeros_like(logprobs)
        for sample, start, end in zip(b.samples, b.cu_seqlens.tolist(), b.cu_seqlens.tolist()[1:]):
            number[start:end] = sample
        rows.append(torch.stack([number, logprobs], 1)[b.loss_mask])
    return torch.cat(rows)


def write_trainer_logprobs(path: Path, groups: list[SampleGroup], rows: torch.Tensor) -> None:
    """`rows` (logprob_rows of all ranks, in any order of samples) as a line a sample; null: a sample, or a token of it,
    that was not trained on."""
    by_sample: dict[int, list[float]] = {}
    for number, logprob in rows.tolist():
        by_sample.setdefault(int(number), []).append(logprob)
    lines = []
    for number, (index, sample) in enumerate((g.prompt.index, s) for g in groups for s in g.samples):
        found = by_sample.get(number)
        assert found is None or len(found) == sample.trained_tokens, (number, len(found), sample.trained_tokens)
        logprobs: list[float | None] | None = None
        if found is not None:
            each = iter(found)
            logprobs = [next(each) if m else None for m in sample.loss_mask or [True] * len(sample.response_ids)]
        lines.append(json.dumps({"index": index, "trainer_logprobs": logprobs}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(lines))
