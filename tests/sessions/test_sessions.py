"""Conversations with a made-up engine: what is asked, what is kept, what is trained on, and what becomes of faults."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest
import tiny
import torch

from fp8slurm.check.objective import check_generate
from fp8slurm.config import RunConfig
from fp8slurm.config.schema import RewardSection, RolloutSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import NOT_GENERATED, Prompt, Sample, SampleGroup
from fp8slurm.data.prompts import load_tokenizer, sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.engine.pool import WeightsLost
from fp8slurm.models.spec import ModelSpec
from fp8slurm.rewards.pool import RewardPool
from fp8slurm.rollout.groups import apply_truncation_policy
from fp8slurm.rollout.sampler import Sampler
from fp8slurm.rollout.serialization import decode_groups, encode_groups
from fp8slurm.rollout.tally import figures_of
from fp8slurm.sessions.runner import Asked, SessionError, SessionRunner, load_generate
from fp8slurm.sessions.session import Model, NoRoom, Session

END = 258


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return Model(load_tokenizer(folder), [256, END], ModelSpec.from_hf_dir(folder), 100)


class Engine:
    """Says what it is told to; remembers what it was asked."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers, self.asked = list(answers), []

    def answer(self, request: GenerateRequest) -> Generation:
        self.asked.append(request)
        ids = (self.answers.pop(0) if self.answers else [7, END])[: request.max_tokens]
        why = "stop" if ids[-1] == END else "length"
        n = len(self.asked)
        return Generation(ids, [-float(n)] * len(ids), why, [n] * len(ids))

    async def complete(self, request: GenerateRequest, number: int = 0) -> Generation:
        await asyncio.sleep(0)
        return self.answer(request)

    def batch(self, requests: list[GenerateRequest]) -> list[Generation]:
        return [self.answer(request) for request in requests]


PROMPT = Prompt(3, (1, 2, 3), "label")
REQUEST = GenerateRequest([1, 2, 3], 20, 0.7, 0.9, 40, [256, END], seed=5)


def session(model, engine, prompt=PROMPT, **more) -> Session:
    from dataclasses import replace

    return Session(prompt, 1, replace(REQUEST, **more), model, engine.complete)


def test_later_turns_are_appended_to_what_the_engine_has_seen(model):
    engine = Engine([10, 11, END], [12, END])

    async def talk(s):
        first = await s.complete(PROMPT.token_ids)
        assert first.ids == [1, 2, 3, 10, 11, END] and first.finish_reason == "stop"
        second = await s.complete([*first.ids, 50, 51])
        assert second.token_ids == [12, END] and second.ids == [*first.ids, 50, 51, 12, END]
        return s.sample()

    sample = asyncio.run(talk(session(model, engine)))
    assert [r.token_ids for r in engine.asked] == [[1, 2, 3], [1, 2, 3, 10, 11, END, 50, 51]]
    assert sample.response_ids == [10, 11, END, 50, 51, 12, END] and sample.prompt_ids is None and sample.rollout == 1
    assert sample.loss_mask == [True] * 3 + [False] * 2 + [True] * 2
    assert sample.logprobs == [-1.0] * 3 + [0.0] * 2 + [-2.0] * 2
    assert sample.weight_versions == [1, 1, 1, NOT_GENERATED, NOT_GENERATED, 2, 2]
    assert sample.turns == [(0, 3), (5, 7)] and sample.trained_tokens == 5
    # the run's sampling in every turn; what was said is taken from rollout.max_tokens; each turn has a seed of its own
    assert [(r.temperature, r.top_p, r.top_k, r.max_tokens) for r in engine.asked] == [
        (0.7, 0.9, 40, 20),
        (0.7, 0.9, 40, 17),
    ]
    assert [r.seed for r in engine.asked] == [5, sample_seed(5, "turn", 1)]


def test_one_turn_is_the_sample_of_a_plain_rollout(model):
    async def talk(s):
        await s.complete(PROMPT.token_ids)
        return s.sample()

    hi = model.tokenizer.convert_tokens_to_ids(["h", "i"])
    sample = asyncio.run(talk(session(model, Engine([*hi, END]))))
    assert sample.loss_mask is None and sample.prompt_ids is None and sample.text == "hi"


