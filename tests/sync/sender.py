"""One training rank that sends updates: sender.py FOLDER RANK WORLD MODEL TP PP EP DIE_IN_UPDATE.

Between updates every weight is moved a little. After updates 1 and LAST the rank's shards are saved.
"""

from __future__ import annotations

import os
import signal
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

LAST = 20
BUCKET = 300_000


def perturb(name: str, shard: torch.Tensor, cut: bool, version: int, rank: int) -> None:
    """Noise that is the same on all ranks where the parameter is."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{version}/{rank if cut else 0}".encode()))
    shard.add_((torch.randn(shard.shape, generator=generator) * 0.01).to(shard.dtype))


def main(folder: Path, rank: int, world: int, model: Path, tp: int, pp: int, ep: int, die_in: int) -> None:
    from safetensors.torch import save_file

    from fp8slurm.config import parse
    from fp8slurm.models.names import NameTable
    from fp8slurm.models.spec import ModelSpec, QuantizationSpec
    from fp8slurm.sync.groups import Group, connect_store
    from fp8slurm.sync.receiver import checksum, publish_checksums
    from fp8slurm.sync.stream import Cut, WeightStream
    from fp8slurm.sync.traffic import traffic
    from fp8slurm.trainer.start import start
    from fp8slurm.trainer.trainer import Trainer

    flags = {"model.hf-checkpoint": model, "fp8.backend": "emulated", "parallel.tensor-parallel-size": tp,
             "parallel.pipeline-parallel-size": pp, "parallel.expert-parallel-size": ep, "slurm.ranks-per-node": world}  # fmt: skip
    config = parse(None, [f"--{k}={v}" for k, v in flags.items()])
    store = connect_store(folder / "store.json", 120)
    start(config, rank, world, dist.PrefixStore("megatron", store))
    trainer = Trainer(config, ModelSpec.from_hf_dir(model))
    trainer.load_hf(model)
    table = NameTable(trainer.spec)
    cut = Cut(trainer.tensor_parallel_rank, tp, trainer.tensor_parallel_group, trainer.data_parallel_rank == 0)
    stream = WeightStream(
        table, trainer.named_shards, QuantizationSpec(), BUCKET, torch.float32, cut, trainer.pipeline_parallel_rank,
        Cut(*trainer.expert_tensor_parallel, trainer.expert_data_parallel_rank == 0), trainer.expert_parallel_rank,
    )  # fmt: skip
    for name in stream.sources:
        store.set(f"sync/plan/{name}", stream.describe(name))
    groups = {name: Group(store, f"sync/{name}", 0, 2, "127.0.0.1") for name in stream.sources}
    counted = traffic(table, QuantizationSpec(), BUCKET, tensor_parallel_size=tp, pipeline_parallel_size=pp,
                      expert_parallel_size=ep, dtype=torch.float32)  # fmt: skip
    mine = next(r for r in counted.ranks if (r.stage, r.position) == divmod(rank, world // pp))
    for version in range(1, LAST + 1):
        store.wait([f"go/{version}"])
        with torch.no_grad():
            for name, shard in trainer.named_shards():
                perturb(name, shard, table[name].tp_dim is not None, version, trainer.tensor_parallel_rank)
        checksums: dict[str, list[int]] = {name: [] for name in groups}

        def begin(name: str, bucket) -> dist.Work:
            checksums[name].append(checksum(bucket.payload))
            if die_in == version and len(checksums[name]) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return groups[name].start_broadcast(bucket.payload, 0)

        stream.send(version, begin)
        for name, sums in checksums.items():
            publish_checksums(store, version, name, sums)
        for key, value in stream.counts.items():
            assert value == getattr(mine, key), (key, value, mine)
        if version in (1, LAST):
            save_file({n: t.clone() for n, t in trainer.named_shards()}, folder / f"{version}.{rank}.safetensors")
        store.set(f"sent/{version}/{rank}", "")
    store.wait(["done"])
    os._exit(0)


if __name__ == "__main__":
    a = sys.argv
    main(Path(a[1]), int(a[2]), int(a[3]), Path(a[4]), int(a[5]), int(a[6]), int(a[7]), int(a[8]))
