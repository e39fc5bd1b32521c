"""How long a step and a save took: what a stop before a deadline is planned with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8slurm.core.files import read_json, write_atomic
from fp8slurm.run.directory import RunDirectory


@dataclass
class StepTimes:
    """Measured seconds; 0: not measured yet. Kept in runs/NAME/pace.json for the next attempt."""

    step_s: float = 0.0
    """A step, from boundary to boundary; a long one is forgotten slowly."""
    save_s: float = 0.0
    """The last checkpoint, until it was sealed."""

    @classmethod
    def read(cls, run: RunDirectory | Path) -> StepTimes:
        """Those of a run so far."""
        path = (run.path if isinstance(run, RunDirectory) else run) / "pace.json"
        return cls(**read_json(path)) if path.is_file() else cls()

    def step_took(self, seconds: float) -> None:
        """Measured from boundary to boundary."""
        self.step_s = max(seconds, 0.8 * self.step_s)

    def write(self, run: RunDirectory) -> None:
        write_atomic(run.path / "pace.json", json.dumps(asdict(self)))
