import math
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import SftExample
from fp8slurm.models.known import known_model
from fp8slurm.rl.packing import attention_equal_at, balanced_bins, pack, pack_sft


def make_groups(shapes):
    """shapes: [(prompt length, [(response length, trained)])]. Every token id of the step is another one."""
    ids = iter(range(1, 1_000_000))
    groups, advantages = [], []
    for index, (prompt, responses) in enumerate(shapes):
        group = SampleGroup(Prompt(index, tuple(next(ids) for _ in range(prompt)), ""))
        for n, train in responses:
            tokens = [next(ids) for _ in range(n)]
            group.samples.append(Sample(tokens, [-i / 1024 for i in tokens], [0] * n, "stop", train=train))
        groups.append(group)
        advantages.append([float(next(ids)) for _ in responses])
    return groups, advantages


shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=5)), max_size=6
)


def check_layout(batch, budget, multiple):
    total = len(batch.tokens)
    boundaries = batch.cu_seqlens.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == total and all(a < b for a, b in zip(boundaries, boundaries[1:]))
    assert total > 0 and total % multiple == 0
    for start, end in zip(boundaries, boundaries[1:]):
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        assert batch.labels[start : end - 1].tolist() == batch.tokens[start + 1 : end].tolist()
        assert batch.labels[end - 1] == 0 and batch.loss_weights[end - 1] == 0 and not batch.loss_mask[end - 1]
    for name in ("labels", "position_ids", "loss_weights", "rollout_logprobs", "advantages", "loss_mask"):
        assert getattr(batch, name).shape == (total,)
    real = [(a, b) for a, b in zip(boundaries, boundaries[1:]) if batch.loss_mask[a:b].any()]
    assert len(real) <= 1 or sum(b - a for a, b in real) <= budget


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes,
    updates=st.integers(1, 4),
    ranks=st.integers(1, 4),
    budget=st.integers(8, 64),
    multiple=st.sampled_from([1, 2, 8]),
    mean=st.sampled_from(["token", "sequence"]),
)
def test_every_response_token_is_packed_once(shapes, updates, ranks, budget, multiple, mean):
    groups, advantages = make_groups(shapes)
    kwargs = dict(
        updates=updates, data_parallel_size=ranks, tokens_per_micro_batch=budget, pad_multiple=multiple, loss_mean=mean
    )
    packed = pack(groups, advantages, **kwargs)
    usable = [g for g in groups if any(s.train and s.response_ids for s in g.samples)]
    assert len(packed) == min(updates, len(usable))

    expected = {
        token: (logprob, advantage, g.prompt.index)
        for g, values in zip(groups, advantages)
        for s, advantage in zip(g.samples, values)
        if s.train
        for token, logprob in zip(s.response_ids, s.logprobs)
    }
    seen, update_of_group, order = Counter(), {}, []
    for u, update in enumerate(packed):
        assert len(update) == ranks and len({len(rank) for rank in update}) == 1 and update[0]
        weights = torch.cat([b.loss_weights.double() for rank in update for b in rank])
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        in_update = set()
        for batch in chain.from_iterable(update):
            check_layout(batch, budget, multiple)
            assert torch.equal(batch.loss_weights > 0, batch.loss_mask)
            assert not batch.rollout_logprobs[~batch.loss_mask].any() and not batch.advantages[~batch.loss_mask].any()
            at = batch.loss_mask
            for token, logprob, advantage in zip(
                batch.labels[at].tolist(), batch.rollout_logprobs[at].tolist(), batch.advantages[at].tolist()
            ):
                seen[token] += 1
                assert (logprob, advantage) == expected[token][:2]
                in_update.add(expected[token][2])
        for index in in_update:
            assert update_of_group.setdefault(index, u) == u
        order.append(sorted(in_update))
    assert seen == Counter(expected.keys())
    assert list(chain.from_iterable(order)) == [g.prompt.index for g in usable]

    again = pack(groups, advantages, **kwargs)
    for a, b in zip(chain.from_iterable(chain.from_iterable(packed)), chain.from_iterable(chain.from_iterable(again))):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_weights, b.loss_weights)


