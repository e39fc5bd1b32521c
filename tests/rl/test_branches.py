"""Branches of one conversation: an advantage, a baseline and a loss weight that count it once."""

import pytest

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.advantages import advantages_of
from fp8slurm.rl.packing import pack


def conversation(number, reward, *lengths):
    return [Sample([5] * n, [-1.0] * n, [1] * n, "stop", reward=reward, rollout=number) for n in lengths]


def group(*conversations):
    return SampleGroup(Prompt(0, (1, 2), ""), [s for c in conversations for s in c])


@pytest.mark.parametrize("advantage, divide", [("grpo", True), ("rloo", False), ("reinforce_pp", True)])
def test_baselines_count_a_conversation_once(advantage, divide):
    how = advantages_of(AlgorithmSection(advantage=advantage, divide_by_std=divide))
    (plain,) = how([group(conversation(0, 1.0, 4), conversation(1, 0.0, 4), conversation(2, 0.0, 4))])
    (split,) = how([group(conversation(0, 1.0, 2, 1, 1), conversation(1, 0.0, 4), conversation(2, 0.0, 1, 3))])
    assert split == [plain[0]] * 3 + [plain[1]] + [plain[2]] * 2


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_branches_share_the_weight_of_one_sequence(mean):
    """The first conversation has 6 tokens in two branches, as one response of 6 would have."""

    def weights(*conversations):
        g = group(*conversations)
        ((batches,),) = pack(
            [g], [[1.0] * len(g.samples)], updates=1, loss_mean=mean, constant=10, data_parallel_size=1,
            tokens_per_micro_batch=100,
        )  # fmt: skip
        (batch,) = batches
        return sorted(batch.loss_weights[batch.loss_mask].tolist()), batch.weight_sum

    whole, total = weights(conversation(0, 1.0, 6), conversation(1, 0.0, 3))
    split, same = weights(conversation(0, 1.0, 4, 2), conversation(1, 0.0, 3))
    assert split == pytest.approx(whole) and same == pytest.approx(total)


def test_a_branch_is_packed_behind_its_own_prompt():
    first, second = conversation(0, 1.0, 2, 1)
    second.prompt_ids = [7, 8, 9]
    ((batches,),) = pack(
        [group([first, second])], [[1.0, 1.0]], updates=1, data_parallel_size=1, tokens_per_micro_batch=100
    )
    assert sorted(map(tuple, split(batches[0]))) == [(1, 2, 5, 5), (7, 8, 9, 5)]


def split(batch):
    cuts = batch.cu_seqlens.tolist()
    return [batch.tokens[a:b].tolist() for a, b in zip(cuts, cuts[1:])]
