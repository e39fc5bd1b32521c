"""tools/exact_layers.py: silent where two sides agree, and names the first module where they do not."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_model

TOOL = Path(__file__).resolve().parents[2] / "tools" / "exact_layers.py"


@pytest.mark.slow
def test_modules_are_compared_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", seed=3)

    def lines(*more: str) -> tuple[int, list[str]]:
        command = [sys.executable, str(TOOL), str(tmp_path / "out"), "--model", str(tmp_path / "model"), *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        return done.returncode, [x for x in done.stdout.splitlines() if x.startswith(("model.", "log-prob"))]

    status, said = lines("--temperature", "0.7", "--tokens", "12")
    assert status == 0 and len(said) == 1 + 2 * 8 + 2 and all(" equal (" in x for x in said), said
    status, said = lines("--stage", "compare", "--no-exact")  # the trainer alone is an ordinary one
    assert status == 1 and " equal (" in said[0] and "engine " in said[-1] and "trainer " in said[-1]
    first = next(x for x in said if " differ; first: " in x)
    assert first.startswith("model.layers.0."), said