def test_a_batch_worked_by_hand():
    group = SampleGroup(Prompt(0, (11, 12), ""), [Sample([21, 22, 23], [-1.0, -2.0, -3.0], [0] * 3, "stop")])
    (((batch,),),) = pack([group], [[0.5]], updates=1, data_parallel_size=1, tokens_per_micro_batch=8, pad_multiple=4)
    third = pytest.approx(1 / 3)
    assert batch.tokens.tolist() == [11, 12, 21, 22, 23, 0, 0, 0]
    assert batch.labels.tolist() == [12, 21, 22, 23, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.loss_weights.tolist() == [0, third, third, third, 0, 0, 0, 0]
    assert batch.rollout_logprobs.tolist() == [0, -1, -2, -3, 0, 0, 0, 0]
    assert batch.advantages.tolist() == [0, 0.5, 0.5, 0.5, 0, 0, 0, 0]
    assert batch.loss_mask.tolist() == [False, True, True, True] + [False] * 4


def test_token_and_sequence_mean():
    groups, advantages = make_groups([(1, [(1, True), (3, True)])])
    kwargs = dict(updates=1, data_parallel_size=1, tokens_per_micro_batch=64)
    ((token,),) = pack(groups, advantages, **kwargs, loss_mean="token")
    ((sequence,),) = pack(groups, advantages, **kwargs, loss_mean="sequence")
    assert sorted(token[0].loss_weights.tolist()) == [0, 0] + [0.25] * 4
    sixth = pytest.approx(1 / 6)
    assert sorted(sequence[0].loss_weights.tolist()) == [0, 0, sixth, sixth, sixth, 0.5]


@pytest.mark.parametrize(("mean", "weights"), [("token", [0.25, 0.25]), ("sequence", [1 / 6, 1 / 2])])
def test_tokens_that_a_loss_mask_leaves_out_have_no_weight(mean, weights):
    """They are in the sequence, since later tokens follow them; the means are over those that are left."""
    groups, advantages = make_groups([(2, [(4, True), (1, True), (3, True)])])
    first, second, third = groups[0].samples
    first.loss_mask, third.loss_mask = [True, False, True, True], [False] * 3
    ((batches,),) = pack(groups, advantages, updates=1, data_parallel_size=1, tokens_per_micro_batch=8, loss_mean=mean)
    whole = {b.samples[0]: b for b in batches}
    assert sorted(whole) == [0, 1], "nothing of the third is left"
    assert whole[0].loss_mask.tolist() == [False, True, False, True, True, False]
    assert whole[0].tokens.tolist() == [*groups[0].prompt.token_ids, *first.response_ids]
    a, w = advantages[0][0], weights[0]
    assert whole[0].loss_weights.tolist() == pytest.approx([0, w, 0, w, w, 0])
    assert whole[0].advantages.tolist() == [0, a, 0, a, a, 0] and whole[0].rollout_logprobs[2] == 0
    assert whole[1].loss_weights.tolist() == pytest.approx([0, weights[1], 0])


def test_nothing_to_train_on():
    groups, advantages = make_groups([(3, [(4, False), (0, True)])])
    assert pack(groups, advantages, updates=2, data_parallel_size=2, tokens_per_micro_batch=8) == []


def test_a_rank_without_sequences_gets_padding():
    groups, advantages = make_groups([(3, [(4, True)])])
    ((first, second),) = pack(
        groups, advantages, updates=1, data_parallel_size=2, tokens_per_micro_batch=8, pad_multiple=4
    )
    assert len(first) == len(second) == 1
    assert second[0].cu_seqlens.tolist() == [0, 4] and not second[0].loss_mask.any()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 60), st.integers(1, 5))
def test_bins(lengths, budget, multiple):
    bins = balanced_bins(lengths, budget, multiple)
    assert sorted(chain.from_iterable(bins)) == list(range(len(lengths)))
    assert len(bins) % multiple == 0 and bins
    for b in bins:
        assert len(b) <= 1 or sum(lengths[i] for i in b) <= budget


def test_ranks_are_balanced_by_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (256,), generator=generator).tolist()
    groups, advantages = make_groups([(8, [(n, True)]) for n in lengths])
    (update,) = pack(groups, advantages, updates=1, data_parallel_size=4, tokens_per_micro_batch=1024)
    tokens = [sum(len(b.tokens) for b in rank) for rank in update]
    assert max(tokens) < 1.02 * min(tokens)
    assert len(update[0]) <= -(-sum(n + 8 for n in lengths) // 1024) // 4 + 1


def test_micro_batches_are_dealt_to_and_fro():
    groups, advantages = make_groups([(1, [(n - 1, True)]) for n in (8, 7, 6, 5)])
    (update,) = pack(groups, advantages, updates=1, data_parallel_size=2, tokens_per_micro_batch=8)
    assert [[len(b.tokens) for b in rank] for rank in update] == [[8, 5], [7, 6]]


def test_micro_batches_are_dealt_by_cost_where_attention_counts():
    """Equal tokens, 8 and 4 + 4, but another square: each rank gets one of both. Without a cost, in order."""
    groups, advantages = make_groups([(1, [(n - 1, True)]) for n in (8, 8, 4, 4, 4, 4)])

    def dealt(**more):
        sizes = {"data_parallel_size": 2, "tokens_per_micro_batch": 8}
        (update,) = pack(groups, advantages, updates=1, **sizes, **more)
        return [sorted(len(b.samples) for b in rank) for rank in update]

    assert dealt(equal_at=8.0) == [[1, 2], [1, 2]] and dealt() == dealt(equal_at=math.inf)
    assert attention_equal_at(known_model("Qwen3-4B")) == pytest.approx(4.022e9 / (36 * 4096), rel=1e-3)
    assert attention_equal_at(known_model("Qwen3-30B-A3B")) == pytest.approx(15_500, rel=0.02)


def test_a_sequence_above_the_budget_does_not_stop_the_others_from_being_spread():
    assert balanced_bins([20, 3, 3, 3], 10, 3) == [[0], [1, 3], [2]]


def test_sft():
    examples = [SftExample((1, 2), (3, 4)), SftExample((5,), (6,))]
    ((first,), (second,)) = pack_sft(examples, data_parallel_size=2, tokens_per_micro_batch=8)
    assert first.tokens.tolist() == [1, 2, 3, 4] and second.tokens.tolist() == [5, 6]
    third = pytest.approx(1 / 3)
    assert first.loss_weights.tolist() == [0, third, third, 0] and second.loss_weights.tolist() == [third, 0]
    assert not first.advantages.any() and not first.rollout_logprobs.any()