def test_messages_are_matched_and_only_what_the_template_adds_is_tokenized(model):
    """The engine's ids are kept, though no tokenizer would make them of the text: "is" is one token, and was said in
    two."""
    i, s_ = (model.tokenizer.convert_tokens_to_ids(c) for c in "is")
    engine = Engine([i, s_, END], [7, END], [8, END])
    messages = [{"role": "user", "content": "what"}]
    ids = tuple(model.tokenizer(model.render(messages))["input_ids"])

    async def talk(s):
        turn = await s.complete(messages)
        assert turn.text == "is" and turn.message == {"role": "assistant", "content": "is"}
        more = [*messages, turn.message, {"role": "tool", "content": "4"}]
        await s.complete(more)
        # what the model is said to have said is not what it said: another branch, tokenized as a whole
        await s.complete([*messages, {"role": "assistant", "content": "are"}, {"role": "user", "content": "4"}])
        return s.samples()

    first, second = asyncio.run(talk(session(model, engine, Prompt(0, ids, ""))))
    assert first.response_ids[:3] == [i, s_, END] and first.prompt_ids is None
    added = model.tokenizer("\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert engine.asked[1].token_ids == [*ids, i, s_, END, *added]
    assert second.prompt_ids == engine.asked[2].token_ids and second.response_ids == [8, END]


def test_an_answer_that_was_cut_off_is_closed_by_the_template(model):
    engine = Engine([65, 66], [7, END])

    async def talk(s):
        messages = [{"role": "user", "content": "what"}]
        turn = await s.complete(messages, max_tokens=2)
        await s.complete([*messages, turn.message, {"role": "user", "content": "go on"}])
        return s.sample()

    sample = asyncio.run(talk(session(model, engine)))
    assert sample.response_ids[2] == END and sample.loss_mask[:3] == [True, True, False]


def test_branches_take_what_was_said_before_into_their_prompt(model):
    engine = Engine([10, END], [11, END], [12, END])

    async def talk(s):
        first = await s.complete(PROMPT.token_ids)
        await asyncio.gather(s.complete([*first.ids, 40], max_tokens=5), s.complete([*first.ids, 41], max_tokens=5))
        return s.samples()

    one, two = asyncio.run(talk(session(model, engine)))
    assert one.response_ids == [10, END, 40, 11, END] and one.prompt_ids is None
    assert two.response_ids == [12, END] and two.prompt_ids == [1, 2, 3, 10, END, 41] and two.loss_mask is None
    assert one.rollout == two.rollout == 1


def test_limits_hold_over_the_conversation(model):
    engine = Engine([10] * 15, [11] * 15)

    async def talk(s):
        first = await s.complete(PROMPT.token_ids)
        assert len(first.token_ids) == 15
        second = await s.complete([*first.ids, 9])
        assert len(second.token_ids) == 5 and second.finish_reason == "length"
        third = await s.complete([*second.ids, 9])
        assert third.token_ids == [] and third.finish_reason == "length"
        with pytest.raises(NoRoom, match=r"20 of rollout.max_tokens 20"):
            await s.complete([*second.ids, 9])
        return s.sample()

    sample = asyncio.run(talk(session(model, engine)))
    assert sample.finish_reason == "length" and sum(sample.loss_mask) == 20


def test_a_tools_output_that_fills_the_context_marks_the_sample_as_cut_off(model):
    async def talk(s):
        first = await s.complete(PROMPT.token_ids)
        assert (await s.complete([*first.ids, *[9] * 95])).token_ids == []
        return s.sample()

    assert asyncio.run(talk(session(model, Engine([10, END])))).finish_reason == "length"


@pytest.mark.parametrize(
    "conversation, message",
    [
        ([], "empty conversation"),
        ([1, "x"], "list of token ids, or of messages; there is 'x'"),
        ([1, True], "there is True"),
        ([1, 320], "token 320: the model has 320 tokens"),
        ([-1], "token -1"),
    ],
)
def test_what_is_no_conversation_is_refused(model, conversation, message):
    with pytest.raises(ValueError, match=message):
        asyncio.run(session(model, Engine()).complete(conversation))


def test_experts_are_those_of_the_turn_that_sampled_the_token(tmp_path):
    tiny.write_model(tmp_path, moe=True)
    spec = ModelSpec.from_hf_dir(tmp_path)
    shape = (spec.num_layers, spec.experts_per_token)
    moe = Model(load_tokenizer(tmp_path), [END], spec, 100)

    class Routed(Engine):
        def answer(self, request):
            a = super().answer(request)
            tokens = len(request.token_ids) + len(a.token_ids) - 1
            experts = torch.full((tokens, *shape), len(self.asked), dtype=torch.int32)
            return Generation(a.token_ids, a.logprobs, a.finish_reason, a.weight_versions, experts.flatten().numpy())

    async def talk(s):
        first = await s.complete(PROMPT.token_ids)
        await s.complete([*first.ids, 50, 51])
        return s.sample()

    sample = asyncio.run(talk(session(moe, Routed([10, 11], [12]), routing=True)))
    # 3 prompt tokens and the first of the turn were inputs then; the last of it, the tool's two only in the second turn
    assert sample.routing[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2]


# -- many at a time ---------------------------------------------------------------------------------------------------


async def two_turns(session, prompt):
    first = await session.complete(prompt.token_ids)
    await asyncio.sleep(0.001 * (session.number % 3))
    await session.complete([*first.ids, 50])
    return session.sample()


@pytest.fixture
def runner(model):
    made = []

    def make(function, **settings):
        r = SessionRunner(RolloutSection(generate=f"{__name__}:two_turns", **settings), model)
        r.function = function
        made.append(r)
        return r

    yield make
    for r in made:
        r.close()


def asked(n, seed=0):
    return [
        Asked(Prompt(i // 2, (1, 2, i + 1), ""), i % 2, GenerateRequest([1, 2, i + 1], 20, seed=i)) for i in range(n)
    ]


async def ten_turns(session, prompt):
    latency = random.Random(session.number)
    ids = list(prompt.token_ids)
    for _ in range(10):
        turn = await session.complete(ids)
        await asyncio.sleep(latency.random() / 100)
        ids = [*turn.ids, 50]
    return session.sample()


def test_hundreds_of_conversations_go_on_at_once_without_a_thread_for_each(runner):
    threads, at_once = threading.active_count(), []

    class Busy(Engine):
        under_way = 0

        async def complete(self, request, number):
            self.under_way += 1
            at_once.append((self.under_way, threading.active_count()))
            await asyncio.sleep(0.01)
            self.under_way -= 1
            return self.answer(request)

    held = runner(ten_turns).converse(asked(256), complete=Busy().complete)
    assert [s.rollout for (s,) in held] == [i % 2 for i in range(256)] and len(at_once) == 2560
    assert max(n for n, _ in at_once) > 64 and max(t for _, t in at_once) <= threads + 2
    assert all(len(s.turns) == 10 for (s,) in held)


def test_deterministic_turns_come_in_the_same_batches_whatever_the_tools_take(runner):
    batches = []

    def batch(requests):
        batches.append([r.token_ids[2] for r in requests])
        return Engine().batch(requests)

    runner(two_turns).converse(asked(6), batch=batch)
    assert batches == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]


def test_branches_that_are_asked_for_together_come_in_one_batch(runner):
    sizes = []

    async def branches(session, prompt):
        first = await session.complete(prompt.token_ids, max_tokens=2)
        await asyncio.gather(*(session.complete([*first.ids, i], max_tokens=4) for i in range(3)))
        return session.samples()

    def batch(requests):
        sizes.append(len(requests))
        return Engine().batch(requests)

    held = runner(branches).converse(asked(4), batch=batch)
    assert sizes == [4, 12] and [len(samples) for samples in held] == [3] * 4


async def fails(session, prompt):
    await session.complete(prompt.token_ids)
    if session.number:
        raise KeyError("no such key")
    return session.sample()


def test_one_that_raises_ends_the_run_with_its_prompt_and_reason(runner):
    with pytest.raises(SessionError, match=r"on prompt 0, sample 1: KeyError: 'no such key' .*leave_out"):
        runner(fails).converse(asked(4), complete=Engine().complete)


def test_one_that_raises_is_left_out_and_counted(runner):
    r = runner(fails, on_error="leave_out")
    held = r.converse(asked(4), complete=Engine().complete)
    group = SampleGroup(Prompt(0, (1,), ""), [s for samples in held[:2] for s in samples])
    apply_truncation_policy([group], "keep")
    assert r.failures == 2 and [s.train for s in group.samples] == [True, False]
    left = group.samples[1]
    assert left.finish_reason == "error" and "no such key" in left.error and left.response_ids == [7, END]
    assert dict(figures_of([group]))["rollout/failed"] == 1
    (again,) = decode_groups(encode_groups([group]))
    assert [s.trained_tokens for s in again.samples] == [2, 0]


@pytest.mark.parametrize("batched", [False, True])
def test_a_tool_that_hangs_holds_up_nobody_else(runner, batched):
    async def hangs(session, prompt):
        await session.complete(prompt.token_ids)
        if session.number:
            await asyncio.Event().wait()
        await session.complete([*prompt.token_ids, 7, END, 9])
        return session.sample()

    r, engine = runner(hangs, on_error="leave_out", tool_timeout_s=3), Engine()
    held = r.converse(asked(4), **({"batch": engine.batch} if batched else {"complete": engine.complete}))
    assert [samples[0].finish_reason for samples in held] == ["stop", "error"] * 2
    assert "no turn and no end within 3 s (rollout.tool_timeout_s)" in held[1][0].error


def test_an_engine_that_takes_its_time_is_no_tool(runner):
    class Slow(Engine):
        async def complete(self, request, number):
            await asyncio.sleep(4)
            return self.answer(request)

    held = runner(one_turn, tool_timeout_s=3).converse(asked(2), complete=Slow().complete)
    assert all(s.finish_reason == "stop" for (s,) in held)


def test_a_function_that_blocks_the_loop_is_named(runner):
    over = threading.Event()

    async def blocks(session, prompt):
        over.wait(20)
        return session.sample()

    try:
        with pytest.raises(SessionError, match=r"has blocked the event loop .* in blocks; .*to_thread"):
            runner(blocks, tool_timeout_s=0.5).converse(asked(2), complete=Engine().complete)
    finally:
        over.set()


@pytest.mark.parametrize("batched", [False, True])
def test_what_an_engine_raises_is_not_for_the_users_function(runner, batched):
    async def stubborn(session, prompt):
        while True:
            try:
                return await session.complete(prompt.token_ids)
            except Exception:
                continue

    async def lost(request, number):
        raise WeightsLost

    def all_lost(requests):
        raise WeightsLost

    with pytest.raises(WeightsLost):
        runner(stubborn, on_error="leave_out").converse(
            asked(3), **({"batch": all_lost} if batched else {"complete": lost})
        )


def test_conversations_end_where_no_engine_has_weights_any_more(runner):
    """Requests wait for the next update then, and the command is given again (Completions.check)."""

    given_up = threading.Event()

    async def waits(request, number):
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    def check():
        raise WeightsLost

    with pytest.raises(WeightsLost):
        runner(two_turns).converse(asked(3), complete=waits, check=check)
    assert given_up.wait(10), "the same conversations are had again, once"


def test_tools_that_block_have_threads(runner):
    """More at a time than a machine of two cores would have by itself."""
    met = threading.Barrier(20)

    async def blocking(session, prompt):
        await asyncio.to_thread(met.wait, 50)
        await session.complete(prompt.token_ids)
        return session.sample()

    held = runner(blocking).converse(asked(20), complete=Engine().complete)
    assert all(s.finish_reason == "stop" for (s,) in held)


def test_progress_is_said_while_tools_work_and_not_while_engines_do(runner):
    beats = []

    async def slow(session, prompt):
        await asyncio.sleep(1.2)
        turn = await session.complete(prompt.token_ids)
        beats.append("answered")
        assert turn.ids
        return session.sample()

    class Slow(Engine):
        async def complete(self, request, number):
            del beats[:]
            await asyncio.sleep(1.2)
            return self.answer(request)

    r, seen = runner(slow), []
    r.heartbeat = lambda: (beats.append("beat"), seen.append(1))
    r.converse(asked(1), complete=Slow().complete)
    assert seen and beats[0] == "answered"


@pytest.mark.parametrize(
    "made, message",
    [
        (None, "returned None, no Sample"),
        ([], "no Sample and no list"),
        (Sample([1], [], [1], "stop"), "not one a token"),
        (Sample([1], [0.0], [NOT_GENERATED], "stop"), "trains on tokens which no engine generated"),
    ],
)
def test_what_is_no_sample_is_refused(runner, made, message):
    async def returns(session, prompt):
        return made

    with pytest.raises(SessionError, match=message):
        runner(returns).converse(asked(1), complete=Engine().complete)


# -- before a start ---------------------------------------------------------------------------------------------------


def not_async(session, prompt):
    return None


async def takes_three(session, prompt, more):
    return None


@pytest.mark.parametrize(
    "name, message",
    [
        ("two_turns", "allowed: module:function"),
        (f"{__name__}:not_async", r"is not async; allowed: async def not_async\(session, prompt\)"),
        (f"{__name__}:takes_three", r"is called as takes_three\(session, prompt\)"),
        (f"{__name__}:nothing", "cannot be loaded"),
    ],
)
def test_functions_that_cannot_be_called_are_refused(name, message):
    with pytest.raises(InputError, match=f"--rollout.generate {name.replace('.', '[.]')}.*{message}|{message}"):
        load_generate(name)
    assert load_generate(f"{__name__}:two_turns") is not None


def test_settings_that_need_a_conversation_are_refused_without_one():
    with pytest.raises(InputError, match="--reward.kind generate without --rollout.generate"):
        check_generate(RunConfig(reward={"kind": "generate"}))
    check_generate(RunConfig(reward={"kind": "generate"}, rollout={"generate": f"{__name__}:two_turns"}))
    with pytest.raises(InputError, match="--rollout.generate missing:f cannot be loaded"):
        check_generate(RunConfig(rollout={"generate": "missing:f"}))


async def one_turn(session, prompt):
    await session.complete(prompt.token_ids)
    return session.sample()


def test_a_function_of_one_turn_asks_and_keeps_what_a_plain_rollout_does(model, runner):
    config = RunConfig(run={"seed": 5}, rollout={"top_p": 0.9, "temperature": 0.3, "max_tokens": 16})
    prompts = [(11, Prompt(3, (1, 2), "l")), (12, Prompt(0, (7,), "m"))]
    plain, engine = Engine([10, END], [11], [12, END], [13]), Engine([10, END], [11], [12, END], [13])
    sampler, r = Sampler(config, model.tokenizer, model.stop_ids), runner(one_turn)
    expected = sampler.sample(plain.batch, prompts, 2, 16, 0.3)
    sampler.converse = lambda asked: r.converse(asked, batch=engine.batch)
    groups = sampler.sample(engine.batch, prompts, 2, 16, 0.3)
    assert engine.asked == plain.asked and [g.rollouts for g in groups] == [[[0], [1]]] * 2
    for group in groups:
        for sample in group.samples:
            sample.rollout = None
    assert groups == expected


SCORES = """
def by_letter(response, label):
    return float("_ab".index(response)), {}, [True, True, False]
"""


def test_rewards_are_of_conversations_and_only_take_tokens_away(tmp_path, monkeypatch):
    """The last branch is scored, the others get the same; what a tool said stays masked; what failed is not scored."""
    (tmp_path / "scores.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    said = [Sample([5, 6, 7], [-1.0] * 3, [1] * 3, "stop", text, rollout=n) for n, text in enumerate("aabc")]
    said[1].rollout, said[3].finish_reason = 0, "error"
    said[2].loss_mask = [True, False, True]
    group = SampleGroup(PROMPT, said)
    with RewardPool(RewardSection(kind="scores:by_letter"), workers=1) as pool:
        pool.score([group])
    assert [s.reward for s in said] == [1.0, 1.0, 2.0, 0.0]
    assert [s.loss_mask for s in said] == [None, [True, True, False], [True, False, False], None]
    given = SampleGroup(PROMPT, [Sample([5], [-1.0], [1], "stop", reward=0.25)])
    RewardPool(RewardSection(kind="generate")).score([given])
    assert given.samples[0].reward == 0.25


def test_branches_travel_with_their_prompts():
    group = SampleGroup(
        PROMPT, [Sample([5], [-1.0], [2], "stop", rollout=0), Sample([6], [-1.0], [2], "stop", rollout=0)]
    )
    group.samples[1].prompt_ids = [9, 9]
    (again,) = decode_groups(encode_groups([group]))
    assert [s.prompt_ids for s in again.samples] == [None, [9, 9]] and again.rollouts == [[0, 1]]
    assert SimpleNamespace(p=again.samples[1].prompt_of(again.prompt)).p == [9, 9]
