"""Agents that exist already: OpenAI's own client against the endpoint, with a made-up engine that says token ids."""

import asyncio
import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import pytest
import tiny

from fp8slurm.agents.openai_client import openai_client
from fp8slurm.config.schema import RolloutSection
from fp8slurm.core import patches
from fp8slurm.core.types import Prompt
from fp8slurm.data.prompts import load_tokenizer
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.models.spec import ModelSpec
from fp8slurm.sessions import runner as runner_module
from fp8slurm.sessions.chat import AGAIN, CHANGED, REWRITTEN, UNFINISHED
from fp8slurm.sessions.endpoint import MODEL, MOST_BODY_BYTES
from fp8slurm.sessions.runner import Asked, SessionRunner
from fp8slurm.sessions.session import Model

ROOT = Path(__file__).parents[2]
END = 258
THINKING_TEMPLATE = (
    # as Qwen3's does: thinking of turns before the last words of the user is left out; tools in <tools>
    "{%- if tools %}<|im_start|>system\nTools: <tools>{{ tools | tojson }}</tools>, in <tool_call></tool_call><|im_end|>\n{% endif %}"
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}"
    "{%- set text = m.content %}{% set thought = '' %}"
    "{%- if m.role == 'assistant' and '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}"
    "{%- if thought and loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{- '<tool_response>' + text + '</tool_response>' if m.role == 'tool' else text }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind():
    """SGLang's parsers are imported here with stand-ins for kernels; other tests look whether there are any."""
    finders, modules, environment = list(sys.meta_path), set(sys.modules), dict(os.environ)
    notes = dict(patches._applied)
    yield
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("sgl_kernel", "triton"):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    patches._applied.clear()
    patches._applied.update(notes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


@pytest.fixture
def model(folder) -> Model:
    return Model(load_tokenizer(folder), [256, END], ModelSpec.from_hf_dir(folder), 1000)


@pytest.fixture
def thinking(model) -> Model:
    model.tokenizer.chat_template = THINKING_TEMPLATE
    return model


def spelled(model, text):
    """Token ids of a text, a byte each but for the special ones: what encoding the text would hardly ever give."""
    vocabulary, ids = model.tokenizer.get_vocab(), []
    while text:
        word = next((w for w in tiny.SPECIAL_TOKENS if text.startswith(w)), None)
        if word is None:
            piece, text = text[0], text[1:]
            ids += [vocabulary[chr(b) if 33 <= b <= 126 else {10: "Ċ", 32: "Ġ"}[b]] for b in piece.encode()]
        else:
            ids, text = [*ids, vocabulary[word]], text.removeprefix(word)
    return ids


class Engine:
    """Says what it is told to, with log-probabilities that are all different."""

    def __init__(self, model, *answers):
        self.model, self.answers, self.asked, self.said = model, list(answers), [], []

    async def complete(self, request: GenerateRequest, number: int = 0) -> Generation:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        ids = spelled(self.model, answer) if isinstance(answer, str) else list(answer)
        ids = (ids + [END])[: request.max_tokens]
        self.said.append(ids)
        logprobs = [-0.01 * (100 * len(self.said) + i) for i in range(len(ids))]
        return Generation(ids, logprobs, "stop" if ids[-1] == END else "length", [len(self.said)] * len(ids))


PROMPT = Prompt(3, (1, 2, 3), "label", content=[{"role": "user", "content": "what is 1 plus 2"}])
REQUEST = GenerateRequest([1, 2, 3], 400, 0.7, 0.9, 40, [256, END], seed=5)


def talk(model, engine, agent, monkeypatch, **settings):
    """The samples of one conversation whose generate function is `agent(client, session)`, and what it returned."""
    out = {}

    async def generate(session, prompt):
        async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, timeout=60) as client:
            out["result"] = await agent(client, session)
        out["key"], out["url"] = session.api_key, session.base_url
        return session.samples()

    monkeypatch.setattr(runner_module, "load_generate", lambda name: generate)
    runner = SessionRunner(RolloutSection(generate="my:agent", tool_timeout_s=60, **settings), model)
    try:
        (samples,) = runner.converse([Asked(PROMPT, 0, REQUEST)], complete=engine.complete)
        out["branches"] = None
        return samples, out
    finally:
        runner.close()


