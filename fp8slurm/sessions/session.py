"""One conversation with the engines, as rollout.generate has it, and the samples that it leaves.

What the model said is kept as the engine sampled it: ids, log-probabilities, versions and experts. Later turns are
appended to these ids; nothing that the engine has seen is decoded and tokenized again.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fp8slurm.core.types import NOT_GENERATED, Prompt, Sample
from fp8slurm.data.prompts import encode, sample_seed
from fp8slurm.engine.client import GenerateRequest, Generation
from fp8slurm.models.spec import ModelSpec

Message = dict[str, Any]
Ask = Callable[[GenerateRequest], Awaitable[Generation]]
MARK = "fp8slurm:said"
"""Stands for what the model said while a chat template is asked what comes behind it."""

ENGINES_OWN = 2
"""Positions of the context that SGLang does not fill."""


class NoRoom(RuntimeError):
    """A conversation that has been told that it is full asked for another turn."""


@dataclass(frozen=True)
class Model:
    """What conversations have to know of the model and its tokenizer."""

    tokenizer: Any
    stop_ids: Sequence[int]
    spec: ModelSpec
    context: int
    """Most tokens of a conversation."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template (data.chat_template_kwargs)."""

    def text(self, ids: Sequence[int]) -> str:
        """What was said, without the token that ended it."""
        bare = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return str(self.tokenizer.decode(list(bare)))

    def render(self, messages: Sequence[Message]) -> str:
        """The messages as the chat template writes them, with the beginning of an answer."""
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"messages need a chat template, and {self.tokenizer.name_or_path} has none: give token ids"
            )
        how = {"tokenize": False, "add_generation_prompt": True, **self.template}
        return str(self.tokenizer.apply_chat_template(list(messages), **how))

    def added(self, messages: Sequence[Message], at: int, last: int) -> str:
        """What the template puts behind the answer messages[at], which ended with token `last`."""
        said: Message = {"role": "assistant", "content": MARK}
        _, mark, rest = self.render([*messages[:at], said, *messages[at + 1 :]]).partition(MARK)
        if not mark:
            raise ValueError("the chat template leaves an earlier answer out: give token ids (Turn.ids) instead")
        return rest.removeprefix(self.tokenizer.decode([last])) if last in self.stop_ids else rest


@dataclass(frozen=True)
class Turn:
    """What the model said in one turn. The lists but `ids` are as long as `token_ids`."""

    ids: list[int]
    """The whole conversation as the engine has it, this turn included: what comes next is appended to it."""
    token_ids: list[int]
    """What was said in this turn, the end token included. Empty where the conversation had no room left."""
    logprobs: list[float]
    """Natural log-probability of every token, at rollout.temperature."""
    weight_versions: list[int]
    """Version of the weights that generated every token."""
    finish_reason: str
    """"stop", "length" (cut off by max_tokens, rollout.max_tokens or the context) or "abort"."""
    text: str
    """The turn decoded, end token left out."""
    routing: torch.Tensor | None = None
    """With rollout.routing_replay: experts of every token of `ids` but the last, [tokens, layers, k]."""

    @property
    def message(self) -> Message:
        """The turn as a chat message."""
        return {"role": "assistant", "content": self.text}


@dataclass
class _Branch:
    """A line of the conversation in which nothing was taken back."""

    prompt_ids: list[int]
    said: Generation = field(default_factory=lambda: Generation([], [], "", []))
    """All behind the prompt, tools' output included."""
    routing: torch.Tensor | None = None
    messages: list[Message] | None = None
    """Where the turns came as messages."""
    text: str = ""
    busy: bool = False
    """A turn is on its way."""

    def __post_init__(self) -> None:
        self.ids = list(self.prompt_ids)
        """Everything that the engine has seen of it."""

    def add(self, asked: list[int], answer: Generation, routing: torch.Tensor | None) -> None:
        """What was put behind the branch to ask for a turn, and the turn."""
        given = asked[len(self.ids) :]
        silent = len(given)
        self.said = Generation(
            [*self.said.token_ids, *given, *answer.token_ids],
            [*self.said.logprobs, *[0.0] * silent, *answer.logprobs],
            answer.finish_reason,
            [*self.said.weight_versions, *[NOT_GENERATED] * silent, *answer.weight_versions],
        )
        if routing is not None:
            # what was computed when its tokens were sampled, not what a later turn's prefill would say
            routing = routing if self.routing is None else torch.cat([self.routing, routing[len(self.routing) :]])
        self.routing = routing
        self.ids = [*asked, *answer.token_ids]


