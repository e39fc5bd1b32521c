"""The records of metrics.jsonl as TensorBoard scalars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8slurm.observe.metrics import PHASES, Position, order


class TensorBoard:
    """Writes to folder/sft and folder/rl; an earlier attempt's scalars behind `resume_at` are hidden (None: all)."""

    def __init__(self, folder: Path, resume_at: Position | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writers = {}
        for phase in PHASES:
            purge: int | None = 0  # a run that begins anew hides what is there
            if resume_at is not None:
                later = order((phase, 0)) > order((resume_at[0], 0))
                purge = 0 if later else resume_at[1] + 1 if phase == resume_at[0] else None
            self._writers[phase] = SummaryWriter(str(Path(folder) / phase), purge_step=purge)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record under its key, at its step."""
        writer = self._writers[record["phase"]]
        for key, value in record.items():
            if key not in ("phase", "step") and value is not None and not isinstance(value, (str, bool)):
                writer.add_scalar(key, value, record["step"])
        writer.flush()

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            writer.close()
