"""What in a run's last steps somebody should look at before it goes on for hours: docs/metrics.md has the rules."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.numbers import number
from fp8slurm.models.precision import gap_bound
from fp8slurm.observe.metrics import Record

WINDOW = 10
"""RL steps that a mean is taken over."""
NEAR = 0.5
"""Of rollout.max_gap."""
TRUNCATED = 0.25
EMPTY = 0.5
SKIPPED = 3
"""Of WINDOW steps."""
COLLAPSED = 0.1
"""Of the first steps' entropy."""


def alerts(records: Sequence[Record], first: Sequence[Record], bound: float) -> list[str]:
    """A sentence for each rule that holds.

    records: the last ones, oldest first; first: those of the run's beginning; bound: of the gap (`bound_of`).
    """
    rl = [r for r in records if r["phase"] == "rl" and r["step"] > 0][-WINDOW:]
    out = []
    gap = next((v for r in reversed(records) if (v := number(r.get("gap/mean_abs"))) is not None), None)
    if gap is not None and gap > NEAR * bound:
        where = "over" if gap > bound else "near"
        out.append(f"gap: {gap:.3g} nats a token, {where} the bound {bound:g} at which the run ends (rollout.max_gap)")
    truncated = _mean(rl, "rollout/truncated")
    if truncated is not None and truncated > TRUNCATED:
        out.append(f"truncation: {truncated:.0%} of the last samples hit rollout.max_tokens")
    dropped, kept = (sum(number(r.get(f"rollout/{key}")) or 0.0 for r in rl) for key in ("dropped", "groups"))
    if dropped > EMPTY * (dropped + kept):
        share = dropped / (dropped + kept)
        out.append(f"empty groups: {share:.0%} of the last groups had equal rewards, and nothing is learned from them")
    skipped = sum(1 for r in rl if number(r.get("skipped")))
    if skipped >= SKIPPED:
        out.append(f"no update: {skipped} of the last {len(rl)} steps left one out")
    begun = _mean([r for r in first if r["phase"] == "rl" and r["step"] > 0][:WINDOW], "entropy")
    entropy = _mean(rl, "entropy")
    if len(rl) == WINDOW and begun and entropy is not None and entropy < COLLAPSED * begun:
        out.append(
            f"entropy: {entropy:.2g} nats a token, from {begun:.2g} in the first steps: the policy has collapsed"
        )
    return out


def bound_of(config: Mapping[str, Any]) -> float:
    """rollout.max_gap of a config.json, or its default for the run's precision; infinite where that is not known, or
    the run has none."""

    def section(name: str, *keys: str) -> dict[str, Any]:
        values = config.get(name)
        return {key: values[key] for key in keys if key in values} if isinstance(values, dict) else {}

    if section("control", "freeze_engine").get("freeze_engine"):
        return math.inf
    try:
        return gap_bound(
            RunConfig.model_validate(
                {
                    "rollout": section("rollout", "max_gap"),
                    "fp8": section("fp8", "backend", "engine"),
                    "model": section("model", "rollout_checkpoint"),
                }
            )
        )
    except (ValidationError, InputError, OSError):  # an older version's, torn, or its folder is gone
        return math.inf


def _mean(records: Sequence[Record], key: str) -> float | None:
    values = [v for r in records if (v := number(r.get(key))) is not None]
    return statistics.fmean(values) if values else None
