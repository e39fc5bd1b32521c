"""One task on this terminal (executor debug): `python -m fp8slurm.slurm.foreground CONFIG RUN_DIR ATTEMPT INDEX`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
from fp8slurm.run.directory import RunDirectory
from fp8slurm.slurm.task import be_task


def main(config_path: str, run_dir: str, attempt: str, index: str) -> None:
    """Be task INDEX; does not return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    config = RunConfig.model_validate_json(Path(config_path).read_text())
    placement = place(config)
    be_task(config, RunDirectory(Path(run_dir), int(attempt)), placement, placement.tasks[int(index)], None)


if __name__ == "__main__":
    main(*sys.argv[1:])
