"""One rank of a launch: trainer_worker.py FOLDER RANK. Goes through the scenarios that FOLDER/job.json lists."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    from trainer_scenarios import Ranks

    scenarios = importlib.import_module(job["module"])
    store = dist.FileStore(str(folder / "store"), job["world_size"])
    paths = {k: Path(v) for k, v in job["paths"].items()}
    for name in job["scenarios"]:
        ranks = Ranks(rank, job["world_size"], store, folder, paths)
        try:
            torch.save(getattr(scenarios, name)(ranks), folder / f"{name}.{rank}.pt")
        except BaseException:
            (folder / f"{name}.{rank}.error").write_text(traceback.format_exc())
            if job["world_size"] > 1 or not isinstance(sys.exc_info()[1], Exception):
                raise  # the other ranks may be anywhere: no scenario after this one could be trusted


if __name__ == "__main__":
    main()
