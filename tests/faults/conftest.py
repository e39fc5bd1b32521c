"""Faults of the file system and of processes, in runs on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from injection import compile_injector
from tiny_runs import TinyRuns


@pytest.fixture(scope="session")
def injector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that a process loads to meet faults."""
    return compile_injector(tmp_path_factory.mktemp("injector"))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(
        tmp_path_factory.mktemp("runs"), 4, "--rollout.no-drop-no-signal", "--observe.no-tensorboard",
        "--observe.no-plot", run__steps=6, sft__max_steps=8, sft__warmup_steps=2, sft__batch_size=32,
        rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=0, checkpoint__every=2,
        eval__every=0, slurm__cpu_threads=1, slurm__engine_threads=1, train__updates_per_step=1,
    )  # fmt: skip


@pytest.fixture(scope="session")
def reference(runs: TinyRuns) -> Path:
    return runs.run("reference")
