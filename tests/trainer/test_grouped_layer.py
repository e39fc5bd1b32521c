"""Grouped experts in a Trainer on the CPU, on one rank, recomputed, and expert-parallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_reference import write_model

pytestmark = pytest.mark.slow


def _same(pair: list[Any]) -> None:
    """But for the order of sums, the few codes that it moves, and what Adam makes of that in its first steps."""
    want, got = pair
    before, after = ([torch.cat(each[when]) for each in pair] for when in ("before", "after"))
    torch.testing.assert_close(before[1], before[0], atol=1e-4, rtol=0)
    assert got["steps"][0][:2] == pytest.approx(want["steps"][0][:2], rel=2e-4)
    for a, b in zip(want["steps"], got["steps"], strict=True):
        assert b[:2] == pytest.approx(a[:2], rel=3e-2)
    changes = [a - b for a, b in zip(after, before)]
    assert changes[0].norm() > 10, "nothing was learned"
    assert (changes[0] - changes[1]).norm() < 0.1 * changes[0].norm()


def test_one_rank(launch: Callable[..., Any], tmp_path: Path) -> None:
    scenarios = ["grouped", "grouped_recomputed"]
    model = write_model(tmp_path / "moe", seed=2, tie=False, moe=True)
    done = launch("grouped", 1, scenarios, "grouped_scenarios", moe=model)
    for scenario in scenarios:
        _same(done.result(scenario))


def test_two_ranks_share_the_experts(launch: Callable[..., Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "moe", seed=2, tie=False, moe=True)
    done = launch("grouped_ep2", 2, ["grouped_ep2"], "grouped_scenarios", moe=model)
    for rank in range(2):
        _same(done.result("grouped_ep2", rank))
