"""One rank of two: saves tiny models with Megatron in several layouts, or loads a checkpoint and compares it.

usage: megatron_worker.py RANK PORT JOBS.json     jobs: [{"do": "save"|"load", "hf", "ckpt", "parallel": {...}}]
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    from fp8slurm.config.schema import RunConfig
    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.trainer.start import start, stop
    from fp8slurm.trainer.trainer import Trainer

    sys.path.append(str(Path(__file__).parents[1] / "trainer"))
    from trainer_scenarios import save

    torch.set_num_threads(1)
    rank, port, jobs = int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=120))
    for number, job in enumerate(jobs):
        config = RunConfig.model_validate({"fp8": {"backend": "off"}, "parallel": job["parallel"]})
        start(config, rank, 2, dist.PrefixStore(str(number), store))
        trainer = Trainer(config, ModelSpec.from_hf_dir(job["hf"]))
        trainer.load_hf(job["hf"])
        if job["do"] == "save":
            save(trainer, Path(job["ckpt"]))
        else:
            load_and_compare(trainer, job["ckpt"])
        stop()


def load_and_compare(trainer, ckpt: str) -> None:
    """What Megatron loads from ckpt is what the trainer loaded from the HF folder, in every byte."""
    from megatron.core import dist_checkpointing

    expected = {n: p.detach().clone() for n, p in trainer.module.named_parameters()}
    with torch.no_grad():
        for p in trainer.module.parameters():
            p.fill_(7)
    loaded = dist_checkpointing.load({"model": trainer.module.sharded_state_dict()}, ckpt)
    trainer.module.load_state_dict(loaded["model"])
    for name, p in trainer.module.named_parameters():
        assert torch.equal(p, expected[name]), name


if __name__ == "__main__":
    main()
