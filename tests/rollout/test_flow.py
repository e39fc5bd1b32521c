"""Groups under way: scored as samples end, replaced at once, stopped and continued (the engines are stand-ins)."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

import pytest

from fp8slurm.config import RunConfig
from fp8slurm.config.schema import EngineSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import PromptOrder
from fp8slurm.engine.client import Generation
from fp8slurm.engine.completions import Completions
from fp8slurm.engine.pool import EnginePool, Member, WeightsLost
from fp8slurm.rollout.flow import Positions, Scorer, mask_older
from fp8slurm.rollout.groups import positions_after
from fp8slurm.rollout.sampler import Sampler
from fp8slurm.rollout.serialization import decode_groups
from fp8slurm.rollout.worker import RolloutWorker

END = 258
PROMPTS = 40


class Engine:
    """Generates token 7 a number of times that the prompt says, then the end token, `pace` seconds each. What is aborted
    is answered with the tokens so far."""

    def __init__(self, lengths, pace=0.0) -> None:
        self.lengths, self.pace, self.version, self.aborted = lengths, pace, 0, 0
        self.requests: list[tuple[int, int]] = []

    async def complete(self, http, request) -> Generation:
        index, begun = request.token_ids[0], len(request.token_ids) - 2
        self.requests.append((index, begun))
        versions, aborts = [], self.aborted
        while begun + len(versions) < self.lengths(index):
            await asyncio.sleep(self.pace)
            if aborts != self.aborted:
                break
            versions.append(self.version)
        whole = begun + len(versions) == self.lengths(index)
        ids = [7] * (len(versions) - whole) + [END] * whole
        return Generation(ids, [-0.5] * len(ids), "stop" if whole else "abort", versions)

    def abort_all(self) -> None:
        self.aborted += 1

    def wait_exit(self, timeout_s):
        return False

    def stop(self):
        pass


class Engines(EnginePool):
    def __init__(self, *engines) -> None:
        super().__init__([Member(e, f"engine {i}") for i, e in enumerate(engines)], EngineSection())
        for member in self.members:
            member.client = member.engine
        self.completions = Completions(self)
        self.complete = self.completions.complete

    @property
    def version(self):
        return self.members[0].client.version


class Rewards:
    """The first sample of a prompt gets 0, the others 1; all of a dull prompt's get 1."""

    failures = 0

    def __init__(self, dull=()) -> None:
        self.dull, self.calls = dull, []

    def takes_groups(self, source):
        return False

    def score(self, groups, heartbeat):
        for group in groups:
            self.calls.append((group.prompt.index, group.first))
            for i, sample in enumerate(group.samples):
                sample.reward = float(group.first + i > 0 or group.prompt.index in self.dull)


@pytest.fixture
def node():
    pools = []

    def make(engine, rewards=None, number=0, workers=1, **rollout):
        config = RunConfig(rollout={"n_samples": 2, "max_tokens": 1000, **rollout}, data={"shuffle": False})
        worker = RolloutWorker(config, None, number, workers, SimpleNamespace())
        tokenizer = SimpleNamespace(batch_decode=lambda rows: ["x" for _ in rows])
        worker.sampler, worker.engines = Sampler(config, tokenizer, [END]), Engines(engine)
        worker.rewarder = rewards or Rewards()
        worker.scorer = Scorer(worker.rewarder, lambda: None)
        worker.train_prompts = [Prompt(i, (i, 1), "l") for i in range(PROMPTS)]
        worker.order = PromptOrder(PROMPTS, 0, False)
        worker.channel = SimpleNamespace(count=4, progress=lambda: None)
        pools.append(worker.engines)
        return worker

    yield make
    for pool in pools:
        pool.stop()
        pool.completions.close()


def indices(payload):
    return [g.prompt.index for g in decode_groups(payload)]


def test_groups_without_signal_are_replaced_at_once_and_every_sample_is_scored_by_itself(node):
    rewards = Rewards(dull={0, 1, 2, 5})
    worker = node(Engine(lambda index: 3), rewards, max_replacements=3)
    answer, payload = worker.do_rollout(1, 0, 4)
    taken = indices(payload)
    assert 3 in taken and not {0, 1, 2, 5} & set(taken) and len(taken) == 4
    assert answer["cursor"] == 8 and answer["dropped"] == 4 and answer["open"] == []
    assert sorted(rewards.calls) == [(i, k) for i in range(8) for k in range(2)]
    assert answer["figures"]["rollout/response_length"] == [48, 16] and 0 <= answer["idle"] <= 1


