"""A node's rollout worker, put together: engines, store, channel."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import Placement, Task
from fp8slurm.core.deadlines import RENDEZVOUS_TIMEOUT_S
from fp8slurm.process.environment import address_of
from fp8slurm.process.monitor import Monitor
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.gpu_use import watch_gpus


def rollout_worker_main(
    config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor
) -> None:
    from fp8slurm.rollout.channel import WorkerChannel
    from fp8slurm.rollout.worker import RolloutWorker
    from fp8slurm.sync import groups
    from fp8slurm.sync.signed_store import SignedStore, read_key

    monitor.expect(config.engine.ready_timeout_s)
    if placement.gpus_per_node:
        watch_gpus(run.attempt_dir, task.node)
    address = address_of(placement)
    gpus = [engine.gpus for engine in placement.engines_of(task.node)]
    worker = RolloutWorker(config, run, task.number, placement.nodes, monitor, gpus)
    try:
        worker.start()  # the engine comes up while the ranks do
        where = run.attempt_dir / "store.json"
        store = SignedStore(groups.connect_store(where, RENDEZVOUS_TIMEOUT_S), read_key(where))
        size = placement.world_size + placement.nodes
        group = groups.Group(store, "transport", placement.world_size + task.number, size, address)
        worker.serve(WorkerChannel(store, group, placement.world_size, task.number, monitor.heartbeat), store, address)
    finally:
        worker.stop()
