"""Which weights the engine gets."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.models.qwen3 import ModelSpec, QuantizationSpec


def engine_in_fp8(config: RunConfig) -> bool:
    """Whether the engine serves FP8: its checkpoint's quantization_config says so, or the checkpoint to be made will."""
    if config.model.rollout_checkpoint is not None:
        return ModelSpec.from_hf_dir(config.model.rollout_checkpoint).quantization is not None
    return config.fp8.engine == "fp8" or (config.fp8.engine == "auto" and config.fp8.backend != "off")


def engine_quantization(config: RunConfig) -> QuantizationSpec | None:
    """The quantization that weight updates follow."""
    if config.model.rollout_checkpoint is not None:
        return ModelSpec.from_hf_dir(config.model.rollout_checkpoint).quantization
    return QuantizationSpec() if engine_in_fp8(config) else None
