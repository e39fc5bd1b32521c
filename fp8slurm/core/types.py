"""One small type for each hand-off of the RL loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    index: int
    """Position in the data file: identifies the prompt across epochs and restarts."""
    token_ids: tuple[int, ...]
    """Prompt tokens, the chat template applied."""
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
    """One generated response. The per-token lists, loss_mask where it is one, are all as long as `response_ids`."""

    response_ids: list[int]
    """Generated tokens, the end token included where there is one."""
    logprobs: list[float]
    """Log-probability of every generated token under the engine's weights at that moment (natural log)."""
    weight_versions: list[int]
    """Version of the weights that generated every token."""
    finish_reason: str
    """"stop" (an end token), "length" (max_tokens reached) or "abort"."""
    text: str = ""
    """The response decoded, end token left out."""
    reward: float = 0.0
    """What the reward function returned."""
    routing: torch.Tensor | None = field(default=None, compare=False)
    """Experts that the engine chose, uint8 or int16 [prompt + response tokens - 1, layers, k]: the last token was never
    an input. None unless rollout.routing_replay is on."""
    train: bool = True
    """False where the sample stays out of the loss (a truncated one, by setting)."""
    parts: dict[str, float] = field(default_factory=dict)
    """Named parts that the reward function returned beside the reward; they only become metrics."""
    loss_mask: list[bool] | None = None
    """Which response tokens are trained on; None: all."""
    teacher_logprobs: list[float] | None = None
    """Log-probability of every generated token under the teacher (teacher.checkpoint), at temperature 1."""

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss counts."""
        if not self.train:
            return 0
        return len(self.response_ids) if self.loss_mask is None else sum(self.loss_mask)


@dataclass
class SampleGroup:
    """All samples of one prompt."""

    prompt: Prompt
    samples: list[Sample] = field(default_factory=list)


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
