"""The rollout worker's share of a rollout: dealing, dropping groups without signal, replacing them at most K times."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import PromptOrder, sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.pool import WeightsLost
from fp8slurm.rollout.sampler import Sampler as RealSampler
from fp8slurm.rollout.serialization import decode_groups
from fp8slurm.rollout.worker import RolloutWorker

DULL = {0, 1, 2, 5}
"""Prompts whose samples all get the same reward."""


class Sampler:
    """Two samples a prompt: the engine's part, which is not under test here."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def sample(self, generate, prompts, n, max_tokens, temperature, routing):
        self.positions += [position for position, _ in prompts]
        return [
            SampleGroup(p, [Sample([7, 258], [-0.5, -0.1], [3, 3], "stop", "x") for _ in range(n)]) for _, p in prompts
        ]


class Rewards:
    failures = 0

    def score(self, groups, heartbeat):
        for group in groups:
            for i, sample in enumerate(group.samples):
                sample.reward = 0.5 if group.prompt.index in DULL else float(i)


def worker_with(store, number=0, workers=1, **rollout):
    config = RunConfig(run={"deterministic": True}, rollout={"n_samples": 2, **rollout}, data={"shuffle": False})
    worker = RolloutWorker(config, None, number, workers, SimpleNamespace())
    worker.sampler, worker.rewarder, worker.store = Sampler(), Rewards(), store
    worker.engines = SimpleNamespace(generate=None, generate_batches=None, version=3)
    worker.train_prompts = [Prompt(i, (1, 2), "l") for i in range(20)]
    worker.order = PromptOrder(20, 0, False)
    worker.channel = SimpleNamespace(
        count=4, progress=lambda: None, tell=store.set, get=lambda key: int(store.get(key))
    )
    return worker


@pytest.fixture
def store():
    return dist.HashStore()


def indices(payload):
    return [g.prompt.index for g in decode_groups(payload)]


def test_groups_without_signal_are_replaced_from_the_prompts_that_follow(store):
    worker = worker_with(store, max_replacements=3)
    answer, payload = worker.do_rollout(1, 0, 4)
    assert indices(payload) == [3, 4, 6, 7]  # 0-3, then 4-6 (5 is dull), then 7
    assert answer["cursor"] == 8 and answer["dropped"] == 4
    assert worker.sampler.positions == list(range(8)), "every position once: seeds never repeat"
    assert answer["figures"]["reward/mean"] == [8.0, 16] and answer["figures"]["rollout/response_length"] == [32, 16]


def test_at_most_k_rounds_then_the_step_goes_on_with_what_it_has(store):
    answer, payload = worker_with(store, max_replacements=1).do_rollout(1, 0, 4)
    assert indices(payload) == [3, 4, 6] and answer["cursor"] == 7


def test_a_step_may_have_no_group_at_all(store):
    answer, payload = worker_with(store).do_rollout(1, 0, 3)
    assert indices(payload) == [] and answer["dropped"] == 3 and answer["cursor"] == 3


def test_all_groups_stay_where_asked(store):
    assert indices(worker_with(store, drop_no_signal=False).do_rollout(1, 0, 4)[1]) == [0, 1, 2, 3]
    assert indices(worker_with(store).do_rollout(1, 0, 4, keep_all=True)[1]) == [0, 1, 2, 3]


def test_the_soft_penalty_comes_after_groups_without_signal_are_dropped(store):
    """Responses of 2 tokens, of which 2 are the limit: each loses 1, and only the groups that had a signal stay."""
    worker = worker_with(store, truncated="soft", overlong_buffer=1, max_tokens=2, max_replacements=3)
    answer, payload = worker.do_rollout(1, 0, 4)
    groups = decode_groups(payload)
    assert [g.prompt.index for g in groups] == [3, 4, 6, 7]
    assert [[s.reward for s in g.samples] for g in groups] == [[-1.0, 0.0]] * 4
    assert answer["figures"]["reward/overlong_penalty"] == [-8.0, 8] and answer["figures"]["reward/mean"] == [8.0, 16]
    assert answer["lengths"] == [2] * 16