def check_ids(engine, samples):
    """Training samples are what the engine saw and said, byte for byte."""
    for sample in samples:
        prompt = list(sample.prompt_ids or PROMPT.token_ids)
        whole = prompt + sample.response_ids
        mine = [
            i
            for i, r in enumerate(engine.asked)
            if whole[: len(r.token_ids) + len(engine.said[i])] == r.token_ids + engine.said[i]
        ]
        at = len(prompt)
        for i in mine:
            start = len(engine.asked[i].token_ids)
            if start < at:
                continue  # said in another branch, and in this one's prompt
            end = start + len(engine.said[i])
            mask = sample.loss_mask or [True] * len(sample.response_ids)
            assert mask[start - len(prompt) : end - len(prompt)] == [True] * (end - start)
            assert not any(mask[at - len(prompt) : start - len(prompt)])
            at = end
        assert at == len(whole)


def ask(client, messages, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def test_a_conversation_of_three_turns_is_one_sample_of_the_ids_that_were_generated(model, monkeypatch):
    engine = Engine(model, "what is the answer", "digits", "sum")

    async def agent(client, session):
        messages = list(PROMPT.content)
        for words in ("and are", "plus", None):
            answer = await ask(client, messages)
            messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": words}]
        return messages, answer

    samples, out = talk(model, engine, agent, monkeypatch)
    messages, answer = out["result"]
    assert [m["content"] for m in messages if m["role"] == "assistant"] == ["what is the answer", "digits", "sum"]
    (sample,) = samples
    check_ids(engine, samples)
    encoded = model.tokenizer("what is the answer", add_special_tokens=False)["input_ids"]
    assert engine.said[0][:-1] != encoded  # decoding and encoding would have given others
    assert sample.response_ids[: len(engine.said[0])] == engine.said[0]
    said = [lp for lp, m in zip(sample.logprobs, sample.loss_mask) if m]
    assert said == [-0.01 * (100 * n + i) for n in (1, 2, 3) for i in range(len(engine.said[n - 1]))]
    text = model.tokenizer.decode(engine.asked[2].token_ids)
    assert text.endswith("digits<|im_end|>\n<|im_start|>user\nplus<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith(
        "<|im_start|>user\nwhat is 1 plus 2<|im_end|>\n<|im_start|>assistant\nwhat is the answer<|im_end|>\n"
    )
    assert answer.usage.prompt_tokens == len(engine.asked[2].token_ids) and answer.usage.completion_tokens == 4


def test_calls_of_tools_come_back_reformatted_and_go_on(thinking, monkeypatch):
    first = (
        '<think>\nplus\n</think>\n\nI add.\n<tool_call>\n{"name":  "add", "arguments": {"b":2,"a": 1}}\n</tool_call>'
    )
    engine = Engine(thinking, first, "<think>\nsum\n</think>\n\n3")

    async def agent(client, session):
        messages = list(PROMPT.content)
        answer = (await ask(client, messages, tools=TOOLS)).choices[0]
        (call,) = answer.message.tool_calls
        assert (answer.finish_reason, call.function.name) == ("tool_calls", "add")
        assert answer.message.content == "I add." and answer.message.reasoning_content == "plus"
        again = {"name": "add", "arguments": '{\n "a": 1, "b": 2}'}  # other order, other white space, no reasoning
        said = {
            "role": "assistant",
            "content": " I add.\n",
            "tool_calls": [{"id": "x", "type": "function", "function": again}],
        }
        messages += [said, {"role": "tool", "tool_call_id": "x", "content": "3"}]
        return (await ask(client, messages, tools=TOOLS)).choices[0]

    samples, out = talk(thinking, engine, agent, monkeypatch)
    assert len(samples) == 1 and out["result"].message.content == "3" and out["result"].finish_reason == "stop"
    check_ids(engine, samples)
    given = engine.asked[1].token_ids[len(engine.asked[0].token_ids) + len(engine.said[0]) :]
    assert (
        thinking.tokenizer.decode(given)
        == "\n<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_thinking_that_the_template_strips_makes_a_branch(thinking, monkeypatch, caplog):
    engine = Engine(thinking, "<think>\nlong\n</think>\n\n3", "4", "5")

    async def agent(client, session):
        messages = list(PROMPT.content)
        for words in ("plus 1", "plus 2", None):
            answer = (await ask(client, messages)).choices[0].message
            messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": words}]

    with caplog.at_level("DEBUG", "fp8slurm.sessions"):
        samples, _ = talk(thinking, engine, agent, monkeypatch)
    assert len(samples) == 2 and f"1 branches: {REWRITTEN}" in caplog.text
    check_ids(engine, samples)
    first, second = samples
    assert first.response_ids == engine.said[0] and first.loss_mask is None
    assert "long" not in thinking.tokenizer.decode(second.prompt_ids)
    assert second.prompt_ids == engine.asked[1].token_ids
    assert [engine.said[1], engine.said[2]] == [second.response_ids[s:e] for s, e in second.turns]


def test_a_long_conversation_whose_thinking_is_stripped_is_rendered_twice_a_turn(thinking, monkeypatch):
    """However many branches there are already; and a branch is gone on with where its thinking is not stripped."""
    engine = Engine(thinking, *[f"<think>\nnumber {i}\n</think>\n\n{i}" for i in range(12)], "more")
    rendered, write = [], thinking.tokenizer.apply_chat_template

    def count(*args, **kwargs):
        rendered.append(1)
        return write(*args, **kwargs)

    monkeypatch.setattr(thinking.tokenizer, "apply_chat_template", count)

    async def agent(client, session):
        messages = list(PROMPT.content)
        for _ in range(12):
            said = (await ask(client, messages)).choices[0].message
            messages += [{"role": "assistant", "content": said.content}, {"role": "user", "content": "on"}]
        assert len(rendered) <= 2 * 12
        fourth = messages[: 2 * 4]
        await ask(client, [*fourth, {"role": "tool", "tool_call_id": "x", "content": "tool"}])

    samples, _ = talk(thinking, engine, agent, monkeypatch)
    assert len(samples) == 12 and [len(sample.turns) for sample in samples] == [1] * 3 + [2] + [1] * 8
    check_ids(engine, samples)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m[1].update(content="something else"), CHANGED),
        (lambda m: m[0].update(content="another question"), CHANGED),
        (lambda m: m.insert(0, {"role": "system", "content": "be good"}), CHANGED),
    ],
)
def test_a_history_that_was_changed_is_a_branch(model, monkeypatch, caplog, change, reason):
    engine = Engine(model, "what", "is", "the")

    async def agent(client, session):
        messages = [dict(m) for m in PROMPT.content]
        answer = (await ask(client, messages)).choices[0].message
        messages += [answer.model_dump(exclude_none=True), {"role": "user", "content": "plus"}]
        await ask(client, messages)
        change(messages)
        await ask(client, messages)

    with caplog.at_level("DEBUG", "fp8slurm.sessions"):
        samples, _ = talk(model, engine, agent, monkeypatch)
    assert len(samples) == 2 and f"1 branches: {reason}" in caplog.text
    check_ids(engine, samples)
    assert samples[1].prompt_ids == engine.asked[2].token_ids


