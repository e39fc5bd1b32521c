"""A two-node lab of this room's own: its tests break a node on purpose."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("slurm_lab_fixtures", Path(__file__).parents[2] / "slurm" / "conftest.py")
slurm_lab_fixtures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(slurm_lab_fixtures)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    reason = slurm_lab_fixtures.why_no_lab()
    if reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    state, made = tmp_path_factory.getbasetemp() / "lab-doctor", None
    if len(str(state)) > 60:
        made = Path(tempfile.mkdtemp(prefix="fp8slurm-"))
        state = made / "lab"
    lab = slurm_lab_fixtures.Lab(state, "linuxproc")
    lab.do("up")
    yield lab
    lab.do("down")
    if made:
        shutil.rmtree(made, ignore_errors=True)
