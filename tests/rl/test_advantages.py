import math

import pytest

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.advantages import advantages_of, group_relative
from fp8slurm.rl.controls import negate, shuffle_rewards
from fp8slurm.rollout.groups import apply_truncation_policy, has_signal, overlong_penalty, penalize_overlong


def group(*samples):
    """A reward each, or (reward, finish reason)."""
    pairs = [s if isinstance(s, tuple) else (s, "stop") for s in samples]
    return SampleGroup(Prompt(0, (1,), ""), [Sample([1], [0.0], [0], f, reward=r) for r, f in pairs])


def test_worked_by_hand():
    # mean 0.5, squared deviations 4 * 0.25, sample variance 1/3
    assert group_relative([1, 0, 0, 1], False) == [0.5, -0.5, -0.5, 0.5]
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    assert group_relative([1, 0, 0, 1], True) == pytest.approx([expected, -expected, -expected, expected], abs=1e-12)
    # mean 2, deviations -1 0 1, sample standard deviation 1
    assert group_relative([1, 2, 3], True) == pytest.approx([-1, 0, 1], abs=2e-6)
    assert group_relative([0.7, 0.7, 0.7], True) == pytest.approx([0, 0, 0], abs=1e-9)
    assert group_relative([3.0], True) == [0.0] and group_relative([], True) == []


def test_signal():
    assert has_signal(group(1, 0)) and has_signal(group(0.5, 0.5, 0.25))
    assert not has_signal(group(1, 1, 1)) and not has_signal(group(1)) and not has_signal(group())
    masked = group(1, (0, "length"))
    assert has_signal(masked)
    apply_truncation_policy([masked], "mask")
    assert not has_signal(masked)


@pytest.mark.parametrize(
    "truncated, rewards, trained",
    [("mask", [1, 1], [True, False]), ("penalize", [1, 0], [True, True]), ("keep", [1, 1], [True, True]),
     ("soft", [1, 1], [True, True])],
)  # fmt: skip
def test_truncated_samples(truncated, rewards, trained):
    g = group(1, (1, "length"))
    apply_truncation_policy([g], truncated)
    assert [s.reward for s in g.samples] == rewards
    assert [s.train for s in g.samples] == trained
    aborted = group((1, "abort"))
    apply_truncation_policy([aborted], truncated)
    assert not aborted.samples[0].train


@pytest.mark.parametrize(
    "length, penalty",
    [(0, 0), (1, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1), (30000, -1)],
)
def test_soft_overlong_punishment_of_dapo(length, penalty):
    """Its eq. 13 with its values: 16,384 tokens expected, 4,096 more as the buffer."""
    assert overlong_penalty(length, 20480, 4096) == penalty


def test_the_penalty_counts_what_the_model_generated_and_moves_no_groups_signal():
    long = [Sample([1] * n, [0.0] * n, [0] * n, "length", reward=1.0) for n in (4, 7, 8)]
    g = SampleGroup(Prompt(0, (1,), ""), long)
    apply_truncation_policy([g], "soft")
    assert [s.train for s in long] == [True] * 3 and not has_signal(g)
    figures = penalize_overlong([g], 8, 4)
    assert [s.reward for s in long] == [1.0, 0.25, 0.0]
    assert figures == [("reward/overlong_penalty", p) for p in (0.0, -0.75, -1.0)]


def test_masked_samples_have_no_part_in_the_mean():
    groups = [group(1, (9, "length"), 0), group((1, "length"))]
    apply_truncation_policy(groups, "mask")
    assert advantages_of(AlgorithmSection(divide_by_std=False))(groups) == [[0.5, 0.0, -0.5], [0.0]]


def test_controls():
    assert negate([[1.0, -2.0], []]) == [[-1.0, 2.0], []]
    first, again, other = ([group(*range(8)), group(*range(8, 16))] for _ in range(3))
    for groups, seed in ((first, "0-1"), (again, "0-1"), (other, "0-2")):
        shuffle_rewards(groups, seed)
    flat = [[s.reward for g in groups for s in g.samples] for groups in (first, again, other)]
    assert sorted(flat[0]) == list(range(16)) and flat[0] != list(range(16))
    assert flat[0] == flat[1] != flat[2]
    assert any(r >= 8 for r in flat[0][:8]), "rewards stayed in their groups, whose means they would still move"