def test_a_turn_asked_for_again_is_a_branch_with_the_ids_before_it(model, monkeypatch, caplog):
    engine = Engine(model, "what is", "answer", "number")

    async def agent(client, session):
        messages = list(PROMPT.content)
        answer = (await ask(client, messages)).choices[0].message
        messages += [answer.model_dump(exclude_none=True), {"role": "user", "content": "plus"}]
        await ask(client, messages)
        await ask(client, messages)

    with caplog.at_level("DEBUG", "fp8slurm.sessions"):
        samples, _ = talk(model, engine, agent, monkeypatch)
    assert len(samples) == 2 and f"1 branches: {AGAIN}" in caplog.text
    check_ids(engine, samples)
    assert engine.asked[1].token_ids == engine.asked[2].token_ids == samples[1].prompt_ids


def test_a_turn_that_was_cut_off_gets_its_end_from_the_template(model, monkeypatch):
    engine = Engine(model, "what is the", "sum")

    async def agent(client, session):
        messages = list(PROMPT.content)
        answer = (await ask(client, messages, max_tokens=4)).choices[0]
        assert answer.finish_reason == "length" and answer.message.content == "what"
        messages += [answer.message.model_dump(), {"role": "user", "content": "on"}]
        await ask(client, messages)

    samples, _ = talk(model, engine, agent, monkeypatch)
    assert len(samples) == 1
    check_ids(engine, samples)
    assert samples[0].response_ids[4] == END and not samples[0].loss_mask[4]


