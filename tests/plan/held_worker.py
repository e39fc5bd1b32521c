"""One of four ranks: held_worker.py FOLDER RANK. Builds a trainer in every layout of FOLDER/layouts.json and writes
what it holds, counted tensor by tensor, to FOLDER/held.RANK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 4


def held(trainer: Any) -> dict[str, int]:
    """Elements and bytes on this rank."""
    buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    parameters = list(trainer.module.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    if trainer.config.optim.distributed:
        weights = sum(b.param_data.nbytes for b in buffers)
    optimizer = 0
    parts = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    if trainer.config.optim.cpu_offload:
        parts = [adam for part in parts for adam in part.sub_optimizers]
    for adam in parts:
        for group in adam.param_groups:
            for p in group["params"]:
                optimizer += adam.state[p]["exp_avg"].nbytes + adam.state[p]["exp_avg_sq"].nbytes
                if trainer.config.model.dtype == "bfloat16":
                    assert p.dtype == torch.float32
                    optimizer += p.nbytes  # the master weight
    experts = [n for n, _ in trainer.named_shards() if ".local_experts." in n]
    shards = dict(trainer.named_shards())
    return {
        "stage": trainer.pipeline_parallel_rank,
        "parameters": sum(p.numel() for p in parameters),
        "expert_parameters": sum(shards[n].numel() for n in experts),
        "weights": weights,
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "optimizer": optimizer,
    }


def saved(trainer: Any, folder: Path) -> int:
    """The most host memory that tensors take while a checkpoint is written in the background."""
    folder.mkdir(exist_ok=True)
    dist.barrier()
    snapshot = trainer.snapshot(folder)
    snapshot.write()
    return snapshot.most_bytes


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    from fp8slurm.config import RunConfig
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.trainer.start import start, stop
    from fp8slurm.trainer.trainer import Trainer

    store = dist.FileStore(str(folder / "store"), WORLD)
    out = {}
    for name, values in json.loads((folder / "layouts.json").read_text()).items():
        config = RunConfig.model_validate(values)
        start(config, rank, WORLD, dist.PrefixStore(name, store))
        trainer = Trainer(config, ModelSpec.from_hf_dir(config.model.hf_checkpoint))
        if config.algorithm.kl_coef:
            trainer.snapshot_reference()
        out[name] = held(trainer) | {"checkpoint": saved(trainer, folder / name)}
        stop()
    (folder / f"held.{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
