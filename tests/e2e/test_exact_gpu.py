"""model.exact on a GPU: what an engine said while it decoded is what the trainer computes over packed sequences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a Hopper GPU")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tools/gpu/exact_probe.py found with Qwen3-0.6B's shape."""
    folder = tmp_path_factory.mktemp("exact")
    command = [sys.executable, str(ROOT / "tools/gpu/exact_probe.py"), str(folder / "work"), str(folder / "found.json")]
    done = subprocess.run([*command, "bits", "gradients"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def test_every_decoded_token_is_the_trainers_to_the_bit(found: dict[str, Any]) -> None:
    runs = [found[f"bits/temperature {t}"] for t in ("1", "0.7", "1.3")]
    assert sum(run["tokens"] for run in runs) >= 20_000
    assert [run["differ"] for run in runs] == [0, 0, 0]
    assert found["bits/alone"]["differ"] == 0


def test_with_sglangs_quantizer_it_is_not(found: dict[str, Any]) -> None:
    stock = found["bits/with SGLang's quantizer"]
    assert stock["differ"] > 0.9 * stock["tokens"]


def test_gradients_are_repeated_and_recomputed(found: dict[str, Any]) -> None:
    """To the bit, but for the attention's backward, of which an element differed by its last bit in one of two
    repetitions."""
    assert max(found["gradients/repeat"].values(), default=0.0) < 1e-4
    assert max(found["gradients/recomputed"].values(), default=0.0) < 1e-4


def test_gradients_are_as_near_to_bf16s_as_transformer_engines(found: dict[str, Any]) -> None:
    """FP8 is what sets both apart from BF16."""
    for exact, fp8 in (found["gradients/relative to bf16 [exact, fp8]"][k] for k in ("median", "max")):
        assert exact < 1.1 * fp8
