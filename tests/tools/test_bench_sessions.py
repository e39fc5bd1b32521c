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
        [*command, "--sessions", "48", "--turns", "3", "--slots", "8", "--tool-s", "0.05", "--agents", "ids", "openai-apart"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    by_ids, by_openai = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    for report in (by_ids, by_openai):
        assert report["turns"] == 144 and report["most"]["threads"] - report["before"]["threads"] <= 12
    assert by_ids["branches"] == 0 and by_ids["slots_filled"] > 0.5 and by_openai["agents_cpu_ms_a_turn"] > 0
