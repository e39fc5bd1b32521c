"""Groups of samples: which are trained on, which have anything to say, and all rollout workers' as one rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from fp8slurm.core.types import NOT_GENERATED, SampleGroup, runs
from fp8slurm.rollout.serialization import decode_groups
from fp8slurm.rollout.tally import LENGTH, REWARD, TRUNCATED, Figure, generated_tokens, means, percentiles

Truncated = Literal["mask", "penalize", "soft", "keep"]


def has_signal(group: SampleGroup) -> bool:
    """Whether the rewards of the samples that are trained on differ at all."""
    rewards = [s.reward for s in group.samples if s.train]
    return len(rewards) > 1 and max(rewards) != min(rewards)


def apply_truncation_policy(groups: list[SampleGroup], truncated: Truncated) -> None:
    """Decide on samples that hit max_tokens (`rollout.truncated`); after scoring, before advantages.

    mask: out of the loss and out of the group's mean (DAPO's overlong filtering, arXiv 2503.14476 section 3.4, masks
    the loss). penalize: reward 0. keep, and here soft: as any other. One that was aborted or failed is never trained
    on. How the last branch of a conversation ended goes for all of them.
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


def overlong_penalty(length: int, limit: int, buffer: int) -> float:
    """What is added to the reward of a response of `length` tokens: 0 up to limit - buffer, from there on down to -1 at
    the limit. DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13; there limit 20,480 and buffer 4,096)."""
    return max(-1.0, min(0.0, (limit - buffer - length) / buffer))


def penalize_overlong(groups: list[SampleGroup], limit: int, buffer: int) -> list[Figure]:
    """Add overlong_penalty to all rewards (rollout.truncated = "soft"); after groups without signal are dropped, which
    the grader's rewards decide, as DAPO's dynamic sampling does. Returns what each sample was given."""
    figures = []
    for group in groups:
        for branches in ([group.samples[i] for i in numbers] for numbers in group.rollouts):
            penalty = overlong_penalty(generated_tokens(branches), limit, buffer)
            for sample in branches:
                sample.reward += penalty
            figures.append(("reward/overlong_penalty", penalty))
    return figures


def merge_scores(payloads: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """float32 [length] of every response, from the rollout workers' answers to "score"; lengths of all responses."""
    parts: list[torch.Tensor] = [torch.empty(0)] * len(lengths)
    for worker, payload in enumerate(payloads):
        own = lengths[worker :: len(payloads)]
        parts[worker :: len(payloads)] = payload.view(torch.float32).split(own) if own else []
    return parts


def values_of(answers: list[tuple[dict[str, Any], torch.Tensor]]) -> list[dict[str, Any]]:
    """What each rollout worker answered. Of a rollout that a checkpoint had, a worker may answer for several that there
    were, or for none."""
    return [value for answer, _ in answers for value in answer.get("answers", [answer])]


def positions_after(answers: list[tuple[dict[str, Any], torch.Tensor]]) -> tuple[int, list[int]]:
    """(cursor, positions before it that were asked and not taken, or not asked), from the answers to "rollout".

    Worker W of n has the positions with position % n == W, and its own cursor (flow.Positions).
    """
    values = values_of(answers)
    cursor = max(a["cursor"] for a in values)
    open_ = {p for a in values for p in a.get("open", ())}
    for worker, a in enumerate(values):
        open_ |= {p for p in range(a["cursor"], cursor) if p % len(values) == worker}
    return cursor, sorted(open_)


def merge(
    answers: list[tuple[dict[str, Any], torch.Tensor]], sent_version: int | None, max_staleness: int = 0
) -> tuple[list[SampleGroup], dict[str, float]]:
    """The groups in the rollout workers' answers to "rollout" (worker.py), in order, and metrics (docs/metrics.md).

    RuntimeError: a token was generated under weights that are more than max_staleness versions older than those of
    `sent_version`, or newer.
    """
    groups: list[SampleGroup] = []
    for worker, (_, payload) in enumerate(answers):
        groups += [replace(group, worker=worker) for group in decode_groups(payload)]
    values = values_of(answers)
    versions = {v for g in groups for s in g.samples for v, _ in runs(s.weight_versions)} - {NOT_GENERATED}
    stale = versions - ({None} if sent_version is None else {sent_version - n for n in range(max_staleness + 1)})
    if stale:
        raise RuntimeError(
            f"tokens were generated under weight versions {sorted(stale)}; the engines were sent {sent_version}"
        )
    figures = means(a["figures"] for a in values)
    total = figures.pop("rollout/tokens")
    trained = sum(len(s.prompt_of(g.prompt)) + len(s.response_ids) for g in groups for s in g.samples)
    return groups, {
        REWARD: figures.pop(REWARD),
        "reward/failures": sum(a["reward_failures"] for a in values),
        "rollout/groups": len(groups),
        "rollout/dropped": sum(a["dropped"] for a in values),
        "rollout/tokens": total,
        LENGTH: figures.pop(LENGTH),
        TRUNCATED: figures.pop(TRUNCATED),
        "tokens": trained,
        "data/metadata_bytes": float(sum(payload.numel() for _, payload in answers)),
        "time/generate": max(a["seconds"] for a in values),
        **percentiles([n for a in values for n in a.get("lengths", ())]),
        **figures,
        **_of_flow(values, total),
    }


def _of_flow(values: list[dict[str, Any]], tokens: float) -> dict[str, float]:
    """What only rollouts that are not in rounds have; tokens: of the samples that were taken or dropped."""
    out: dict[str, float] = {}
    if all("idle" in a for a in values):
        out["rollout/engines_idle"] = sum(a["idle"] for a in values) / len(values)
    for key in ("queued", "in_flight", "asked_again"):
        if all(key in a for a in values):
            out[f"rollout/{key}"] = sum(a[key] for a in values)
    if all("forgotten" in a for a in values):
        forgotten = sum(a["forgotten"] for a in values)
        out["rollout/forgotten"] = forgotten / (forgotten + tokens) if forgotten else 0.0
    return out
