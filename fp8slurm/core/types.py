"""One small type for each hand-off of the RL loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any

import torch

NOT_GENERATED = -2
"""In Sample.weight_versions: of a token that no model generated, such as a tool's output."""


class Elsewhere(Sequence[Any]):
    """A list whose values another rank has: here only its length is known."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        raise LookupError("these values are with the rank that trains on the sample; here only their number is known")


class Runs(Sequence[Any]):
    """A list of few different values in long runs, as [(value, how many)]."""

    def __init__(self, runs: Sequence[Sequence[Any]]) -> None:
        self.runs = [(value, int(count)) for value, count in runs]

    def __len__(self) -> int:
        return sum(count for _, count in self.runs)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(repeat(value, count) for value, count in self.runs)


def runs(values: Sequence[Any]) -> list[tuple[Any, int]]:
    """[(value, how many in a row)]."""
    return values.runs if isinstance(values, Runs) else [(value, len(list(row))) for value, row in groupby(values)]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    index: int
    """Position in the data file: identifies the prompt across epochs and restarts."""
    token_ids: Sequence[int]
    """Prompt tokens, the chat template applied: a tuple, or Elsewhere as those of a sample."""
    label: str
    """Reference answer, handed to the reward function."""
    thinking: bool = False
    """Whether the prompt ends inside <think>, as some chat templates' do."""
    content: str | list[dict[str, Any]] = field(default="", compare=False)
    """The prompt as the data has it: messages, or text that no chat template was applied to."""
    row: dict[str, Any] = field(default_factory=dict, compare=False)
    """Its row of the data file, with all columns. It stays with the rollout worker, as `content` does."""
    source: str = ""
    """Name of the data source that it is from (data.sources), where there are several."""


@dataclass
class Sample:
    """One generated response, or one branch of a conversation (rollout.generate): what the model said, and between it
    what tools said. The per-token lists, loss_mask where it is one, are all as long as `response_ids`.

    On a training rank that does not train on it the lists are Elsewhere or Runs, `routing` is a meta tensor, and text
    and parts are empty (rollout/dealing.py).
    """

    response_ids: Sequence[int]
    """Tokens behind the prompt, in the order in which the engine has seen them; end tokens included."""
    logprobs: Sequence[float]
    """Log-probability of every generated token under the engine's weights at that moment (natural log); else 0."""
    weight_versions: Sequence[int]
    """Version of the weights that generated every token, or NOT_GENERATED."""
    finish_reason: str
    """"stop" (an end token), "length" (no room for more), "abort", or "error" (see `error`)."""
    text: str = ""
    """The response decoded, end token left out; of a conversation what the model said last."""
    reward: float = 0.0
    """What the reward function returned."""
    routing: torch.Tensor | None = field(default=None, compare=False)
    """Experts that the engine chose, uint8 or int16 [prompt + response tokens - 1, layers, k]: the last token was never
    an input. None unless rollout.routing_replay is on."""
    train: bool = True
    """False where the sample stays out of the loss (a truncated one, by setting)."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts that the reward function returned beside the reward; they only become metrics."""
    loss_mask: Sequence[bool] | None = None
    """Which response tokens are trained on; None: all."""
    teacher_logprobs: Sequence[float] | None = None
    """Log-probability of every generated token under the teacher (teacher.checkpoint), at temperature 1."""
    prompt_ids: Sequence[int] | None = None
    """Tokens before `response_ids`, where they are not the group's prompt: of a branch of a conversation."""
    rollout: int | None = None
    """Number of its conversation in the group. Samples with the same number, which follow one another, are branches of
    one: they have one reward, which the group's mean counts once. None: a response without turns."""
    error: str = ""
    """Why rollout.generate ended before its time. It stays with the rollout worker."""

    def prompt_of(self, prompt: Prompt) -> Sequence[int]:
        """The tokens before `response_ids`; `prompt`: the group's."""
        return prompt.token_ids if self.prompt_ids is None else self.prompt_ids

    @property
    def turns(self) -> list[tuple[int, int]]:
        """(first token, the one behind the last) of each run of generated tokens in `response_ids`."""
        spans, at = [], 0
        for generated, run in groupby(self.weight_versions, lambda version: version != NOT_GENERATED):
            start, at = at, at + sum(1 for _ in run)
            if generated:
                spans.append((start, at))
        return spans

    @property
    def here(self) -> bool:
        """Whether its tokens are, and not only how many there are."""
        return not isinstance(self.response_ids, Elsewhere)

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts."""
        if not self.train:
            return 0
        return len(self.response_ids) if self.loss_mask is None else sum(n for mask, n in runs(self.loss_mask) if mask)


@dataclass
class SampleGroup:
    """All samples of one prompt."""

    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)
    worker: int = field(default=0, compare=False)
    """Number of the rollout worker that has it."""
    first: int = 0
    """Number of the first of them among the prompt's samples, where this is a part of the group."""

    @property
    def rollouts(self) -> list[list[int]]:
        """Numbers of the samples of each conversation; a sample without a `rollout` is one by itself."""
        out: list[list[int]] = []
        for i, sample in enumerate(self.samples):
            if i and sample.rollout is not None and sample.rollout == self.samples[i - 1].rollout:
                out[-1].append(i)
            else:
                out.append([i])
        return out


@dataclass
class PackedBatch:
    """One micro-batch: sequences laid end to end, T tokens in S segments, no padding between them.

    Position t of every [T] tensor belongs to the prediction made from tokens[0..t] of its segment: labels[t] is the
    token that follows. The last position of a segment predicts nothing (labels 0, loss_weights 0). A tail that pads
    T to a multiple is a segment of its own with loss_weights 0.
    """

    tokens: torch.Tensor  # int64 [T]
    labels: torch.Tensor  # int64 [T]
    position_ids: torch.Tensor  # int64 [T], restart at 0 in every segment
    cu_seqlens: torch.Tensor  # int32 [S+1], 0 ... T
    loss_weights: torch.Tensor  # float32 [T], sum to weight_sum over all micro-batches and ranks of one update
    rollout_logprobs: torch.Tensor  # float32 [T], the engine's; 0 where loss_mask is False
    advantages: torch.Tensor  # float32 [T]
    loss_mask: torch.Tensor  # bool [T], True where a generated token that counts is predicted
    trainer_logprobs: torch.Tensor | None = None  # float32 [T], recomputed before the first update of the step
    reference_logprobs: torch.Tensor | None = None  # float32 [T]
    teacher_logprobs: torch.Tensor | None = None  # float32 [T], as rollout_logprobs
    routing: torch.Tensor | None = None  # uint8 or int16 [T, layers, k], experts to replay; None: the model's own
    samples: tuple[int, ...] = ()
    """Which sample every segment is, counted over all samples of the packed groups; a padding tail has no number."""
    weight_sum: float = 1.0
    """Sum of an update's loss_weights, 1 for a mean over tokens or sequences. Metrics are means: divided by it."""
    temperature: float = 1.0
    """The policy is softmax(logits / temperature): what the engine sampled from and took log-probabilities of."""
