"""A training rank, put together: Megatron, store, channel, loop."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import Placement, Task
from fp8slurm.core.deadlines import RENDEZVOUS_TIMEOUT_S
from fp8slurm.core.stopping import StopPolicy
from fp8slurm.process.environment import address_of
from fp8slurm.process.monitor import Monitor
from fp8slurm.run.directory import RunDirectory


def rank_main(
    config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor, stop_policy: StopPolicy
) -> None:
    import torch.distributed as dist

    from fp8slurm.models.spec import ModelSpec
    from fp8slurm.rl import loop
    from fp8slurm.rollout.channel import RankChannel
    from fp8slurm.sync import groups
    from fp8slurm.sync.signed_store import SignedStore, read_key
    from fp8slurm.trainer.start import start

    monitor.expect(config.engine.ready_timeout_s)  # the first update waits for the engines
    where = run.attempt_dir / "store.json"
    address = address_of(placement)
    if task.number == 0:
        plain, port = groups.host_store(address)
        groups.publish(where, address, port)
    else:
        plain = groups.connect_store(where, RENDEZVOUS_TIMEOUT_S)
    start(config, task.number, placement.world_size, dist.PrefixStore("megatron", plain), task.gpu or 0)
    store = SignedStore(plain, read_key(where))
    from fp8slurm.trainer.trainer import Trainer

    assert config.model.hf_checkpoint is not None
    trainer = Trainer(config, ModelSpec.from_hf_dir(config.model.hf_checkpoint))
    ranks, workers = placement.world_size, placement.nodes
    group = groups.Group(store, "transport", task.number, ranks + workers, address)
    channel = RankChannel(store, group, ranks, workers, monitor.heartbeat)
    loop.run(config, run, trainer, channel, store, address, monitor.heartbeat, stop_policy)
    if task.number == 0:  # hosts the store: the last to leave
        for rank in range(1, placement.world_size):
            store.wait([f"left/{rank}"])
    else:
        store.set(f"left/{task.number}", "")