def test_thinking_without_an_end_is_no_answer_and_is_not_gone_on_with(thinking, monkeypatch, caplog):
    engine = Engine(thinking, "first", "<think>\nlong", "3")

    async def agent(client, session):
        messages = [
            *PROMPT.content,
            (await ask(client, PROMPT.content)).choices[0].message.model_dump(exclude_none=True),
        ]
        messages += [{"role": "user", "content": "on"}]
        answer = (await ask(client, messages)).choices[0].message
        assert answer.content == "" and answer.reasoning_content == "long"
        messages += [answer.model_dump(exclude_none=True), {"role": "user", "content": "on"}]
        await ask(client, messages)

    with caplog.at_level("DEBUG", "fp8slurm.sessions"):
        samples, _ = talk(thinking, engine, agent, monkeypatch)
    assert len(samples) == 2 and f"1 branches: {UNFINISHED}" in caplog.text
    check_ids(engine, samples)


def test_text_that_is_no_utf8_is_gone_on_with(model, monkeypatch):
    vocabulary = model.tokenizer.get_vocab()
    engine = Engine(model, [vocabulary["Ã"], vocabulary["Ã"], vocabulary["a"]], "sum")

    async def agent(client, session):
        messages = list(PROMPT.content)
        answer = (await ask(client, messages)).choices[0].message
        assert "\ufffd" in answer.content
        await ask(client, [*messages, answer.model_dump(exclude_none=True), {"role": "user", "content": "on"}])

    samples, _ = talk(model, engine, agent, monkeypatch)
    assert len(samples) == 1
    check_ids(engine, samples)


def test_streaming_says_the_same(thinking, monkeypatch):
    said = '<think>\nplus\n</think>\n\nI add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    engine = Engine(thinking, said, said)

    async def agent(client, session):
        whole = await ask(client, PROMPT.content, tools=TOOLS)
        made = {"content": "", "reasoning_content": "", "arguments": ""}
        async for piece in await ask(
            client, PROMPT.content, tools=TOOLS, stream=True, stream_options={"include_usage": True}
        ):
            usage = piece.usage
            if piece.choices:
                delta, reason = piece.choices[0].delta, piece.choices[0].finish_reason or None
                made["content"] += delta.content or ""
                made["reasoning_content"] += getattr(delta, "reasoning_content", None) or ""
                for call in delta.tool_calls or ():
                    made["arguments"] += call.function.arguments
        return whole, made, reason, usage

    _, out = talk(thinking, engine, agent, monkeypatch)
    whole, made, reason, usage = out["result"]
    message = whole.choices[0].message
    assert (
        (made["content"], made["reasoning_content"])
        == (message.content, message.reasoning_content)
        == ("I add.", "plus")
    )
    assert made["arguments"] == message.tool_calls[0].function.arguments
    assert (reason, usage) == ("tool_calls", whole.usage)


@pytest.mark.parametrize(
    "said",
    [
        "<tool_call>\n{not json}\n</tool_call>",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        "<tool_call>\n[1, 2]\n</tool_call>",
        '<tool_call>\n{"name": "add"',
    ],
)
def test_what_is_no_call_stays_text(thinking, monkeypatch, said):
    engine = Engine(thinking, said, "on")

    async def agent(client, session):
        answer = (await ask(client, PROMPT.content, tools=TOOLS)).choices[0]
        assert answer.message.content == said and not answer.message.tool_calls and answer.finish_reason == "stop"
        messages = [*PROMPT.content, answer.message.model_dump(exclude_none=True), {"role": "user", "content": "?"}]
        await ask(client, messages, tools=TOOLS)

    samples, _ = talk(thinking, engine, agent, monkeypatch)
    assert len(samples) == 1


REFUSALS = [
    ({"n": 2}, 400, "n"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"temperature": 0.1}, 400, "temperature"),
    ({"top_p": 0.5}, 400, "top_p"),
    ({"stop": ["x"]}, 400, "stop"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"seed": 3}, 400, "seed"),
    ({"nonsense": 3}, 400, "nonsense"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"stream": "yes"}, 400, "stream"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"tools": TOOLS}, 400, "tools"),
    ({"tools": TOOLS, "tool_choice": "required"}, 400, "tool_choice"),
    ({"model": "gpt-4"}, 404, "model"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "audio": 1}]}, 400, "messages[0].audio"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": 1}]}, 400, "messages[0].tool_calls"),
]


