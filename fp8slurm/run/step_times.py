"""How long a step and a save took: what a stop before a deadline is planned with."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import read_json, write_atomic
from fp8slurm.core.numbers import number
from fp8slurm.run.directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass
class StepTimes:
    """Measured seconds; 0: not measured yet. Kept in runs/NAME/pace.json for the next attempt."""

    step_s: float = 0.0
    """A step, from boundary to boundary; a long one is forgotten slowly."""
    save_s: float = 0.0
    """The last checkpoint, until it was sealed."""

    @classmethod
    def read(cls, run: RunDirectory | Path) -> StepTimes:
        """Those of a run so far. What cannot be read is said and measured anew: it is no reason to end a run."""
        path = (run.path if isinstance(run, RunDirectory) else run) / "pace.json"
        try:
            found = read_json(path)
        except FileNotFoundError:
            return cls()
        except (OSError, TransientInputError) as error:
            log.warning("the run's step times are measured anew: %s", error)
            return cls()
        known = {f.name: value for f in fields(cls) if (value := number(found.get(f.name))) is not None and value >= 0}
        unusable = ", ".join(f"{key} {value!r:.50}" for key, value in found.items() if key not in known)
        if unusable:
            log.warning("%s: left out: %s; seconds are known as %s", path, unusable, ", ".join(asdict(cls())))
        return cls(**known)

    def step_took(self, seconds: float) -> None:
        """Measured from boundary to boundary."""
        self.step_s = max(seconds, 0.8 * self.step_s)

    def write(self, run: RunDirectory) -> None:
        write_atomic(run.path / "pace.json", json.dumps(asdict(self)))
