"""The layer of exact runs against the ordinary one: the same function of the same parameters, packed, recomputed, over
pipeline stages and data-parallel ranks. That its kernels give the engine's bits is shown on a GPU (test_exact_gpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_reference import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exact") / "dense")


def _same(pair: list[Any]) -> None:
    def compare(a: Any, b: Any, where: str) -> None:
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b)
            for i, (x, y) in enumerate(zip(a, b)):
                compare(x, y, f"{where}[{i}]")
        else:
            torch.testing.assert_close(
                torch.as_tensor(b), torch.as_tensor(a), atol=2e-5, rtol=2e-5, msg=lambda m: f"{where}: {m}"
            )

    compare(*pair, "result")


@pytest.mark.parametrize("scenario", ["exact_layer_one", "exact_layer_recompute"])
def test_one_rank(launch: Callable[..., Any], model: Path, scenario: str) -> None:
    _same(launch(scenario, 1, [scenario], "exact_scenarios", dense=model).result(scenario))


@pytest.mark.parametrize("scenario", ["exact_layer_pp2", "exact_layer_dp2"])
def test_two_ranks(launch: Callable[..., Any], model: Path, scenario: str) -> None:
    done = launch(scenario, 2, [scenario], "exact_scenarios", dense=model)
    for rank in range(2):
        _same(done.result(scenario, rank))
