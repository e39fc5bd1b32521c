"""Copies around an optimizer step in few launches (trainer/optimizer_copies.py) against Megatron's own, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_reference import write_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scenario", ["copies_bf16", "copies_fp32"])
def test_two_ranks_take_the_same_steps(launch: Callable[..., Any], tmp_path: Path, scenario: str) -> None:
    model = write_model(tmp_path / "moe", seed=2, tie=False, moe=True)
    done = launch(scenario, 2, [scenario], "grouped_scenarios", moe=model)
    for rank in range(2):
        theirs, ours = done.result(scenario, rank)
        assert theirs["steps"] == ours["steps"] and theirs["replaced"] == 0 < ours["replaced"]
        assert theirs["weights"].keys() == ours["weights"].keys()
        for name, weight in theirs["weights"].items():
            assert torch.equal(weight, ours["weights"][name]), name