def test_what_is_refused_and_how(model, monkeypatch):
    """Nothing reaches the engine; the answers have OpenAI's form."""
    engine = Engine(model)

    async def agent(client, session):
        auth = {"Authorization": f"Bearer {session.api_key}"}
        base = {"model": MODEL, "messages": PROMPT.content}
        url = session.base_url + "/chat/completions"
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            for change, status, parameter in REFUSALS:
                answer = await http.post(url, json=base | change, headers=auth)
                error = answer.json()["error"]
                assert (answer.status_code, error["param"]) == (status, parameter), (change, answer.text)
                assert (
                    error["message"] and error["code"] and error["type"] and answer.headers["x-should-retry"] == "false"
                )
            cases = [
                (http.post(url, json=base), 401),
                (http.post(url, json=base, headers={"Authorization": "Bearer wrong"}), 401),
                (http.post(url, json=base, headers={"Authorization": auth["Authorization"] + "x"}), 401),
                (http.post(session.base_url + "/embeddings", json={}, headers=auth), 404),
                (http.post(session.base_url + "/embeddings", json={}), 401),
                (http.get(url, headers=auth), 405),
                (http.post(url, content=b"{", headers=auth), 400),
                (http.post(url, content=b"[" * 100_000, headers=auth), 400),
                (http.post(url, content=b"[]", headers=auth), 400),
                (http.post(url, content=b"\xff", headers=auth), 400),
                (http.post(url, content=b"x" * (MOST_BODY_BYTES + 1), headers=auth), 413),
            ]
            for call, status in cases:
                answer = await call
                assert answer.status_code == status and answer.json()["error"]["message"], answer.text
            models = (await http.get(session.base_url + "/models", headers=auth)).json()
            assert [m["id"] for m in models["data"]] == [MODEL]
        with pytest.raises(openai.AuthenticationError, match="no session has this API key"):
            await ask(openai.AsyncOpenAI(base_url=session.base_url, api_key="wrong"), PROMPT.content)
        engine.answers = ["what"]
        neutral = {"n": 1, "temperature": 0.7, "top_p": 0.9, "stop": None, "user": "me", "frequency_penalty": 0}
        return await ask(client, PROMPT.content, **neutral)

    _, out = talk(model, engine, agent, monkeypatch)
    assert len(engine.asked) == 1 and out["result"].choices[0].message.content == "what"


def test_a_full_conversation_is_cut_and_then_refused(model, monkeypatch):
    engine = Engine(replace(model, context=200), "x" * 1000)

    async def agent(client, session):
        messages = [*PROMPT.content]
        answer = (await ask(client, messages)).choices[0]
        assert answer.finish_reason == "length"
        messages += [answer.message.model_dump(exclude_none=True), {"role": "user", "content": "on"}]
        answer = (await ask(client, messages)).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("length", "")
        with pytest.raises(openai.BadRequestError, match="the conversation is full") as error:
            await ask(client, messages)
        assert error.value.code == "context_length_exceeded"

    samples, _ = talk(replace(model, context=200), engine, agent, monkeypatch)
    assert samples[0].finish_reason == "length"


def test_keys_end_with_their_conversation(model, monkeypatch):
    engine = Engine(model, *["what"] * 3)
    keys, late = [], []

    async def generate(session, prompt):
        keys.append((session.base_url, session.api_key))
        assert len({k for _, k in keys}) == len(keys) and len({u for u, _ in keys}) == 1
        async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
            await ask(client, PROMPT.content)
            if session.number == 1:
                while len(keys) < 3 or 0 not in over:
                    await asyncio.sleep(0.01)
                client.api_key = keys[order[0]][1]
                with pytest.raises(openai.AuthenticationError):
                    await ask(client, PROMPT.content)
                late.append(True)
        return session.samples()

    over, order = set(), {}

    async def noted(session, prompt):
        order[session.number] = len(keys)
        samples = await generate(session, prompt)
        asyncio.get_running_loop().call_later(0.05, over.add, session.number)
        return samples

    monkeypatch.setattr(runner_module, "load_generate", lambda name: noted)
    runner = SessionRunner(RolloutSection(generate="my:agent"), model)
    try:
        held = runner.converse([Asked(PROMPT, n, REQUEST) for n in range(3)], complete=engine.complete)
    finally:
        runner.close()
    assert late == [True] and [len(s) for s in held] == [1, 1, 1]


def test_an_engine_that_fails_ends_the_rollout_and_nothing_hangs(model, monkeypatch):
    engine = Engine(model, RuntimeError("the engine is gone"))

    async def agent(client, session):
        await ask(client, PROMPT.content)

    with pytest.raises(RuntimeError, match="the engine is gone"):
        talk(model, engine, agent, monkeypatch)


