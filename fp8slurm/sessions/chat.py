"""A conversation that arrives as chat messages, over and over from its beginning, as OpenAI's interface has it.

What was generated is kept by token ids. A history that goes on with what was said, compared as messages, gets these
very ids, and only what the chat template adds behind them is tokenized. It does not go on where a message differs, and
where the template writes an earlier turn otherwise than it was said: Qwen3's leaves thinking out once the user has
spoken again. Then the conversation is a new branch, whose prompt is what the template makes of the history, as the
model will see it wherever it is served.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fp8slurm.core.errors import InputError
from fp8slurm.sessions.session import Message, Session
from fp8slurm.sessions.tool_calls import Call, form_of, parse_calls

log = logging.getLogger(__name__)

_MARK = f"fp8slurm{secrets.token_hex(8)}"
"""Stands in a rendered history for what the model said."""
CHANGED = "the history is not what was said"
REWRITTEN = "the chat template writes an earlier turn otherwise than it was said"
AGAIN = "an earlier turn is gone on with once more"
UNFINISHED = "an earlier turn was cut off within its thinking"

Key = tuple[Any, ...]


class ChatError(ValueError):
    """A request that cannot be answered, with the parameter that is to blame."""

    def __init__(self, text: str, parameter: str | None = None) -> None:
        super().__init__(text)
        self.parameter = parameter


@dataclass(frozen=True)
class Reply:
    """One turn as a message."""

    message: Message
    """role, content, and where there are any reasoning_content and tool_calls."""
    finish_reason: str
    """"stop", "length", "tool_calls" or "abort"."""
    prompt_tokens: int
    tokens: int


@dataclass(eq=False)
class _Line:
    """A conversation up to what was said in one turn."""

    tools: str
    messages: list[Key]
    """All of it, the turn included."""
    said: list[int]
    """Numbers of the messages that are turns."""
    thinking: list[str]
    """What each turn has before its answer: "" nothing, "own" a thinking that it begins itself, "opened" one that the
    template had begun, "unfinished"."""
    given: list[str]
    """What the template wrote before each turn, behind the one before."""
    ids: list[int]
    """Of the turn, and of what was given before it."""
    before: _Line | None
    rewritten: list[list[Key]] = field(default_factory=list)
    """Histories in which the template wrote a turn of it otherwise: what begins with one is not rendered again."""

    def all_ids(self) -> list[int]:
        parts, line = [], self
        while True:
            parts.append(line.ids)
            if line.before is None:
                return [i for part in reversed(parts) for i in part]
            line = line.before


@dataclass
class Chat:
    """The record of one session. complete() for each request; the samples are the session's."""

    session: Session
    branches: Counter[str] = field(default_factory=Counter)
    """How often a history did not go on with the last turn in it, by reason."""

    def __post_init__(self) -> None:
        self._lines: list[_Line] = []

    async def complete(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), max_tokens: int | None = None
    ) -> Reply:
        """The next turn. ChatError: messages that the template refuses, or that end with the assistant's."""
        known = [_key(message) for message in messages]
        if not known or known[-1][0] == "assistant":
            raise ChatError("there is nothing to answer: the last message is the assistant's, or missing", "messages")
        if tools:
            try:
                form_of(self.session.model.tokenizer.chat_template)
            except InputError as error:
                raise ChatError(str(error), "tools") from None
        kind = json.dumps(tools, sort_keys=True)
        line, given = self._place(messages, known, tools, kind)
        before = [] if line is None else line.all_ids()
        ids = [*before, *self.session.tokenize(self._behind(line, given[-1]))]
        opened = self.session.model.tokenizer.decode(ids[-4:]).rstrip().endswith("<think>")
        turn = await self.session.complete(ids, max_tokens=max_tokens)
        message, thinking = _message(turn.text, opened, tools, self.session.model.tokenizer, len(self._lines))
        known.append(_key(message))
        said = [] if line is None else line.said
        thoughts = [] if line is None else line.thinking
        made = _Line(kind, known, [*said, len(known) - 1], [*thoughts, thinking], given, turn.ids[len(before) :], line)
        self._lines.append(made)
        reason = "tool_calls" if message.get("tool_calls") and turn.finish_reason == "stop" else turn.finish_reason
        return Reply(message, reason, len(ids), len(turn.token_ids))

    def _place(
        self, messages: Sequence[Message], known: list[Key], tools: Sequence[dict[str, Any]], kind: str
    ) -> tuple[_Line | None, list[str]]:
        """The line that this goes on with, if any, and what is given before each turn and behind the last."""
        reason, found = CHANGED, None
        for line in sorted(reversed(self._lines), key=lambda one: -len(one.messages)):
            if line.tools != kind or known[: len(line.messages)] != line.messages:
                continue
            if "unfinished" in line.thinking:
                reason = UNFINISHED
                continue
            if any(known[: len(history)] == history for history in line.rewritten):
                reason = REWRITTEN
                continue
            given = self._given(messages, tools, line)
            if given is not None and given[:-1] == line.given:
                found = line, given
                break
            reason = REWRITTEN
            line.rewritten.append(list(known))
        if found is not None and reason == CHANGED and any(other.before is found[0] for other in self._lines):
            reason = AGAIN
        if reason != CHANGED or found is None and any(key[0] == "assistant" for key in known):
            self.branches[reason] += 1
            log.debug(
                "conversation %d of prompt %d: a new branch: %s", self.session.number, self.session.prompt.index, reason
            )
        return found or (None, [self._render(messages, tools)])

    def _given(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], line: _Line) -> list[str] | None:
        """What the template writes around the turns of a line; None: it leaves one of them out, or its thinking."""
        marked = [dict(message) for message in messages]
        for n, (number, thinking) in enumerate(zip(line.said, line.thinking)):
            answer = f"{_MARK}-said-{n}."
            marked[number] = {"role": "assistant", "content": answer}
            if thinking:
                marked[number]["content"] = f"<think>\n{_MARK}-thought-{n}.\n</think>\n\n{answer}"
        rest, given = self._render(marked, tools), []
        for n, thinking in enumerate(line.thinking):
            if thinking:
                before, mark, rest = rest.partition(f"{_MARK}-thought-{n}.")
                if not mark:
                    return None
                given.append(before.removesuffix("<think>\n") if thinking == "own" else before)
            before, mark, rest = rest.partition(f"{_MARK}-said-{n}.")
            if not mark:
                return None
            if not thinking:
                given.append(before)
        return [*given, rest]

    def _behind(self, line: _Line | None, given: str) -> str:
        """Without the end token that the turn has already."""
        if line is None or line.ids[-1] not in self.session.model.stop_ids:
            return given
        return given.removeprefix(self.session.model.tokenizer.decode([line.ids[-1]]))

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
        model = self.session.model
        if not model.tokenizer.chat_template:
            raise ChatError(f"the tokenizer of {model.tokenizer.name_or_path} has no chat template", "messages")
        how = {**model.template, "tokenize": False, "add_generation_prompt": True, "tools": list(tools) or None}
        try:
            return str(model.tokenizer.apply_chat_template([_for_template(m) for m in messages], **how))
        except Exception as error:  # templates raise what they like
            raise ChatError(
                f"the chat template refuses the messages: {type(error).__name__}: {error}", "messages"
            ) from None


