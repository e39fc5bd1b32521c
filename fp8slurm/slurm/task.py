"""What every process of a job runs. Nothing heavy is imported before the environment is set."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path

from fp8slurm.checkpoint.run import RunDirectory
from fp8slurm.config import RunConfig
from fp8slurm.slurm.monitor import Monitor, record_error
from fp8slurm.slurm.placement import Placement, Task, place

RENDEZVOUS_TIMEOUT_S = 600.0


def run_task(config_json: str, run_dir: str, attempt: int) -> None:
    """Entry point under submitit: be the rank or the agent that this task's number says."""
    import submitit

    config = RunConfig.model_validate_json(config_json)
    placement = place(config)
    task = placement.tasks[submitit.JobEnvironment().global_rank]
    run = RunDirectory(Path(run_dir), attempt)
    set_environment(config, placement, task)
    set_logging(config, task)
    monitor = Monitor(run.attempt_dir, task.index, config.watchdog.timeout_s)
    monitor.start()
    code = 1
    try:
        if task.role == "rank":
            rank_main(config, run, placement, task, monitor)
        else:
            agent_main(config, run, placement, task, monitor)
        monitor.done()
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it was, the launcher shows it and the neighbours end
        text = f"{error}" if isinstance(error, ValueError) else traceback.format_exc()
        record_error(run.attempt_dir / "errors", task.index, text)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed task must be gone at once, and interpreter shutdown with live process groups can hang.
        os._exit(code)


def set_environment(config: RunConfig, placement: Placement, task: Task) -> None:
    """Environment variables that libraries read when they are imported."""
    assert "torch" not in sys.modules, "torch was imported before the environment was set: it has counted its threads"
    from fp8slurm.fp8.environment import set_fp32_scales

    set_fp32_scales()
    if config.slurm.cpu_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.slurm.cpu_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // placement.ranks_per_node)))
    # Trainer and engine take turns on the same cores: a thread that spins while it waits would take the other's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN and torch's layer over it keep 0.5 MB for every shape of a BF16 product, 1024 shapes each, and hardly two
    # micro-batches have the same shape: a rank would grow by 10 MB a step.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if placement.nodes == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"


def set_logging(config: RunConfig, task: Task) -> None:
    first = task.role == "agent" or task.number == 0
    level = (config.run.log_level if first else config.run.rank_log_level).upper()
    logging.basicConfig(
        level=level,
        format=f"%(asctime)s %(levelname)s {task.role} {task.number} %(name)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )


def address_of(placement: Placement) -> str:
    """Where the store and gloo listen."""
    if placement.nodes == 1:
        return "127.0.0.1"
    import socket

    return socket.gethostbyname(socket.gethostname())


def rank_main(config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor) -> None:
    import torch.distributed as dist

    from fp8slurm.rl import loop
    from fp8slurm.rl.channel import RankChannel
    from fp8slurm.sync import groups
    from fp8slurm.models.qwen3 import ModelSpec
    from fp8slurm.trainer.start import start

    where = run.attempt_dir / "store.json"
    address = address_of(placement)
    if task.number == 0:
        store, port = groups.host_store(address)
        groups.publish(where, address, port)
    else:
        store = groups.connect_store(where, RENDEZVOUS_TIMEOUT_S)
    start(config, task.number, placement.world_size, dist.PrefixStore("megatron", store), task.gpu or 0)
    from fp8slurm.trainer.trainer import Trainer

    assert config.model.hf_checkpoint is not None
    trainer = Trainer(config, ModelSpec.from_hf_dir(config.model.hf_checkpoint))
    size = placement.world_size + placement.nodes
    channel = RankChannel(
        store,
        groups.Group(store, "transport", task.number, size, address),
        placement.world_size,
        placement.nodes,
        monitor.beat,
    )
    loop.run(config, run, trainer, channel, store, address, monitor.beat)
    if task.number == 0:  # hosts the store: the last to leave
        for rank in range(1, placement.world_size):
            store.wait([f"left/{rank}"])
    else:
        store.set(f"left/{task.number}", "")


def agent_main(config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor) -> None:
    from fp8slurm.rl.agent import Agent
    from fp8slurm.rl.channel import AgentChannel
    from fp8slurm.sync import groups

    address = address_of(placement)
    agent = Agent(config, run, task.number, placement.nodes, monitor)
    try:
        agent.start()  # the engine comes up while the ranks do
        store = groups.connect_store(run.attempt_dir / "store.json", RENDEZVOUS_TIMEOUT_S)
        size = placement.world_size + placement.nodes
        group = groups.Group(store, "transport", placement.world_size + task.number, size, address)
        agent.serve(AgentChannel(store, group, placement.world_size, task.number, monitor.beat), store, address)
    finally:
        agent.stop()