@pytest.mark.parametrize("truncated", ["penalize", "mask"])
def test_the_reward_that_is_shown_is_what_the_function_said(store, truncated):
    """Before samples that were cut off lose theirs; whether a group has a signal is decided after it."""
    worker = worker_with(store, truncated=truncated)
    first = worker.sampler.sample

    def cut(*a, **k):
        groups = first(*a, **k)
        for group in groups:
            group.samples[1].finish_reason = "length"
        return groups

    worker.sampler.sample = cut
    answer, payload = worker.do_rollout(1, 3, 2)  # rewards 0 and 1, the second cut off
    assert answer["figures"]["reward/mean"] == [2.0, 4] and indices(payload) == [] and answer["dropped"] == 2
    assert answer["figures"]["rollout/truncated"] == [2, 4], (
        "an aborted sample or one that stopped was not cut off; a dropped group counts"
    )
    worker = worker_with(store, truncated=truncated, drop_no_signal=False)
    worker.sampler.sample = cut
    (group, _) = decode_groups(worker.do_rollout(1, 3, 2)[1])
    assert [(s.reward, s.train) for s in group.samples] == [
        (0.0, True),
        (0.0, True) if truncated == "penalize" else (1.0, False),
    ]


@pytest.mark.parametrize("gpus", [0, 2])
def test_engines_on_the_trainers_gpus_start_when_its_state_is_there(store, gpus):
    worker, seen = worker_with(store, number=1, workers=2), []
    worker.config = RunConfig(slurm={"ranks_per_node": 2, "gpus_per_node": gpus})
    worker.receiver = SimpleNamespace(held=())
    worker.channel = SimpleNamespace(get=seen.append, at_work=nullcontext)
    worker.engines = SimpleNamespace(start=lambda: seen.append("start"), connect=lambda held: seen.append("connect"))
    worker._bring_up()
    # without GPUs they were started at once, by Rollout worker.start
    assert seen == (["resident/2", "resident/3", "start", "connect"] if gpus else ["connect"])


def test_two_workers_share_the_prompts_and_agree_on_the_cursor(store):
    """Each waits for the other's count before it replaces: run them in two threads."""
    from concurrent.futures import ThreadPoolExecutor

    workers = [worker_with(store, number, 2, max_replacements=3) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda a: a.do_rollout(1, 0, 4), workers))
    assert sorted(i for _, payload in answers for i in indices(payload)) == [3, 4, 6, 7]
    assert {a["cursor"] for a, _ in answers} == {8}
    assert sorted(p for a in workers for p in a.sampler.positions) == list(range(8))


