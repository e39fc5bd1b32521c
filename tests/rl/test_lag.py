"""Tokens of older weights are no gap: by token, by version, over micro-batches; open positions in a checkpoint."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rl import recompute as recompute_module
from fp8slurm.rl.ahead import OPEN_FILE, OpenPrompts
from fp8slurm.rl.lag import lag_metrics, token_lags
from fp8slurm.rl.packing import pack
from fp8slurm.rl.recompute import compare


def sample(versions: list[int], mask: list[bool] | None = None) -> Sample:
    n = len(versions)
    return Sample([5 + i for i in range(n)], [-1.0] * n, versions, "stop", loss_mask=mask)


def test_the_gap_is_of_the_trainers_own_version_and_the_lag_of_the_rest(monkeypatch):
    """Trainer and engine differ by 0.1 on own tokens, by 0.5 a version on older ones; a masked token counts nowhere."""
    groups = [
        SampleGroup(Prompt(0, (1, 2, 3), "l"), [sample([7, 7]), sample([5, 6, 7])]),
        SampleGroup(Prompt(1, (4,), "l"), [sample([7, 7, 7, 7]), sample([5, 7], [False, True])]),
    ]
    ((batches,),) = pack(
        groups, [[1.0, -1.0]] * 2, updates=1, data_parallel_size=1, tokens_per_micro_batch=8, pad_multiple=4
    )
    assert len(batches) > 1
    lags = token_lags(batches, groups, 7)
    assert sorted(torch.cat([lag[b.loss_mask] for lag, b in zip(lags, batches)]).tolist()) == [0.0] * 8 + [1.0, 2.0]
    trainer = SimpleNamespace(is_data_parallel_leader=True)
    monkeypatch.setattr(recompute_module, "gather_rows", lambda rows: rows)
    own = [b.rollout_logprobs + torch.where(lag > 0, 0.5 * lag, 0.1) for b, lag in zip(batches, lags)]
    record = compare(trainer, batches, own, lags)
    assert record["gap/mean_abs"] == pytest.approx(0.1) and record["gap/max"] == pytest.approx(0.1)
    assert record["lag/mean_abs"] == pytest.approx(0.75) and record["lag/max"] == pytest.approx(1.0)
    assert record["lag/versions"] == pytest.approx(0.3) and record["lag/share"] == pytest.approx(0.2)
    assert record["lag/versions_max"] == record["lag/versions_p99"] == 2
    assert all(b.trainer_logprobs is not None for b in batches)


def test_without_older_tokens_it_is_the_gap_and_without_own_ones_there_is_none():
    rows = torch.tensor([[-1.0, -1.25, 0.0], [-2.0, -1.5, 0.0]])
    assert lag_metrics(rows) == gap_metrics(rows[:, 0], rows[:, 1])
    rows[:, 2] = 1
    record = lag_metrics(rows)
    assert not any(key.startswith("gap/") for key in record) and record["lag/versions"] == 1
    assert record["lag/mean_abs"] == gap_metrics(rows[:, 0], rows[:, 1])["gap/mean_abs"]


def test_open_positions_of_a_checkpoint(tmp_path):
    prompts = OpenPrompts()
    prompts.write(tmp_path)
    assert not (tmp_path / OPEN_FILE).exists(), "checkpoints of other runs are what they were"
    prompts.positions = [3, 9]
    prompts.write(tmp_path)
    again = OpenPrompts()
    again.read(tmp_path)
    assert again.positions == [3, 9]
    (tmp_path / OPEN_FILE).write_text(json.dumps({"positions": [3, -1]}))
    with pytest.raises(BadCheckpoint, match="whole numbers"):
        again.read(tmp_path)
