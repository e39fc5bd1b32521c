"""Runs the trainer's scenarios: each launch starts its ranks once and goes through many of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the scenarios are shared with the ranks' processes


class Launch:
    """What the scenarios of one launch left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def result(self, scenario: str, rank: int = 0) -> Any:
        """The value that a scenario returned on a rank; its failure is this test's failure."""
        failure = self.folder / f"{scenario}.{rank}.error"
        if failure.is_file():
            pytest.fail(f"{scenario}, rank {rank}:\n{failure.read_text()}", pytrace=False)
        path = self.folder / f"{scenario}.{rank}.pt"
        if not path.is_file():
            logs = "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("rank*.log")))
            pytest.fail(f"{scenario} left no result on rank {rank}:\n{logs}", pytrace=False)
        return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def launch(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[[Path, Path, int], None]
) -> Callable[..., Launch]:
    """launch(name, world_size, scenarios, module, **paths): run a module's scenarios, in order, on that many ranks."""

    def run(
        name: str, world_size: int, scenarios: list[str], module: str = "trainer_scenarios", **paths: Path
    ) -> Launch:
        folder = tmp_path_factory.mktemp(name)
        job = {"world_size": world_size, "module": module, "scenarios": scenarios}
        job["paths"] = {k: str(v) for k, v in paths.items()}
        (folder / "job.json").write_text(json.dumps(job))
        run_ranks(HERE / "trainer_worker.py", folder, world_size)
        return Launch(folder)

    return run
