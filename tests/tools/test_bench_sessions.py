"""The load test of conversations, small: no thread for each, and the engine's places filled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_more_conversations_than_places(tmp_path):
    (tmp_path / "model").mkdir()
    tiny.write_model(tmp_path / "model")
    command = [sys.executable, str(ROOT / "tools" / "bench" / "bench_sessions.py"), str(tmp_path / "model")]
    done = subprocess.run(
        [*command, "--sessions", "48", "--turns", "3", "--slots", "8", "--tool-s", "0.05"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["turns"], report["branches"]) == (144, 0)
    assert report["most"]["threads"] - report["before"]["threads"] <= 12
    assert report["slots_filled"] > 0.5
