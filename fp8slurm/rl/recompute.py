"""The trainer's own log-probabilities of what the engines sampled, and how far they are from the engines'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.gap import POSITIONS, gap_by_position, gap_metrics, gap_sums
from fp8slurm.core.types import PackedBatch, SampleGroup
from fp8slurm.rl.lag import lag_metrics
from fp8slurm.rollout.files import logprob_rows, write_trainer_logprobs


class ImpossibleGap(RuntimeError):
    """Trainer and engines are not the same policy: nothing that was sampled may be trained on."""

    def __init__(self, text: str, permanent: bool) -> None:
        super().__init__(text)
        self.permanent = permanent


def check_gap(record: dict[str, float], bound: float, step: int) -> None:
    """Refuse a gap that rounding cannot explain; a step of nothing but NaN is the optimizer's to skip.

    At step 0 it is the settings', and every attempt would meet it. Later something was damaged, and another may not.
    """
    gap = record.get("gap/mean_abs", 0.0)
    if gap > bound:
        raise ImpossibleGap(
            f"step {step}: log-probabilities of trainer and engines differ by {gap:.3g} nats a token on average, more "
            f"than --rollout.max-gap {bound:g}: they are not the same policy. Look at config.json of both checkpoints "
            f"(rope, norms), --rollout.temperature, top-p and top-k, the chat template, the engine's precision "
            f"(--fp8.engine) and its log; --sync.verify always compares its weights",
            permanent=step == 0,
        )


def check_equal(trainer: Any, batches: list[PackedBatch], groups: list[SampleGroup], step: int) -> None:
    """With model.exact: refuse a token whose two log-probabilities are not the same float; all ranks together.

    NaN on both sides is the optimizer's to skip. ImpossibleGap names the first token, by sample and position.
    """
    samples = [(group, k) for group in groups for k in range(len(group.samples))]
    found = []  # each [N, 5]: sample, position in its response, token, trainer's, engine's
    for b in batches:
        assert b.trainer_logprobs is not None
        own, engine = b.trainer_logprobs, b.rollout_logprobs
        differ = b.loss_mask & (own != engine) & ~(own.isnan() & engine.isnan())
        for number, start, end in zip(b.samples, b.cu_seqlens.tolist(), b.cu_seqlens.tolist()[1:]):
            at = differ[start:end].nonzero().flatten()
            group, k = samples[number]
            before = len(group.samples[k].prompt_of(group.prompt)) - 1
            columns = (torch.full_like(at, number), at - before, b.labels[start:end][at])
            found.append(torch.stack([*(c.float() for c in columns), own[start:end][at], engine[start:end][at]], 1))
    rows, others = gather_rows(_once(trainer, torch.cat(found))), _other_experts(trainer, batches)
    said = []
    if len(rows):
        first, position, token, mine, engines = min(rows.tolist())
        group, sample = samples[int(first)]
        said.append(
            f"tokens have another log-probability in the trainer than in the engine: {len(rows)} of them. The first is "
            f"token {int(position)} (id {int(token)}) of sample {sample} of prompt {group.prompt.index}: trainer "
            f"{mine:.9g}, engine {engines:.9g}"
        )
    if others:
        number, position, layer = min(others)
        group, sample = samples[number]
        said.append(
            f"the trainer's routers choose other experts than the engine's for {len({o[:2] for o in others})} tokens. "
            f"The first is token {position} of prompt and response of sample {sample} of prompt {group.prompt.index}, "
            f"in model.layers.{layer - 1}"
        )
    if said:
        raise ImpossibleGap(
            f"step {step}: --model.exact, and {'; '.join(said)}. Nothing was trained on it. They have other "
            f"weights, another config.json (rope, norms), temperature or tokens; tools/exact_layers.py shows the "
            f"first module that differs (docs/exact.md)",
            permanent=step == 0,
        )


def _other_experts(trainer: Any, batches: list[PackedBatch]) -> set[tuple[int, ...]]:
    """Tokens for which a router of the pass before would have chosen otherwise than the engine's, on any rank:
    (sample, position in prompt and response, layer from 1)."""
    if trainer.replay is None:
        return set()
    found = [torch.zeros(0, 3)]
    for b, differing in zip(batches, trainer.replay.differing, strict=True):
        for number, start, end in zip(b.samples, b.cu_seqlens.tolist(), b.cu_seqlens.tolist()[1:]):
            at = differing[start : end - 1].nonzero().flatten()
            found.append(torch.stack((torch.full_like(at, number), at, differing[start:end][at]), 1).float())
    return {tuple(int(x) for x in row) for row in gather_rows(torch.cat(found)).tolist()}


def recompute(trainer: Any, batches: list[PackedBatch]) -> dict[str, float]:
    """`compare` with the trainer's log-probabilities from a forward pass of their own."""
    return compare(trainer, batches, trainer.logprobs(batches))