def test_a_client_of_threads(model, monkeypatch):
    """An agent written without async, in a thread of its own."""
    engine = Engine(model, "what", "is")

    def sync_agent(url, key):
        client = openai.OpenAI(base_url=url, api_key=key, timeout=60)
        messages = list(PROMPT.content)
        answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message
        messages += [answer.model_dump(exclude_none=True), {"role": "user", "content": "on"}]
        return client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content

    async def agent(client, session):
        return await asyncio.to_thread(sync_agent, session.base_url, session.api_key)

    samples, out = talk(model, engine, agent, monkeypatch)
    assert out["result"] == "is" and len(samples) == 1
    check_ids(engine, samples)


def test_the_listener_is_on_loopback(model, monkeypatch):
    engine = Engine(model, "what")

    async def agent(client, session):
        assert session.base_url.startswith("http://127.0.0.1:")
        await ask(client, PROMPT.content)
        return json.loads(json.dumps(session.base_url))

    talk(model, engine, agent, monkeypatch)


def test_the_example_agent(thinking, monkeypatch):
    spec = importlib.util.spec_from_file_location("openai_agent", ROOT / "examples" / "openai_agent.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    call = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "(1 + 2) * 14"}}\n</tool_call>'
    engine = Engine(thinking, call, "42")

    async def agent(client, session):
        return await example.agent(client, PROMPT.content)

    samples, out = talk(thinking, engine, agent, monkeypatch)
    assert out["result"] == "42" and len(samples) == 1
    check_ids(engine, samples)
    assert "<tool_response>42</tool_response>" in thinking.tokenizer.decode(engine.asked[1].token_ids)
    assert example.calculate("nonsense") == "error: JSONDecodeError"
    assert example.calculate('{"expression": "2 ** 9"}') == "error: ValueError"


def test_the_lookup_example_is_the_same_by_openais_client(model, monkeypatch):
    """Whoever asks, the engine is asked the same in the same batches, with the same seeds, and the samples are equal."""
    monkeypatch.syspath_prepend(str(ROOT))
    from examples import lookup, lookup_openai

    model.tokenizer.chat_template = lookup_openai.TEMPLATE
    rows = [{"prompt": f"k{i}?", "table": {f"k{i}": f"71{i}"}} for i in range(6)]
    prompts = [
        Prompt(i, tuple(spelled(model, row["prompt"])), "", content=row["prompt"], row=row)
        for i, row in enumerate(rows)
    ]
    asked = [
        Asked(p, n, replace(REQUEST, token_ids=list(p.token_ids), max_tokens=12, seed=10 * p.index + n))
        for p in prompts
        for n in range(3)
    ]

    def say(request):
        """A function of what is asked: the call, or a guess; behind the tool's answer its digits."""
        text = model.tokenizer.decode(request.token_ids)
        call = text.partition("?")[0]
        words = text[-4:-1] if text.endswith(">") else (call, "123", f"{call} ")[request.seed % 10]
        ids = [*spelled(model, words), END][: request.max_tokens]
        return Generation(ids, [-0.1 * request.seed - i for i in range(len(ids))], "stop", [7] * len(ids))

    def held(generate):
        batches = []

        def batch(requests):
            batches.append(requests)
            return [say(request) for request in requests]

        monkeypatch.setattr(runner_module, "load_generate", lambda name: generate)
        runner = SessionRunner(RolloutSection(generate="my:agent", tool_timeout_s=60), model)
        try:
            return runner.converse(asked, batch=batch), batches
        finally:
            runner.close()

    samples, batches = held(lookup.generate)
    assert [len(requests) for requests in batches] == [18, 6]
    assert held(lookup_openai.generate) == (samples, batches)


def test_the_client_for_agents_goes_through_no_proxy(model, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    engine = Engine(model, "what")

    async def agent(client, session):
        async with openai_client(session.base_url, session.api_key) as own:
            assert (await ask(own, PROMPT.content)).choices[0].message.content == "what"
            assert own.timeout.read is None and own.max_retries == 0
        with pytest.raises(openai.APIConnectionError):
            async with openai.AsyncOpenAI(base_url=session.base_url, api_key="its own", max_retries=0) as plain:
                await ask(plain, PROMPT.content)

    samples, _ = talk(model, engine, agent, monkeypatch)
    check_ids(engine, samples)