def test_rewards_are_computed_while_others_generate(node):
    scored = threading.Event()

    class Waits(Engine):
        async def complete(self, http, request):
            if request.token_ids[0] == 1:
                await asyncio.to_thread(scored.wait, 60)
            return await super().complete(http, request)

    class Tells(Rewards):
        def score(self, groups, heartbeat):
            super().score(groups, heartbeat)
            scored.set()

    assert indices(node(Waits(lambda index: 3), Tells()).do_rollout(1, 0, 2)[1]) == [0, 1]


def test_a_reward_of_all_samples_of_a_prompt_gets_them_together(node):
    class Together(Rewards):
        def takes_groups(self, source):
            return True

    rewards = Together()
    node(Engine(lambda index: 3), rewards).do_rollout(1, 0, 2)
    assert sorted(rewards.calls) == [(0, 0), (1, 0)]


def test_a_reward_that_raises_ends_it(node):
    class Raises(Rewards):
        def score(self, groups, heartbeat):
            raise RuntimeError("on prompt 0")

    with pytest.raises(RuntimeError, match="on prompt 0"):
        node(Engine(lambda index: 3), Raises()).do_rollout(1, 0, 2)


def lost(node):
    """An engine, its worker, which has given a rollout of four prompts up, and the member that is behind."""
    engine = Engine(lambda index: 3)
    worker = node(engine)
    (member,) = worker.engines.members
    member.behind = True
    with pytest.raises(WeightsLost):
        worker.do_rollout(1, 0, 4)
    return engine, worker, member


def test_a_node_that_lost_its_weights_goes_on_where_it_was(node):
    engine, worker, member = lost(node)
    member.behind = False
    worker.engines.completions.updated()
    answer, payload = worker.do_rollout(1, 0, 4)
    assert indices(payload) == [0, 1, 2, 3] and answer["cursor"] == 4 and len(engine.requests) == 8


def test_under_other_weights_it_begins_anew(node):
    engine, worker, member = lost(node)
    member.behind, engine.version = False, 1
    worker.engines.completions.updated()
    _, payload = worker.do_rollout(1, 0, 4)
    assert {v for g in decode_groups(payload) for s in g.samples for v in s.weight_versions} == {1}


def test_workers_have_positions_of_their_own_and_nothing_is_lost_between_them(node):
    """Worker 1 needs more replacements than worker 0: what worker 0 has not asked stays open, and comes first."""
    workers = [node(Engine(lambda i: 3), Rewards({1, 3, 5}), n, 2, max_replacements=9) for n in range(2)]
    cursor, open_, taken = 0, [], []
    for step in range(1, 4):
        answers = [w.do_rollout(step, cursor, 3, open=open_) for w in workers]
        cursor, open_ = positions_after(answers)
        taken += [i for _, payload in answers for i in indices(payload)]
    assert len(taken) == len(set(taken)) == 9
    assert sorted({*taken, *open_, 1, 3, 5}) == list(range(cursor))


def run_partially(worker, engine, steps, prompts=4):
    """What each step takes of a run with these many steps: [(step, groups)], and the answers."""
    cursor, open_, out, answers = 0, [], [], []
    for step in range(1, steps + 1):
        engine.version = step - 1
        answer, payload = worker.do_rollout(step, cursor, prompts, open=open_, trainer_version=step - 1)
        cursor, open_ = positions_after([(answer, payload)])
        out.append(list(worker.holder.groups))
        answers.append(answer)
    return out, answers, open_


LONG = {1, 6, 11}
"""Prompts whose responses are ten times as long as the others'."""


