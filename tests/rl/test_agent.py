"""The agent's share of a rollout: dealing, dropping groups without signal, replacing them at most K times."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from fp8slurm.config import RunConfig
from fp8slurm.rl.agent import Agent
from fp8slurm.rl.data import PromptOrder
from fp8slurm.rl.rollout import sample_seed
from fp8slurm.rl.types import Prompt, Sample, SampleGroup
from fp8slurm.rl.wire import decode_groups

DULL = {0, 1, 2, 5}
"""Prompts whose samples all get the same reward."""


class Sampler:
    """Two samples a prompt: the engine's part, which is not under test here."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def sample(self, generate, prompts, n, max_tokens, temperature, routing):
        self.positions += [position for position, _ in prompts]
        return [SampleGroup(p, [Sample([7, 258], [-0.5, -0.1], [3, 3], "stop", "x") for _ in range(n)]) for _, p in prompts]


class Rewards:
    failures = 0

    def score(self, groups, beat):
        for group in groups:
            for i, sample in enumerate(group.samples):
                sample.reward = 0.5 if group.prompt.index in DULL else float(i)


def agent_with(store, number=0, agents=1, **rollout):
    config = RunConfig(rollout={"n_samples": 2, **rollout}, data={"shuffle": False})
    agent = Agent(config, None, number, agents, SimpleNamespace())
    agent.sampler, agent.rewarder, agent.store = Sampler(), Rewards(), store
    agent.engines = SimpleNamespace(generate=None)
    agent.train_prompts = [Prompt(i, (1, 2), "l") for i in range(20)]
    agent.order = PromptOrder(20, 0, False)
    agent.channel = SimpleNamespace(count=4, get=lambda key: int(store.get(key)))
    return agent


@pytest.fixture
def store():
    return dist.HashStore()


def indices(payload):
    return [g.prompt.index for g in decode_groups(payload)]


def test_groups_without_signal_are_replaced_from_the_prompts_that_follow(store):
    agent = agent_with(store, max_replacements=3)
    answer, payload = agent.do_rollout(1, 0, 4)
    assert indices(payload) == [3, 4, 6, 7]  # 0-3, then 4-6 (5 is dull), then 7
    assert answer["cursor"] == 8 and answer["dropped"] == 4
    assert agent.sampler.positions == list(range(8)), "every position once: seeds never repeat"
    assert answer["rewards"] == [8.0, 16] and answer["generated"] == 32


def test_at_most_k_rounds_then_the_step_goes_on_with_what_it_has(store):
    answer, payload = agent_with(store, max_replacements=1).do_rollout(1, 0, 4)
    assert indices(payload) == [3, 4, 6] and answer["cursor"] == 7


def test_a_step_may_have_no_group_at_all(store):
    answer, payload = agent_with(store).do_rollout(1, 0, 3)
    assert indices(payload) == [] and answer["dropped"] == 3 and answer["cursor"] == 3


def test_all_groups_stay_where_asked(store):
    assert indices(agent_with(store, drop_no_signal=False).do_rollout(1, 0, 4)[1]) == [0, 1, 2, 3]
    assert indices(agent_with(store).do_rollout(1, 0, 4, keep_all=True)[1]) == [0, 1, 2, 3]


@pytest.mark.parametrize("gpus", [0, 2])
def test_engines_on_the_trainers_gpus_start_when_its_state_is_there(store, gpus):
    agent, seen = agent_with(store, number=1, agents=2), []
    agent.config = RunConfig(slurm={"ranks_per_node": 2, "gpus_per_node": gpus})
    agent.receiver = SimpleNamespace(held=())
    agent.channel = SimpleNamespace(get=seen.append, at_work=nullcontext)
    agent.engines = SimpleNamespace(start=lambda: seen.append("start"), connect=lambda held: seen.append("connect"))
    agent._bring_up()
    # without GPUs they were started at once, by Agent.start
    assert seen == (["resident/2", "resident/3", "start", "connect"] if gpus else ["connect"])


def test_two_agents_share_the_prompts_and_agree_on_the_cursor(store):
    """Each waits for the other's count before it replaces: run them in two threads."""
    from concurrent.futures import ThreadPoolExecutor

    agents = [agent_with(store, number, 2, max_replacements=3) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda a: a.do_rollout(1, 0, 4), agents))
    assert sorted(i for _, payload in answers for i in indices(payload)) == [3, 4, 6, 7]
    assert {a["cursor"] for a, _ in answers} == {8}
    assert sorted(p for a in agents for p in a.sampler.positions) == list(range(8))


def test_seeds_differ_by_run_position_and_sample():
    seeds = {sample_seed(run, position, k) for run in range(3) for position in range(50) for k in range(8)}
    assert len(seeds) == 3 * 50 * 8 and max(seeds) < 2**31
    assert sample_seed(0, 1, 2) == sample_seed(0, 1, 2)
