"""Which weights the engine gets. No torch: a task asks before its environment is set, a report asks of a record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from fp8slurm.models.spec import ModelSpec, QuantizationSpec

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig


def serves_fp8(rollout_checkpoint: str | Path | None, engine: str | None, backend: str | None) -> bool:
    """Whether the engine of a run with model.rollout_checkpoint, fp8.engine and fp8.backend serves FP8.

    A checkpoint says so in its config.json (errors as ModelSpec.from_hf_dir); one that is made has what was asked for.
    """
    if rollout_checkpoint is not None:
        return ModelSpec.from_hf_dir(rollout_checkpoint).quantization is not None
    return engine == "fp8" or (engine == "auto" and backend != "off")


def engine_in_fp8(config: RunConfig) -> bool:
    """Whether the engine of this configuration serves FP8."""
    return serves_fp8(config.model.rollout_checkpoint, config.fp8.engine, config.fp8.backend)


def gap_bound(config: RunConfig) -> float:
    """rollout.max_gap, in nats: what the gap between trainer and engine cannot be while they are one policy."""
    if config.rollout.max_gap is not None:
        return config.rollout.max_gap or math.inf
    return 0.5 if config.fp8.backend != "off" or engine_in_fp8(config) else 0.3


def engine_quantization(config: RunConfig) -> QuantizationSpec | None:
    """The quantization that weight updates follow."""
    if config.model.rollout_checkpoint is not None:
        return ModelSpec.from_hf_dir(config.model.rollout_checkpoint).quantization
    return QuantizationSpec() if engine_in_fp8(config) else None