def test_what_a_step_does_not_wait_for_goes_on_in_the_next_and_comes_once(node):
    engine = Engine(lambda index: 200 if index in LONG else 4, pace=0.002)
    worker = node(engine, max_staleness=4, oversample=1.5)
    steps, answers, open_ = run_partially(worker, engine, 6)
    taken = [g.prompt.index for groups in steps for g in groups]
    assert [len(groups) for groups in steps] == [4] * 6 and len(taken) == len(set(taken))
    assert sorted({*taken, *open_}) == list(range(answers[-1]["cursor"])), "a prompt was lost"
    assert 1 not in [g.prompt.index for g in steps[0]] and 1 in taken, "the long one was not waited for, and came later"
    for step, groups in enumerate(steps):
        for sample in (s for g in groups for s in g.samples):
            assert len(sample.response_ids) in (4, 200) and sample.response_ids[-1] == END
            assert sample.weight_versions == sorted(sample.weight_versions)
            assert step - 4 <= sample.weight_versions[0] and sample.weight_versions[-1] <= step
    assert any(len({*s.weight_versions}) > 1 for groups in steps for g in groups for s in g.samples)
    assert any(begun > 0 for _, begun in engine.requests), "it was asked from its beginning"
    assert answers[0]["in_flight"] > 0


def test_a_sample_that_gets_too_old_is_asked_again_and_waited_for(node):
    engine = Engine(lambda index: 400 if index == 1 else 4, pace=0.002)
    worker = node(engine, max_staleness=1, oversample=2.0)
    steps, answers, _ = run_partially(worker, engine, 3)
    assert [a["asked_again"] for a in answers] == [0, 0, 2] and answers[2]["forgotten"] > 0
    (group,) = [g for groups in steps for g in groups if g.prompt.index == 1]
    assert group in steps[2] and {v for s in group.samples for v in s.weight_versions} == {2}


def test_a_new_worker_asks_again_what_was_under_way(node):
    """After a kill: only positions are left of what was in flight."""
    lengths = lambda index: 200 if index in LONG else 4  # noqa: E731
    first = Engine(lengths, pace=0.002)
    steps, answers, open_ = run_partially(node(first, max_staleness=4, oversample=1.5), first, 2)
    assert open_
    second = Engine(lengths)
    again = node(second, max_staleness=4, oversample=1.5)
    answer, payload = again.do_rollout(3, answers[-1]["cursor"], 4, open=open_, trainer_version=2)
    assert set(open_) <= {index for index, _ in second.requests} and all(begun == 0 for _, begun in second.requests)
    assert indices(payload)[: len(open_)] == open_[:4], "they are first in line"
    taken = [g.prompt.index for groups in steps for g in groups] + indices(payload)
    assert sorted({*taken, *answer["open"]}) == list(range(answer["cursor"])) and len(taken) == len(set(taken))