def recompute_reference(trainer: Any, batches: list[PackedBatch]) -> None:
    """Fill in the reference's log-probabilities."""
    for batch, logprobs in zip(batches, trainer.logprobs(batches, reference=True)):
        batch.reference_logprobs = logprobs.cpu()


def compare(
    trainer: Any, batches: list[PackedBatch], logprobs: list[torch.Tensor], lags: list[torch.Tensor] | None = None
) -> dict[str, float]:
    """Fill in every micro-batch's log-probabilities of the trainer; metrics of the gap over all ranks (core/gap.py),
    also by position in the response, and with `lags` (lag.token_lags) those of older tokens apart."""
    parts = []  # each [N, 2], or [N, 3]
    for i, (batch, values) in enumerate(zip(batches, logprobs)):
        batch.trainer_logprobs = own = values.cpu()
        columns = [own, batch.rollout_logprobs] + ([] if lags is None else [lags[i]])
        parts.append(torch.stack(columns, 1)[batch.loss_mask])
    rows = gather_rows(_once(trainer, torch.cat(parts).float()))
    record = gap_metrics(rows[:, 0], rows[:, 1]) if lags is None else lag_metrics(rows)
    return record | _by_position(trainer, batches)


def _by_position(trainer: Any, batches: list[PackedBatch]) -> dict[str, float]:
    """Positions count from a sample's first trained token."""
    sums = torch.zeros(len(POSITIONS), 2, dtype=torch.float64)
    for b in batches:
        assert b.trainer_logprobs is not None
        for start, end in zip(b.cu_seqlens.tolist(), b.cu_seqlens.tolist()[1:]):
            at = start + b.loss_mask[start:end].nonzero().flatten()
            sums += gap_sums(b.trainer_logprobs[at], b.rollout_logprobs[at], at - at[:1])
    rows = gather_rows(_once(trainer, sums.flatten()[None].float()))
    return gap_by_position(rows.double().sum(0).view(-1, 2))


def save_logprobs(trainer: Any, path: Path, groups: list[SampleGroup], batches: list[PackedBatch]) -> None:
    """Write the trainer's log-probabilities of a saved rollout (rollout/files.py); rank 0 writes, all ranks send."""
    rows = all_logprob_rows(trainer, batches)
    if trainer.rank == 0:
        write_trainer_logprobs(path, groups, rows)


def all_logprob_rows(trainer: Any, batches: list[PackedBatch]) -> torch.Tensor:
    """logprob_rows (rollout/files.py) of all ranks' micro-batches, on all ranks."""
    return gather_rows(_once(trainer, logprob_rows(batches)))


def _once(trainer: Any, rows: torch.Tensor) -> torch.Tensor:
    """Ranks that cut one model have the same rows: one of them brings them."""
    return rows if trainer.is_data_parallel_leader else rows[:0]


def meet() -> None:
    """Return when all ranks are here."""
    gather_rows(torch.zeros(1, 1))


def from_first(values: torch.Tensor) -> torch.Tensor:
    """Rank 0's values (in host memory) on all ranks, whose own only say how many there are."""
    sent = values.cuda() if dist.get_backend() == "nccl" else values
    dist.broadcast(sent, 0)
    return sent.cpu()


def ranks_values(value: int) -> list[int]:
    """A small number of every rank, in the order of the ranks."""
    return [int(v) for (v,) in gather_rows(torch.tensor([[float(value)]])).tolist()]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """float32 [N_r, C] of every rank -> [sum N_r, C], in the order of the ranks, on all of them (in host memory)."""
    world = dist.get_world_size()
    if dist.get_backend() == "nccl":
        rows = rows.cuda()
    sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([rows.shape[0]], device=rows.device))
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, rows.shape[1], device=rows.device)
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([p[: int(n)] for p, n in zip(parts, sizes)]).cpu()
