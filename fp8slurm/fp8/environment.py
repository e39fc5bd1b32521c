"""The one environment variable that changes the numbers."""

from __future__ import annotations

import os
import sys

from fp8slurm.core.errors import InputError

NAME = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


def set_fp32_scales() -> None:
    """Make TransformerEngine use FP32 block scales, the ones that the exporter and the engine use.

    TransformerEngine reads the variable when its recipe class is defined: set later, it would silently do nothing.

    Raises:
        InputError: the variable has another value, or TransformerEngine was imported without it.
    """
    value = os.environ.get(NAME)
    if value not in (None, "1"):
        raise InputError(f"{NAME}={value} contradicts the FP32 scales of the exported weights: unset it or set it to 1")
    if value is None and "transformer_engine" in sys.modules:
        raise ValueError(f"TransformerEngine was imported before {NAME} was set; it would use power-of-two scales")
    os.environ[NAME] = "1"