def _message(
    text: str, opened: bool, tools: Sequence[dict[str, Any]], tokenizer: Any, number: int
) -> tuple[Message, str]:
    """A turn as a message, and what _Line.thinking says of it."""
    own = not opened and text.lstrip().startswith("<think>")
    message: Message = {"role": "assistant", "content": text}
    thinking = ""
    if opened or own:
        thought, end, shown = text.lstrip().removeprefix("<think>").partition("</think>")
        message["reasoning_content"], message["content"] = thought.strip("\n"), shown.lstrip("\n")
        thinking = "unfinished" if not end else "opened" if opened else "own"
    calls: list[Call] = []
    if tools:
        message["content"], calls = parse_calls(message["content"], tools, tokenizer)
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{number}_{i}", "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for i, c in enumerate(calls)
        ]
    return message, thinking


def _key(message: Message) -> Key:
    """What two messages have in common that are the same: an answer's text without white space around it, and its calls
    as values, whatever their form; neither reasoning nor the ids of calls."""
    content = message.get("content") or ""
    if message["role"] != "assistant":
        return message["role"], content, message.get("name")
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (
        "assistant",
        content.strip(),
        tuple((c["name"], json.dumps(_value(c["arguments"]), sort_keys=True)) for c in calls),
    )


def _value(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _for_template(message: Message) -> Message:
    """Templates write a call's arguments from values, not from their JSON."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _value(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": message.get("content") or "", "tool_calls": calls}
