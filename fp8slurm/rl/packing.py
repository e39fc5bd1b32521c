"""Sequences into micro-batches: packed end to end, balanced by tokens, equally many on every data-parallel rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, Unpack

import torch

from fp8slurm.config import RunConfig
from fp8slurm.core.types import PackedBatch, SampleGroup
from fp8slurm.data.prompts import SftExample
from fp8slurm.models.spec import ModelSpec

LossMean = Literal["token", "sequence", "constant"]
RankBatches = list[list[PackedBatch]]
"""For one update: [data-parallel rank][micro-batch], as many micro-batches on every rank."""


@dataclass(frozen=True)
class _Row:
    """One sequence as it goes into a micro-batch; the response is what is trained on."""

    sample: int
    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    rollout_logprobs: Sequence[float]
    advantage: float
    mask: Sequence[bool]
    """Which response tokens are trained on; some are."""
    routing: torch.Tensor | None = None
    """uint8 or int16 [length - 1, layers, k]"""
    teacher_logprobs: Sequence[float] | None = None

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class _Size(NamedTuple):
    """What decides where a sequence goes."""

    sample: int
    length: int
    """Tokens, the prompt's too."""
    trained: int
    """Tokens that are trained on."""
    sequence: int | tuple[int, int]
    """What counts as one sequence: the sample, or the conversation (group, number) that it is a branch of."""


@dataclass(frozen=True)
class Deal:
    """Which rank trains on what in one update, by numbers of samples, and what their tokens weigh."""

    batches: list[list[list[int]]]
    """[data-parallel rank][micro-batch]: samples, ascending."""
    weights: dict[int, float]
    """Of each trained token of a sample."""
    weight_sum: float
    """PackedBatch.weight_sum."""


class Packing(TypedDict):
    """The sizes that batches are made for."""

    data_parallel_size: int
    tokens_per_micro_batch: int
    """At most, where no sequence is longer."""
    pad_multiple: NotRequired[int]
    """The length of every micro-batch is a multiple of it; 1 where it is left out."""
    equal_at: NotRequired[float]
    """Tokens at which a sequence's attention costs as much as all else, which ranks are then dealt micro-batches by
    (train.balance); infinite where it is left out."""


def packing_of(config: RunConfig, trainer: Any) -> Packing:
    """The sizes of a run."""
    ranks, tokens = trainer.data_parallel_size, config.train.tokens_per_micro_batch
    sizes: Packing = {"data_parallel_size": ranks, "tokens_per_micro_batch": tokens}
    sizes["pad_multiple"] = trainer.pad_multiple
    if config.train.balance == "cost":
        sizes["equal_at"] = attention_equal_at(trainer.spec)
    return sizes


def attention_equal_at(spec: ModelSpec) -> float:
    """Tokens at which a sequence's causal attention takes as many FLOPs as the matrices that it goes through: of n
    tokens 2 n^2 heads head_dim a layer against 2 n for every parameter (Narayanan et al. 2021, appendix, half of it for
    the mask)."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ffn = spec.experts_per_token * spec.moe_ffn_hidden_size if spec.is_moe else spec.ffn_hidden_size
    parameters = spec.num_layers * (2 * q + 2 * kv + 3 * ffn) + spec.vocab_size
    return parameters * spec.hidden_size / (spec.num_layers * q)


def pack(
    groups: list[SampleGroup], advantages: list[list[float]], *, updates: int, loss_mean: LossMean = "token",
    constant: int = 0, **packing: Unpack[Packing],
) -> list[RankBatches]:  # fmt: skip
    """The micro-batches of every update of a step: [update][data-parallel rank][micro-batch]; `deal` and `fill`."""
    multiple = packing.get("pad_multiple", 1)
    deals = deal(groups, updates=updates, loss_mean=loss_mean, constant=constant, **packing)
    ranks = range(packing["data_parallel_size"])
    return [[fill(each, rank, groups, advantages, multiple) for rank in ranks] for each in deals]


def deal(
    groups: list[SampleGroup], *, updates: int, loss_mean: LossMean = "token", constant: int = 0,
    **packing: Unpack[Packing],
) -> list[Deal]:  # fmt: skip
    """Who trains on what, for every update of a step. Nothing but lengths and what is trained on decides it: all ranks
    come to the same, wherever the tokens are.

    constant: the tokens that each sequence counts as, for loss_mean "constant".

    Updates are cut at group boundaries, in order, with as equal numbers of groups as possible; there are fewer than
    `updates` where there are fewer groups. Samples without a token to train on (`train`, `loss_mask`) are left out, and
    groups without any other. The result is a function of the arguments alone.
    """
    sizes, first = [], 0
    for group in groups:
        of_group = [
            _Size(
                number,
                len(s.prompt_of(group.prompt)) + len(s.response_ids),
                s.trained_tokens,
                number if s.rollout is None else (first, s.rollout),
            )
            for number, s in enumerate(group.samples, first)
            if s.trained_tokens
        ]
        first += len(group.samples)
        if of_group:
            sizes.append(of_group)
    updates = min(updates, len(sizes))
    boundaries = [len(sizes) * u // updates for u in range(updates + 1)] if updates else [0]
    cuts = [chain.from_iterable(sizes[start:end]) for start, end in zip(boundaries, boundaries[1:])]
    return [_deal_update(list(cut), loss_mean, constant, **packing) for cut in cuts]


def fill(
    deal: Deal, rank: int, groups: list[SampleGroup], advantages: list[list[float]], pad_multiple: int = 1
) -> list[PackedBatch]:
    """A data-parallel rank's micro-batches of one update. The samples that it trains on have to be `here`."""
    samples = [(group, s, a) for group, values in zip(groups, advantages, strict=True)
               for s, a in zip(group.samples, values, strict=True)]  # fmt: skip
    like = next((r for n in deal.weights if (r := samples[n][1].routing) is not None), None)

    def row(number: int) -> _Row:
        group, s, advantage = samples[number]
        mask = [True] * len(s.response_ids) if s.loss_mask is None else s.loss_mask
        return _Row(
            number,
            s.prompt_of(group.prompt),
            s.response_ids,
            s.logprobs,
            advantage,
            mask,
            s.routing,
            s.teacher_logprobs,
        )

    return [_filled([row(n) for n in numbers], deal, pad_multiple, like) for numbers in deal.batches[rank]]


