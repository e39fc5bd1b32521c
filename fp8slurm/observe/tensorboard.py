"""The records of metrics.jsonl as TensorBoard scalars."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8slurm.observe.metrics import PHASES, Position, order

log = logging.getLogger(__name__)


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
            try:
                self._writers[phase] = SummaryWriter(str(Path(folder) / phase), purge_step=purge)
            except OSError as error:
                log.error("TensorBoard's files of phase %s are not written: %s", phase, error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of a record under its key, at its step. A file that cannot be written to is said, and no more is
        written: metrics.jsonl has everything."""
        writer = self._writers.get(record["phase"])
        if writer is None:
            return
        try:
            for key, value in record.items():
                if key not in ("phase", "step") and value is not None and not isinstance(value, (str, bool)):
                    writer.add_scalar(key, value, record["step"])
            writer.flush()
        except OSError as error:
            log.error("TensorBoard's files are not written any more: %s", error)
            self._writers = {}

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            try:
                writer.close()
            except OSError as error:
                log.error("TensorBoard's last scalars may be missing: %s", error)
