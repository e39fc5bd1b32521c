"""How old the weights behind a step's tokens are, and what of the distance to the engines is due to that."""

from __future__ import annotations

import torch

from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import PackedBatch, SampleGroup


def token_lags(batches: list[PackedBatch], groups: list[SampleGroup], version: int) -> list[torch.Tensor]:
    """float32 [T] of every micro-batch: by how many versions the weights that generated the predicted token are older
    than `version`; 0 where no response token is predicted."""
    samples = [(len(s.prompt_of(g.prompt)), s.weight_versions) for g in groups for s in g.samples]
    out = []
    for batch in batches:
        lags = torch.zeros(len(batch.tokens))
        for number, start in zip(batch.samples, batch.cu_seqlens.tolist()):
            prompt, versions = samples[number]
            first = start + prompt - 1
            lags[first : first + len(versions)] = version - torch.tensor(versions, dtype=torch.float32)
        out.append(lags)
    return out


def lag_metrics(rows: torch.Tensor) -> dict[str, float]:
    """gap/* of the tokens of the trainer's own version, lag/* of older ones; rows: float32 [N, 3], the trainer's and
    the engine's log-probability and the lag in versions of every trained token."""
    lags = rows[:, 2]
    older = rows[lags > 0]
    if not len(older):
        return gap_metrics(rows[:, 0], rows[:, 1])
    ordered = lags.sort().values
    record = as_lag(gap_metrics(older[:, 0], older[:, 1]), lags.mean().item())
    rank = -(-99 * len(ordered) // 100)
    record |= {"lag/versions_p99": ordered[rank - 1].item(), "lag/versions_max": ordered[-1].item()}
    record["lag/share"] = len(older) / len(rows)
    own = rows[lags == 0]
    return record | gap_metrics(own[:, 0], own[:, 1])


def as_lag(record: dict[str, float], versions: float) -> dict[str, float]:
    """gap/* of samples from weights that were `versions` behind: how far the policy has moved since, and the gap."""
    renamed = {key.replace("gap/", "lag/"): value for key, value in record.items()}
    return {**renamed, "lag/versions": versions}
