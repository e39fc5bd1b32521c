"""Advantages: one number for every sample of a step, from the rewards of its groups. A user's function is another."""

from __future__ import annotations

import math
from collections.abc import Callable

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.core.user_code import is_user_function, load_user_function, tried

STD_EPSILON = 1e-6
FLAG = "--algorithm.advantage"
Advantages = Callable[[list[SampleGroup]], list[list[float]]]
"""All groups of a step, of all nodes, in order -> an advantage for every sample of every group. Samples with `train`
False are not trained on: what they get is not used."""


def group_relative(rewards: list[float], divide_by_std: bool) -> list[float]:
    """A_i = r_i - mean(r), divided by std(r) + 1e-6 if asked for.

    GRPO, DeepSeekMath (arXiv 2402.03300) section 4.1.2; std is the sample standard deviation (n - 1), as torch.std.
    Without the division: Dr. GRPO (arXiv 2503.20783).
    """
    if not rewards:
        return []
    mean = sum(rewards) / len(rewards)
    centred = [r - mean for r in rewards]
    if not divide_by_std or len(rewards) == 1:
        return centred
    std = (sum(c * c for c in centred) / (len(rewards) - 1)) ** 0.5
    return [c / (std + STD_EPSILON) for c in centred]


def grpo(groups: list[list[float]], divide_by_std: bool) -> list[list[float]]:
    """group_relative in every group."""
    return [group_relative(rewards, divide_by_std) for rewards in groups]


def rloo(groups: list[list[float]], divide_by_std: bool) -> list[list[float]]:
    """A_i = r_i - mean of the other rewards of the group: leave-one-out, RLOO (arXiv 2402.14740); a sample that is
    alone in its group gets 0."""
    return [[(len(r) * x - sum(r)) / max(1, len(r) - 1) for x in r] for r in groups]


def reinforce_pp(groups: list[list[float]], divide_by_std: bool) -> list[list[float]]:
    """group_relative over all samples of the step as one group: a global baseline and a global scale, REINFORCE++
    (arXiv 2501.03262). Groups whose rewards are all equal have a signal here."""
    values = iter(group_relative([r for rewards in groups for r in rewards], divide_by_std))
    return [[next(values) for _ in rewards] for rewards in groups]


def none(groups: list[list[float]], divide_by_std: bool) -> list[list[float]]:
    """0 for every sample: only the teacher counts (teacher.checkpoint)."""
    return [[0.0] * len(rewards) for rewards in groups]


ADVANTAGES = {"grpo": grpo, "rloo": rloo, "reinforce_pp": reinforce_pp, "none": none}
"""algorithm.advantage by name: rewards of the samples that are trained on, [group][sample]."""


def advantages_of(algorithm: AlgorithmSection) -> Advantages:
    """The function that algorithm.advantage names. InputError: there is none, or it does not return what it should."""
    name = algorithm.advantage
    if name in ADVANTAGES:
        return lambda groups: _of_trained(groups, algorithm)
    if not is_user_function(name):
        raise InputError(f"{FLAG} {name!r} is not one of {', '.join(ADVANTAGES)}, module:function")
    function = load_user_function(name, FLAG, "groups")

    def checked(groups: list[SampleGroup]) -> list[list[float]]:
        answer = [[float(a) for a in values] for values in function(groups)]
        if [len(values) for values in answer] != [len(g.samples) for g in groups]:
            raise InputError(f"{FLAG} {name}: needed is one advantage for every sample of every group, in their order")
        if not all(math.isfinite(a) for values in answer for a in values):
            raise InputError(f"{FLAG} {name} returned NaN or infinity")
        return answer

    return checked


def try_advantages(algorithm: AlgorithmSection) -> None:
    """Call the user's function, if there is one, on two made-up groups. InputError: it fails."""
    if algorithm.advantage in ADVANTAGES:
        return
    function = advantages_of(algorithm)
    samples = [Sample([3, 4], [-1.0, -0.5], [0, 0], "stop", "x", reward) for reward in (0.0, 1.0, 0.5)]
    with tried(f"{FLAG} {algorithm.advantage}", "two made-up groups of 2 and 1 samples"):
        function([SampleGroup(Prompt(0, (1, 2), "x"), samples[:2]), SampleGroup(Prompt(1, (1,), "y"), samples[2:])])


def _of_trained(groups: list[SampleGroup], algorithm: AlgorithmSection) -> list[list[float]]:
    """0 for samples that are not trained on, which no mean counts. Branches of a conversation have one advantage, and
    count once."""
    rollouts = [[r for r in group.rollouts if any(group.samples[i].train for i in r)] for group in groups]
    rewards = [[group.samples[r[-1]].reward for r in own] for group, own in zip(groups, rollouts)]
    result = []
    for group, own, values in zip(groups, rollouts, ADVANTAGES[algorithm.advantage](rewards, algorithm.divide_by_std)):
        of_sample = {i: value for r, value in zip(own, values) for i in r}
        result.append([of_sample[i] if s.train else 0.0 for i, s in enumerate(group.samples)])
    return result
