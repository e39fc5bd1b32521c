"""What is said of the last steps of a run: one case for every rule in docs/metrics.md, and its edge."""

from __future__ import annotations

import math

import pytest

from fp8slurm.run.alerts import alerts, bound_of


def steps(count: int = 20, **figures: float) -> list[dict]:
    return [{"phase": "rl", "step": s, "gap/mean_abs": 0.01, "entropy": 1.0} | figures for s in range(1, count + 1)]


@pytest.mark.parametrize(
    "last, word",
    [
        ({}, ""),
        ({"gap/mean_abs": 0.25}, ""),
        ({"gap/mean_abs": 0.26}, "near the bound 0.5"),
        ({"gap/mean_abs": 0.51}, "over the bound 0.5"),
        ({"rollout/truncated": 0.25}, ""),
        ({"rollout/truncated": 0.3}, "30% of the last samples hit rollout.max_tokens"),
        ({"rollout/dropped": 4, "rollout/groups": 4}, ""),
        ({"rollout/dropped": 6, "rollout/groups": 4}, "60% of the last groups had equal rewards"),
        ({"skipped": 1.0}, "10 of the last 10 steps"),
        ({"entropy": 0.1}, ""),
        ({"entropy": 0.09}, "collapsed"),
        ({"entropy": None, "gap/mean_abs": None, "rollout/truncated": None}, ""),
    ],
)
def test_the_rules(last, word):
    records = steps() + [r | {"step": r["step"] + 20} for r in steps(10, **last)]
    told = alerts(records, records, 0.5)
    assert len(told) == bool(word) and word in "".join(told), told
    assert alerts(steps(0), steps(0), 0.5) == []


def test_two_steps_without_an_update_are_none_of_the_alerts():
    records = steps()
    for r in records[-2:]:
        r["skipped"] = 1.0
    assert alerts(records, records, 0.5) == []
    records[-5]["skipped"] = 1.0
    assert len(alerts(records, records, 0.5)) == 1


@pytest.mark.parametrize(
    "config, bound",
    [
        ({"rollout": {"max_gap": 0.2}}, 0.2),
        ({"rollout": {"max_gap": 0.0}}, math.inf),
        ({"fp8": {"backend": "emulated"}}, 0.5),
        ({"fp8": {"backend": "off", "engine": "bf16"}}, 0.3),
        ({"control": {"freeze_engine": True}}, math.inf),
        ({"fp8": {"backend": "of another version"}}, math.inf),
        ({"model": {"rollout_checkpoint": "/nowhere"}, "fp8": {"backend": "off"}}, math.inf),
    ],
)
def test_the_bound_of_the_gap_is_the_runs(config, bound):
    assert bound_of(config) == bound
