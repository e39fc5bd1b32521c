from pathlib import Path

import torch

from fp8slurm.config.schema import AlgorithmSection
from fp8slurm.core.gap import gap_metrics
from fp8slurm.core.types import PackedBatch
from fp8slurm.observe import console, plot
from fp8slurm.rl.loss import make_policy_loss, sft_loss

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_every_metric_has_its_line():
    zero = torch.zeros(1)
    ids = zero.long()
    batch = PackedBatch(ids, ids, ids, torch.tensor([0, 1]), zero, zero, zero, zero.bool(), zero, zero)
    algorithm = AlgorithmSection(kl_coef=1.0, dual_clip=3.0, entropy_coef=1.0, tis_cap=2.0)
    losses = (make_policy_loss(algorithm), sft_loss)
    keys = {key for loss in losses for key in loss(zero, zero, batch)[1]} | gap_metrics(zero, zero).keys()
    keys |= {key for _, key, _ in console.COLUMNS} | {f"time/{name}" for name in console.TIMES}
    keys |= {key for key, _ in plot.GAPS + plot.TIMES}
    assert len(keys) > 20
    text = PAGE.read_text()
    assert [key for key in sorted(keys) if f"| `{key}` |" not in text] == []
