"""Which grouped products TransformerEngine is told to use; that they are right is for a GPU to say (test_gpu.py)."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest

from fp8slurm.trainer.experts import CUTLASS, choose_grouped_products

HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(CUTLASS, "")  # has monkeypatch put back whatever was there
    monkeypatch.delenv(CUTLASS)
    caplog.set_level(logging.INFO)


def transformer_config(**changes: Any) -> SimpleNamespace:
    """Of Qwen3-30B-A3B in BF16."""
    values = {"num_moe_experts": 128, "fp8": None, "bf16": True, "hidden_size": 2048, "moe_ffn_hidden_size": 768}
    return SimpleNamespace(**{**values, "expert_tensor_parallel_size": 1, **changes})


def test_a_bf16_mixture_on_hopper_multiplies_with_cutlass_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    choose_grouped_products(HOPPER, transformer_config())
    assert os.environ[CUTLASS] == "1"
    assert f"CUTLASS ({CUTLASS}=1" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"num_moe_experts": None}, {"fp8": "e4m3"}, {"bf16": False}], ids=["dense", "fp8", "fp32"]
)
def test_where_it_changes_nothing_nothing_is_set_or_said(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    choose_grouped_products(HOPPER, transformer_config(**changes))
    assert CUTLASS not in os.environ and not caplog.text


@pytest.mark.parametrize(
    "capability, changes, named",
    [
        ((8, 0), {}, "here 8.0, 2048 and 768"),
        ((10, 0), {}, "here 10.0, 2048 and 768"),
        (HOPPER, {"expert_tensor_parallel_size": 4}, "here 9.0, 2048 and 192"),
        (HOPPER, {"hidden_size": 960}, "here 9.0, 960 and 768"),
    ],
)
def test_where_its_kernels_do_not_fit_cublas_stays_and_the_log_says_why(
    capability: tuple[int, int], changes: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    choose_grouped_products(capability, transformer_config(**changes))
    assert CUTLASS not in os.environ
    assert named in caplog.text


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(CUTLASS, "0")
    choose_grouped_products(HOPPER, transformer_config())
    assert os.environ[CUTLASS] == "0"
    assert f"{CUTLASS}=0 was set already" in caplog.text