def pack_sft(examples: list[SftExample], **packing: Unpack[Packing]) -> RankBatches:
    """The micro-batches of one supervised update: [data-parallel rank][micro-batch], without advantages."""
    rows = [
        _Row(i, e.prompt_ids, e.response_ids, [0.0] * len(e.response_ids), 0.0, [True] * len(e.response_ids))
        for i, e in enumerate(examples)
    ]
    dealt = _deal_update(
        [_Size(row.sample, row.length, len(row.response_ids), row.sample) for row in rows], "token", 0, **packing
    )
    multiple = packing.get("pad_multiple", 1)
    return [[_filled([rows[n] for n in batch], dealt, multiple, None) for batch in rank] for rank in dealt.batches]


def _filled(rows: list[_Row], deal: Deal, pad_multiple: int, like: torch.Tensor | None) -> PackedBatch:
    made = _batch(rows, [deal.weights[row.sample] for row in rows], pad_multiple, like)
    made.weight_sum = deal.weight_sum
    return made


def _deal_update(
    sizes: list[_Size], loss_mean: LossMean, constant: int, data_parallel_size: int, tokens_per_micro_batch: int,
    pad_multiple: int = 1, equal_at: float = math.inf,
) -> Deal:  # fmt: skip
    ranks = data_parallel_size
    costs = [size.length + size.length**2 / equal_at for size in sizes]  # of tokens alone: the lengths, exactly
    bins = balanced_bins([size.length for size in sizes], tokens_per_micro_batch, ranks)
    # Largest first, dealt to and fro: sums stay even, and micro-batches that run at the same time are of like size.
    loads = sorted(range(len(bins)), key=lambda b: (-sum(costs[i] for i in bins[b]), b))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for position, b in enumerate(loads):
        turn, rank = divmod(position, ranks)
        dealt[rank if turn % 2 == 0 else ranks - 1 - rank].append(b)
    weights = _token_weights(sizes, loss_mean, constant)
    weight_sum = 1.0
    if loss_mean == "constant" and sizes:
        weight_sum = weights[0] * sum(size.trained for size in sizes)
    batches = [[[sizes[i].sample for i in sorted(bins[b])] for b in own] for own in dealt]
    return Deal(batches, {size.sample: weight for size, weight in zip(sizes, weights)}, weight_sum)


def _token_weights(rows: list[_Size], loss_mean: LossMean, constant: int) -> list[float]:
    """The weight of each trained token of each row; times their number they sum to 1, but for "constant": Dr. GRPO
    (arXiv 2503.20783) divides the sum over a sequence's tokens by a constant, whatever its length. The branches of a
    conversation count as one sequence."""
    of_sequence: dict[Any, int] = {}
    for row in rows:
        of_sequence[row.sequence] = of_sequence.get(row.sequence, 0) + row.trained
    if loss_mean == "constant":
        return [1 / (len(of_sequence) * constant)] * len(rows)
    if loss_mean == "token":
        total = sum(row.trained for row in rows)
        return [1 / total] * len(rows) if total else []
    return [1 / (len(of_sequence) * of_sequence[row.sequence]) for row in rows]


