"""Groups of samples: which are trained on, which have anything to say, and all rollout workers' as one rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from fp8slurm.core.types import NOT_GENERATED, SampleGroup, runs
from fp8slurm.rollout.serialization import decode_groups
from fp8slurm.rollout.tally import LENGTH, REWARD, TRUNCATED, means


def has_signal(group: SampleGroup) -> bool:
    """Whether the rewards of the samples that are trained on differ at all."""
    rewards = [s.reward for s in group.samples if s.train]
    return len(rewards) > 1 and max(rewards) != min(rewards)


def apply_truncation_policy(groups: list[SampleGroup], truncated: Literal["mask", "penalize", "keep"]) -> None:
    """Decide on samples that hit max_tokens (`rollout.truncated`); after scoring, before advantages.

    mask: out of the loss and out of the group's mean (DAPO's overlong filtering, arXiv 2503.14476 section 3.4, masks
    the loss). penalize: reward 0. keep: as any other. One that was aborted or failed is never trained on. How the last
    branch of a conversation ended goes for all of them.
    """
    for group in groups:
        for numbers in group.rollouts:
            branches = [group.samples[i] for i in numbers]
            reason = branches[-1].finish_reason
            for sample in branches:
                if reason in ("abort", "error") or (reason == "length" and truncated == "mask"):
                    sample.train = False
                elif reason == "length" and truncated == "penalize":
                    sample.reward = 0.0


def merge_scores(payloads: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """float32 [length] of every response, from the rollout workers' answers to "score"; lengths of all responses."""
    parts: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    for worker, payload in enumerate(payloads):
        own = lengths[worker :: len(payloads)]
        parts[worker :: len(payloads)] = payload.view(torch.float32).split(own) if own else []
    return parts


def merge(
    answers: list[tuple[dict[str, Any], torch.Tensor]], sent_version: int | None
) -> tuple[list[SampleGroup], dict[str, float]]:
    """The groups in the rollout workers' answers to "rollout" (worker.py), in order, and metrics (docs/metrics.md).

    RuntimeError: a token was generated under other weights than those of `sent_version`.
    """
    groups: list[SampleGroup] = []
    for worker, (_, payload) in enumerate(answers):
        groups += [replace(group, worker=worker) for group in decode_groups(payload)]
    # of a rollout that a checkpoint had, a worker may answer for several that there were, or for none
    values = [value for answer, _ in answers for value in answer.get("answers", [answer])]
    stale = {v for g in groups for s in g.samples for v, _ in runs(s.weight_versions)} - {sent_version, NOT_GENERATED}
    if stale:
        raise RuntimeError(
            f"tokens were generated under weight versions {sorted(stale)}; the engines were sent {sent_version}"
        )
    figures = means(a["figures"] for a in values)
    trained = sum(len(s.prompt_of(g.prompt)) + len(s.response_ids) for g in groups for s in g.samples)
    return groups, {
        "cursor": values[0]["cursor"],
        REWARD: figures.pop(REWARD),
        "reward/failures": sum(a["reward_failures"] for a in values),
        "rollout/groups": len(groups),
        "rollout/dropped": sum(a["dropped"] for a in values),
        "rollout/tokens": figures.pop("rollout/tokens"),
        LENGTH: figures.pop(LENGTH),
        TRUNCATED: figures.pop(TRUNCATED),
        "tokens": trained,
        "data/metadata_bytes": float(sum(payload.numel() for _, payload in answers)),
        "time/generate": max(a["seconds"] for a in values),
        **figures,
    }
