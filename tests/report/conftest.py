"""Makes tests/report/made_up_run.py importable: pytest's importlib mode puts no test folder on the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, **more): a run of made_up_run.write_run."""
    from made_up_run import write_run

    return lambda name="run", **more: write_run(tmp_path / name, **more)