def test_only_the_first_steps_favour_short_answers(node):
    """A third of the prompts has answers of 60 tokens, the others of 4. A step takes what is ready first, but what it
    leaves is ready sooner in the next one: over all steps no length is missing but what is in flight at the end."""
    engine = Engine(lambda index: 60 if index % 3 == 0 else 4, pace=0.002)
    worker = node(engine, max_staleness=8, oversample=1.5)
    steps, answers, open_ = run_partially(worker, engine, 8)
    long = [sum(g.prompt.index % 3 == 0 for g in groups) for groups in steps]
    assert long[0] < 4 / 3 and sum(long) + sum(p % 3 == 0 for p in open_) == -(-answers[-1]["cursor"] // 3)
    assert sum(a["asked_again"] for a in answers) == 0 and len(open_) <= 2


def test_a_probe_is_fresh_and_moves_nothing(node):
    engine = Engine(lambda index: 200 if index in LONG else 4, pace=0.002)
    worker = node(engine, max_staleness=4, oversample=1.5)
    answer, _ = worker.do_rollout(1, 0, 4, trainer_version=0)
    left = list(worker.left)
    _, payload = worker.do_rollout(0, 4, 2, keep_all=True)
    assert indices(payload) == [4, 5] and worker.left == left and answer["open"]


def test_tokens_of_older_weights_are_masked():
    def sample(versions, mask=None):
        n = len(versions)
        return Sample([7] * n, [-1.0] * n, versions, "stop", loss_mask=mask)

    samples = [sample([3, 3]), sample([2, 2, 3]), sample([2, 3, 3], [True, False, True])]
    mask_older([SampleGroup(Prompt(0, (1,), "l"), samples)], 3)
    assert [s.loss_mask for s in samples] == [None, [False, False, True], [False, False, True]]
    assert [s.trained_tokens for s in samples] == [2, 1, 1]


def test_open_positions_come_before_the_cursor_and_each_once():
    positions = Positions(PromptOrder(100, 0, False), 10, [3, 8, 4], 0, 2)
    assert [positions.take() for _ in range(4)] == [(4, 4), (8, 8), (10, 10), (12, 12)] and positions.cursor == 13
    assert Positions(PromptOrder(100, 0, False), 10, [3], 1, 2).take() == (3, 3)


def take_ahead(worker, engine, steps, ahead=2, prompts=4):
    """(answer, groups) of every step of a run that asks `ahead` steps before it takes; cursor and open positions."""
    cursor, open_, asked, out = 0, [], 0, []

    def ask(step):
        nonlocal cursor, open_, asked
        last = min(step + ahead, steps)
        if last > asked:
            answer, _ = worker.do_ask(cursor, open_, prompts, last - asked)
            (cursor, open_), asked = positions_after([(answer, None)]), last

    for step in range(1, steps + 1):
        engine.version = step - 1
        if asked < step:
            ask(step)
        answer, payload = worker.do_take(step, prompts)
        cursor, open_ = positions_after([(answer, payload)])
        out.append((answer, list(worker.holder.groups)))
        ask(step)
    return out, cursor, open_


def test_groups_are_taken_in_the_order_of_asking_and_the_others_go_on(node):
    engine = Engine(lambda index: 60 if index in LONG else 4, pace=0.002)
    worker = node(engine, max_staleness=2)
    steps, cursor, open_ = take_ahead(worker, engine, 5)
    assert [[g.prompt.index for g in groups] for _, groups in steps] == [
        list(range(4 * s, 4 * s + 4)) for s in range(5)
    ]
    assert cursor == 20 and open_ == [], "nothing is asked for steps that there are not"
    for step, (_, groups) in enumerate(steps):
        versions = {v for g in groups for s in g.samples for v in s.weight_versions}
        assert step - 2 <= min(versions) and max(versions) <= step
    assert (
        steps[0][0]["queued"] + steps[0][0]["in_flight"] > 0 and steps[4][0]["queued"] == steps[4][0]["in_flight"] == 0
    )


def test_a_take_that_is_given_again_has_the_same_groups(node):
    """Another node has lost its weights meanwhile."""
    engine = Engine(lambda index: 3)
    worker = node(engine, max_staleness=2)
    worker.do_ask(0, [], 4, 3)
    first, again = worker.do_take(1, 4), worker.do_take(1, 4)
    assert indices(first[1]) == indices(again[1]) == [0, 1, 2, 3] and first[0]["open"] == again[0]["open"]
    assert indices(worker.do_take(2, 4)[1]) == [4, 5, 6, 7]


def test_without_weights_a_take_waits_for_the_next_update(node):
    engine = Engine(lambda index: 3)
    worker = node(engine, max_staleness=2)
    (member,) = worker.engines.members
    member.behind = True
    worker.do_ask(0, [], 4, 3)
    with pytest.raises(WeightsLost):
        worker.do_take(1, 4)
    member.behind, engine.version = False, 1
    worker.engines.completions.updated()
    assert indices(worker.do_take(1, 4)[1]) == [0, 1, 2, 3]


def test_of_the_steps_ahead_a_dropped_group_is_replaced_and_a_new_worker_asks_what_was_open(node):
    engine = Engine(lambda index: 3)
    worker = node(engine, Rewards({1, 4}), max_staleness=2, max_replacements=2)
    answer, _ = worker.do_ask(0, [], 4, 3)
    assert answer["open"] == list(range(12)) and answer["cursor"] == 12
    answer, payload = worker.do_take(1, 4)
    taken = indices(payload)
    assert len(taken) == 4 and not {1, 4} & set(taken) and answer["dropped"] >= 1
    second = node(Engine(lambda index: 3), Rewards({1, 4}), max_staleness=2, max_replacements=2)
    cursor, open_ = positions_after([(answer, payload)])
    second.do_ask(cursor, open_, 4, 2)
    for step in (2, 3):
        answer, payload = second.do_take(step, 4)
        taken += indices(payload)
    assert len(taken) == len(set(taken)) == 12 and sorted({*taken, *answer["open"], 1, 4}) == list(
        range(answer["cursor"])
    )
