"""train.recompute_logprobs: steps with one update are the same to the byte with and without the separate pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("dense", "moe"):
        (folder / name).mkdir()
        write_model(folder / name, moe=name == "moe")
    return {name: folder / name for name in ("dense", "moe")}


@pytest.mark.parametrize(("ranks", "scenario"), [(1, "dense"), (1, "experts_replayed"), (2, "dense")])
def test_same_bytes_as_with_the_separate_pass(
    launch: Callable[..., Any], models: dict[str, Path], ranks: int, scenario: str
) -> None:
    """Emulated FP8, a reference, a teacher, importance weights, saved rollouts; two ranks are data-parallel."""
    launched = launch(f"{scenario}-{ranks}", ranks, [scenario], "recompute_scenarios", **models)
    for rank in range(ranks):
        auto, always = launched.result(scenario, rank)
        assert auto["calls"] == ["reference", "train"] * 3
        assert always["calls"] == ["logprobs", "reference", "train"] * 3
        for record in always["records"]:
            ratios = {key: record.pop(key) for key in list(record) if key.startswith("ratio/")}
            assert ratios.pop("ratio/mean") == pytest.approx(1, abs=1e-6) and not any(ratios.values()), ratios
        assert auto["records"] == always["records"] and {"gap/mean_abs", "teacher/kl"} <= auto["records"][0].keys()
        assert auto["weights"] == always["weights"]
        assert auto["saved"] == always["saved"] and len(auto["saved"]) == 3