class Session:
    """A conversation about one prompt. complete() asks for a turn; samples() are what was said, with masks."""

    def __init__(
        self, prompt: Prompt, number: int, request: GenerateRequest, model: Model, ask: Ask,
        reach: Callable[[Session], tuple[str, str]] | None = None,
    ) -> None:  # fmt: skip
        """number: which of the prompt's conversations it is. request: sampling settings and seed of its first turn;
        its max_tokens is the sum over all turns. reach: gives it an address and a key (endpoint.py)."""
        self.prompt, self.number, self.model = prompt, number, model
        self._reach = reach
        self._address: tuple[str, str] | None = None
        self.said = 0
        """Tokens that the model has said, in all branches."""
        self._request, self._ask = request, ask
        self._branches: list[_Branch] = []
        self._turns = self._reserved = 0
        self._full = False

    # -- what a function of the user's calls -----------------------------------------------------------------------

    async def complete(
        self, conversation: Sequence[int] | Sequence[Message], *, max_tokens: int | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Turn:  # fmt: skip
        """The model's next turn.

        conversation: token ids of all that it follows, or all messages. What begins with the ids of an earlier turn
        (Turn.ids), or with the messages of one and Turn.message, goes on with it: only what is new is tokenized.
        Anything else is a new branch. max_tokens: of this turn; rollout.max_tokens is the sum of all, and the context
        is the engine's. stop_token_ids: further tokens that end this turn. Temperature, top_p and top_k are the run's.

        Where there is no room, the turn is empty and its finish_reason "length"; asked once more, NoRoom is raised.
        Turns that are asked for at the same time share the room: give each its max_tokens.
        """
        messages, ids = self._read(conversation)
        branch = next((b for b in reversed(self._branches) if not b.busy and ids[: len(b.ids)] == b.ids), None)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens {max_tokens}: allowed: 1 or more")
        context = self.model.context - len(ids)
        room = min(self._request.max_tokens - self.said - self._reserved, context if context > ENGINES_OWN else 0)
        if room < 1:
            return self._no_room(branch, ids)
        most = room if max_tokens is None else min(max_tokens, room)
        turn, self._turns = self._turns, self._turns + 1
        seed = self._request.seed
        request = replace(
            self._request,
            token_ids=ids,
            max_tokens=most,
            seed=seed if seed is None or not turn else sample_seed(seed, "turn", turn),
            stop_token_ids=[*self._request.stop_token_ids, *stop_token_ids],
        )
        self._reserved += most
        if branch is not None:
            branch.busy = True
        try:
            answer = await self._ask(request)
        finally:
            self._reserved -= most
            if branch is not None:
                branch.busy = False
        if branch is None:
            self._branches.append(branch := _Branch(ids))
        self.said += len(answer.token_ids)
        branch.add(ids, answer, routing_of(answer, len(ids), self.model.spec) if request.routing else None)
        branch.text = self.model.text(answer.token_ids)
        made = Turn(
            list(branch.ids), answer.token_ids, answer.logprobs, answer.weight_versions, answer.finish_reason,
            branch.text, branch.routing,
        )  # fmt: skip
        branch.messages = None if messages is None else [*messages, made.message]
        return made

    @property
    def sampling(self) -> GenerateRequest:
        """Temperature, top_p and top_k of the run's, and max_tokens of all turns."""
        return self._request

    @property
    def base_url(self) -> str:
        """Address of this conversation for a client of OpenAI's interface; its model is called "policy"."""
        return self._reached()[0]

    @property
    def api_key(self) -> str:
        """Its key, as long as the function of the user's goes on."""
        return self._reached()[1]

    @property
    def reached(self) -> bool:
        """Whether base_url or api_key was asked for."""
        return self._address is not None

    def _reached(self) -> tuple[str, str]:
        if self._address is None:
            if self._reach is None:
                raise RuntimeError("this session has no endpoint")
            self._address = self._reach(self)
        return self._address

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, such as a tool's output; special tokens that are spelled out are taken as such."""
        (ids,) = encode(self.model.tokenizer, [text])
        return ids

    def samples(self) -> list[Sample]:
        """A sample for every branch, in the order in which they began: what the model said is trained on, what it was
        given is not. A branch that took up what another one said has that in its prompt."""
        return [self._sample(branch) for branch in self._branches]

    def sample(self) -> Sample:
        """The sample of a conversation without branches. ValueError: there are several, or none."""
        if len(self._branches) != 1:
            raise ValueError(f"the conversation has {len(self._branches)} branches: return session.samples()")
        return self._sample(self._branches[0])

    # -- parts -----------------------------------------------------------------------------------------------------

    def _read(self, conversation: Sequence[int] | Sequence[Message]) -> tuple[list[Message] | None, list[int]]:
        given: list[Any] = list(conversation)
        if not given:
            raise ValueError("an empty conversation has no next turn")
        kinds = set(map(type, given))  # a conversation may have 100,000 tokens, and each of its turns comes here
        if all(issubclass(kind, dict) for kind in kinds):
            return given, self._of_messages(given)
        strange = [kind for kind in kinds if kind is bool or not issubclass(kind, (int, np.integer))]
        if strange:
            wrong = next(one for one in given if type(one) in strange)
            raise ValueError(f"a conversation is a list of token ids, or of messages; there is {wrong!r:.80} in it")
        rows, least, most = self.model.spec.vocab_size, min(given), max(given)
        if not 0 <= least <= most < rows:
            raise ValueError(f"token {least if least < 0 else most}: the model has {rows} tokens")
        return None, given if kinds == {int} else [int(one) for one in given]

    def _of_messages(self, messages: list[Message]) -> list[int]:
        for branch in reversed(self._branches):
            if branch.messages is not None and not branch.busy and messages[: len(branch.messages)] == branch.messages:
                at = len(branch.messages) - 1
                return branch.ids + self.tokenize(self.model.added(messages, at, branch.ids[-1]))
        return self.tokenize(self.model.render(messages))

    def _no_room(self, branch: _Branch | None, ids: list[int]) -> Turn:
        if self._full:
            raise NoRoom(
                f"the conversation is full: {self.said} of rollout.max_tokens {self._request.max_tokens} tokens are "
                f"said, and {len(ids)} of the context's {self.model.context} taken; an empty turn (length) said so"
            )
        self._full = True
        if branch is not None:
            branch.said = replace(branch.said, finish_reason="length")
        return Turn(ids, [], [], [], "length", "", None)

    def _sample(self, branch: _Branch) -> Sample:
        said, prompt = branch.said, branch.prompt_ids
        generated = [v != NOT_GENERATED for v in said.weight_versions]
        sample = Sample(said.token_ids, said.logprobs, said.weight_versions, said.finish_reason, branch.text)
        sample.routing, sample.rollout = branch.routing, self.number
        sample.loss_mask = None if all(generated) else generated
        sample.prompt_ids = None if tuple(prompt) == tuple(self.prompt.token_ids) else prompt
        return sample


def told(sample: Sample, tokenizer: Any) -> list[tuple[str, str]]:
    """The conversation behind the prompt as text: ("model" or "tool", what it said), special tokens included."""
    parts, at = [], 0
    for start, end in [*sample.turns, (len(sample.response_ids),) * 2]:
        parts += [("tool", sample.response_ids[at:start]), ("model", sample.response_ids[start:end])]
        at = end
    return [(who, str(tokenizer.decode(ids, skip_special_tokens=False))) for who, ids in parts if ids]


def routing_of(generation: Generation, prompt_tokens: int, spec: ModelSpec) -> torch.Tensor:
    """The experts of every token but the last: uint8 (int16 above 256 experts) [tokens - 1, layers, k].

    RuntimeError where the engine returned none, or those of another number of tokens.
    """
    tokens = prompt_tokens + len(generation.token_ids) - 1
    shape = (tokens, spec.num_layers, spec.experts_per_token)
    if generation.routing is None:
        raise RuntimeError("rollout.routing_replay: the engine returned no experts with a sample")
    if generation.routing.size != math.prod(shape):
        raise RuntimeError(
            f"rollout.routing_replay: the engine returned {generation.routing.size} experts for {tokens} tokens of "
            f"{spec.num_layers} layers with {spec.experts_per_token} experts each; {math.prod(shape)} were expected"
        )
    small = np.uint8 if spec.num_experts <= 256 else np.int16
    return torch.from_numpy(generation.routing.reshape(shape).astype(small))