class LosesWeights(Sampler):
    """Its engine dies in one of its calls."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def sample(self, *arguments, **more):
        self.left -= 1
        if self.left == 0:
            raise WeightsLost
        return super().sample(*arguments, **more)


@pytest.mark.parametrize("call", [1, 2])
def test_a_node_that_lost_its_weights_does_not_cost_the_others_their_rollout(store, call):
    """The command is given again: the samples are those of an undisturbed rollout, and shares that are done stay done."""
    from concurrent.futures import ThreadPoolExecutor

    def rollout(worker):
        try:
            return worker.do_rollout(1, 0, 4)
        except WeightsLost:
            return None

    whole = worker_with(store, max_replacements=3).do_rollout(1, 0, 4)
    workers = [worker_with(store, number, 2, max_replacements=3) for number in range(2)]
    workers[1].sampler = LosesWeights(call)
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(rollout, workers))
        assert first[0] is not None and first[1] is None
        for worker in workers:
            worker.channel.count += 1
        done = [set(a.sampler.positions) for a in workers]
        again = list(pool.map(rollout, workers))
    assert sorted(i for _, payload in again for i in indices(payload)) == sorted(indices(whole[1]))
    assert {a["cursor"] for a, _ in again} == {whole[0]["cursor"]}
    assert sum(a["figures"]["reward/mean"][0] for a, _ in again) == whole[0]["figures"]["reward/mean"][0]
    assert [set(a.sampler.positions) >= d for a, d in zip(workers, done)] == [True, True]
    first_round = [[0, 2], [1, 3]]
    for worker, positions in zip(workers, first_round):
        assert all(worker.sampler.positions.count(p) == 1 for p in positions), "a share was generated twice"


def test_what_was_computed_is_used_only_for_the_same_command_and_weights(store):
    worker, asked = worker_with(store), []
    worker.evaluation = SimpleNamespace(
        evaluate=lambda generate, checkpoint, heartbeat: asked.append(checkpoint) or {"n": len(asked)}
    )
    assert [worker.do_evaluate(name)[0]["n"] for name in ("a", "a", "b", "a")] == [1, 1, 2, 3]
    worker.engines.version += 1
    assert worker.do_evaluate("a")[0]["n"] == 4
    worker.do_rollout(1, 0, 4)
    assert worker.do_evaluate("a")[0]["n"] == 5


def test_seeds_differ_by_run_position_and_sample():
    seeds = {sample_seed(run, position, k) for run in range(3) for position in range(50) for k in range(8)}
    assert len(seeds) == 3 * 50 * 8 and max(seeds) < 2**31
    assert sample_seed(0, 1, 2) == sample_seed(0, 1, 2)
    # no two places run together: run 1 at 23 is not run 12 at 3
    assert len({sample_seed(1, 23, 4), sample_seed(12, 3, 4), sample_seed(1, 2, 34)}) == 3


def real_sampler(**sections):
    tokenizer = SimpleNamespace(batch_decode=lambda rows: ["".join(map(chr, ids)) for ids in rows])
    return RealSampler(RunConfig.model_validate(sections), tokenizer, [256, 258])


def test_every_sample_is_asked_for_with_the_runs_settings_and_a_seed_of_its_own():
    sampler, asked = real_sampler(run={"seed": 5}, rollout={"top_p": 0.9, "top_k": 40, "temperature": 0.3}), []

    def generate(requests):
        asked.extend(requests)
        return [Generation([97 + i, 258], [-1.0 - i, -0.5], "stop", [4, 4]) for i, _ in enumerate(requests)]

    prompts = [(11, Prompt(3, (1, 2), "l")), (12, Prompt(0, (7,), "m"))]
    groups = sampler.sample(generate, prompts, 3, 16, 0.7)
    assert asked == [
        GenerateRequest(list(prompt.token_ids), 16, 0.7, 0.9, 40, [256, 258], sample_seed(5, position, k))
        for position, prompt in prompts
        for k in range(3)
    ]
    assert len({r.seed for r in asked}) == 6
    # each group has the answers to its own prompt, in order; the end token is trained on, and is no text to be graded
    assert [g.prompt for g in groups] == [prompt for _, prompt in prompts]
    assert [s.text for g in groups for s in g.samples] == list("abcdef")
    last = groups[1].samples[2]
    assert (last.response_ids, last.logprobs, last.weight_versions) == ([102, 258], [-6.0, -0.5], [4, 4])
    assert sampler.sample(generate, [], 3, 16, 0.7) == []


def test_only_an_end_token_at_the_end_is_no_text():
    answers = [[97, 258], [97, 98], [258, 97], []]
    sampler = real_sampler()
    sampler.tokenizer = SimpleNamespace(batch_decode=lambda rows: [str(ids) for ids in rows])
    (group,) = sampler.sample(
        lambda _: [Generation(ids, [0.0] * len(ids), "length", [0] * len(ids)) for ids in answers], [(0, Prompt(0, (1,), ""))], 4, 2, 1.0
    )  # fmt: skip
    assert [s.text for s in group.samples] == ["[97]", "[97, 98]", "[258, 97]", "[]"]


def test_a_runs_own_end_tokens_come_on_top_of_the_models(tmp_path):
    tiny.write_model(tmp_path)
    config = RunConfig(model={"hf_checkpoint": tmp_path}, rollout={"stop_token_ids": [7, 258]})
    assert RealSampler.load(config).stop_ids == [7, 256, 258]