def balanced_bins(lengths: list[int], budget: int, multiple: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `budget` tokens; as many as a multiple of `multiple`, some maybe empty.

    First-fit decreasing says how many bins are needed; then each sequence, longest first, goes to the emptiest bin.
    Where that does not fit the first-fit bins stand. A sequence above the budget is alone in its bin.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    first_fit = _first_fit(lengths, order, budget)
    count = max(1, -(-len(first_fit) // multiple)) * multiple
    spread = _least_loaded(lengths, order, budget, count)
    return spread if spread is not None else first_fit + [[] for _ in range(count - len(first_fit))]


def _first_fit(lengths: list[int], order: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    free: list[int] = []
    for i in order:
        b = next((b for b, room in enumerate(free) if room >= lengths[i]), len(bins))
        if b == len(bins):
            bins.append([])
            free.append(budget)
        bins[b].append(i)
        free[b] -= lengths[i]
    return bins


def _least_loaded(lengths: list[int], order: list[int], budget: int, count: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for i in order:
        load, b = heap[0]
        if load and load + lengths[i] > budget:
            return None
        bins[b].append(i)
        heapq.heapreplace(heap, (load + lengths[i], b))
    return bins


def _batch(rows: list[_Row], weights: list[float], pad_multiple: int, like: torch.Tensor | None) -> PackedBatch:
    """One PackedBatch; without rows it is pad_multiple tokens of padding. `like`: any row's routing, for its form."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    boundaries = [0]
    loss_weights: list[float] = []
    rollout: list[float] = []
    advantages: list[float] = []
    mask: list[bool] = []
    teacher: list[float] = []
    for row, weight in zip(rows, weights, strict=True):
        ids = [*row.prompt_ids, *row.response_ids]
        # Position p predicts token p + 1: the response is predicted from the prompt's last position on.
        before, n = len(row.prompt_ids) - 1, len(row.response_ids)
        assert before >= 0 and len(row.rollout_logprobs) == n, (before, n, len(row.rollout_logprobs))
        tokens += ids
        labels += [*ids[1:], 0]
        positions += range(len(ids))
        boundaries.append(len(tokens))
        assert len(row.mask) == n, (n, len(row.mask))
        loss_weights += [0.0] * before + [weight if m else 0.0 for m in row.mask] + [0.0]
        rollout += [0.0] * before + [p if m else 0.0 for p, m in zip(row.rollout_logprobs, row.mask)] + [0.0]
        advantages += [0.0] * before + [row.advantage if m else 0.0 for m in row.mask] + [0.0]
        mask += [False] * before + [*row.mask] + [False]
        teacher += [0.0] * before + [*(row.teacher_logprobs or [0.0] * n)] + [0.0]
    has_teacher = any(row.teacher_logprobs is not None for row in rows)
    pad = -len(tokens) % pad_multiple if tokens else pad_multiple
    if pad:
        boundaries.append(len(tokens) + pad)
        tokens, labels, positions = tokens + [0] * pad, labels + [0] * pad, positions + list(range(pad))
        loss_weights, rollout, advantages, teacher = (
            x + [0.0] * pad for x in (loss_weights, rollout, advantages, teacher)
        )
        mask += [False] * pad
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        loss_weights=torch.tensor(loss_weights, dtype=torch.float32),
        rollout_logprobs=torch.tensor(rollout, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        samples=tuple(row.sample for row in rows),
        teacher_logprobs=torch.tensor(teacher, dtype=torch.float32) if has_teacher else None,
        routing=None if like is None else _routing(rows, len(tokens), like),
    )


def _routing(rows: list[_Row], length: int, like: torch.Tensor) -> torch.Tensor:
    """The rows' routing laid end to end, [length, layers, k].

    A row's last token and the padding were never an input of the engine and predict nothing: experts 0, 1, ... take
    them in turns. ValueError for a row without routing, or with one of another shape.
    """
    layers, k = like.shape[1:]
    # How many experts there are does not matter: those up to the largest that was seen can take turns.
    experts = max([k, *(int(row.routing.max()) + 1 for row in rows if row.routing is not None and row.routing.numel())])
    turns = (torch.arange(length)[:, None] * k + torch.arange(k)) % experts
    out = turns[:, None].expand(length, layers, k).to(like.dtype).contiguous()
    at = 0
    for row in rows:
        if row.routing is None or row.routing.shape != (row.length - 1, layers, k):
            shape, right = "none" if row.routing is None else list(row.routing.shape), [row.length - 1, layers, k]
            raise ValueError(f"routing replay: a sample of {row.length} tokens has routing {shape}, not {right}")
        out[at : at + row.length - 1] = row.routing
        at += row.length
    return out
