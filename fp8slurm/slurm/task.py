"""What every process of a job runs. Nothing heavy is imported before the environment is set."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fp8slurm.checkpoint.run import FencedError, RunDirectory
from fp8slurm.config import RunConfig
from fp8slurm.config.derived import is_direct
from fp8slurm.rl.stopping import Never
from fp8slurm.slurm import job as slurm
from fp8slurm.slurm.job import Job
from fp8slurm.slurm.life import STOPPED, Life
from fp8slurm.slurm.monitor import Monitor, record_error
from fp8slurm.slurm.placement import Placement, Task, place

if TYPE_CHECKING:
    from fp8slurm.rl.stopping import Stopping

RENDEZVOUS_TIMEOUT_S = 600.0
GPUS = "FP8SLURM_CUDA_VISIBLE_DEVICES"
"""CUDA_VISIBLE_DEVICES of the process that starts local tasks, or "all": submitit's local executor gives them none."""


def run_task(config_json: str, run_dir: str, attempt: int) -> None:
    """Entry point of submitit's local executor: be the rank or the agent that this task's number says."""
    import submitit

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    see_gpus()
    config = RunConfig.model_validate_json(config_json)
    placement = place(config)
    task = placement.tasks[submitit.JobEnvironment().global_rank]
    be_task(config, RunDirectory(Path(run_dir), attempt), placement, task, None)


def be_task(config: RunConfig, run: RunDirectory, placement: Placement, task: Task, job: Job | None) -> NoReturn:
    """Be this task of a run until it ends, and the process with it. SIGUSR2 must be blocked already."""
    started_with = dict(os.environ)
    set_environment(config, placement, task)
    set_logging(config, task)
    monitor = Monitor(run.attempt_dir, task.index, config.watchdog.timeout_s)
    stopping: Stopping = Never()
    if job is not None:
        # srun answers a failed task by ending the step of its number: on a node that was cut off and is back, that is
        # by then the step of the attempt that goes on elsewhere.
        monitor.replaced = run.replaced
        if task.role == "rank":
            stopping = life = Life(config, run, job, task.number == 0, started_with)
            monitor.on_notice, monitor.on_tick = life.notice, life.tick
    monitor.start()
    code = 1
    try:
        if task.role == "rank":
            rank_main(config, run, placement, task, monitor, stopping)
        else:
            agent_main(config, run, placement, task, monitor)
        monitor.done()
        code = 0
    except BaseException as error:  # noqa: BLE001 - whatever it was, the launcher shows it and the neighbours end
        if (run.attempt_dir / STOPPED).exists() and (task.role, task.number) != ("rank", 0):
            code = 0  # the run has stopped as planned, and rank 0 and the store are gone
        else:
            text = f"{error}" if isinstance(error, ValueError) else traceback.format_exc()
            permanent = isinstance(error, (ValueError, FencedError)) or getattr(error, "permanent", False)
            record_error(run.attempt_dir / "errors", task.index, text, permanent=permanent)
            traceback.print_exc()
            code = 0 if monitor.replaced() else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # A failed task must be gone at once, and interpreter shutdown with live process groups can hang.
        os._exit(code)


def set_environment(config: RunConfig, placement: Placement, task: Task) -> None:
    """Environment variables that libraries read when they are imported.

    Raises:
        ValueError: Slurm gave this node fewer GPUs than the placement needs.
    """
    assert "torch" not in sys.modules, "torch was imported before the environment was set: it has counted its threads"
    from fp8slurm.fp8.environment import set_fp32_scales

    set_fp32_scales()
    if config.slurm.cpu_threads:
        os.environ["OMP_NUM_THREADS"] = str(config.slurm.cpu_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_a_rank(config, len(os.sched_getaffinity(0)))))
    # Trainer and engine take turns on the same cores: a thread that spins while it waits would take the other's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # oneDNN and torch's layer over it keep 0.5 MB for every shape of a BF16 product, 1024 shapes each, and hardly two
    # micro-batches have the same shape: a rank would grow by 10 MB a step.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "128")
    # Ranks and agents wait on the store in turns of seconds, and torch would write two warnings for each.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if placement.nodes == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        os.environ["GLOO_SOCKET_IFNAME"] = slurm.interface_of(slurm.address())
        os.environ.setdefault("NCCL_SOCKET_IFNAME", os.environ["GLOO_SOCKET_IFNAME"])
    if placement.gpus_per_node:
        set_gpus(placement.gpus_per_node)
        if is_direct(config):  # both ends of a group have to agree, and SGLang sets it so
            os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        # NCCL's flight recorder: the last collectives of every rank, for the monitor to write out when nothing moves.
        for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):  # its name since torch 2.10, and before
            os.environ.setdefault(name, "2000")
    else:  # a node may have GPUs that this run has not asked for: ranks and engines take what they see
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def threads_of_a_rank(config: RunConfig, cores: int) -> int:
    """Of the cores that a task may run on: its own, if Slurm has dealt them out, else a share of them."""
    dealt = os.environ.get("SLURM_CPUS_PER_TASK", "") if config.slurm.executor == "slurm" else ""
    return min(cores, int(dealt)) if dealt.isdigit() else max(1, cores // config.slurm.ranks_per_node)


def see_gpus() -> None:
    """Undo that submitit's local executor hides the GPUs."""
    gpus = os.environ.pop(GPUS, None)
    if gpus == "all":
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    elif gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus


def set_gpus(wanted: int) -> None:
    """CUDA_VISIBLE_DEVICES = the GPUs that Slurm gave this node, which are not always 0, 1, ...; a task's `gpu` is an
    index into them. Raises ValueError where they are too few."""
    given = slurm.gpu_list()
    if Job.here() is not None and len(given) < wanted:
        raise ValueError(
            f"Slurm gave this node {len(given)} GPUs ({','.join(given) or 'none'}), --slurm.gpus-per-node is {wanted}"
        )
    if given:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given)


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
    return slurm.address()


def rank_main(
    config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor, stopping: Stopping
) -> None:
    import torch.distributed as dist

    from fp8slurm.rl import loop
    from fp8slurm.rl.channel import RankChannel
    from fp8slurm.sync import groups
    from fp8slurm.sync.sealed import SealedStore, read_key
    from fp8slurm.models.qwen3 import ModelSpec
    from fp8slurm.trainer.start import start

    monitor.expect(config.engine.ready_timeout_s)  # the first update waits for the engines
    where = run.attempt_dir / "store.json"
    address = address_of(placement)
    if task.number == 0:
        store, port = groups.host_store(address)
        groups.publish(where, address, port)
    else:
        store = groups.connect_store(where, RENDEZVOUS_TIMEOUT_S)
    start(config, task.number, placement.world_size, dist.PrefixStore("megatron", store), task.gpu or 0)
    store = SealedStore(store, read_key(where))
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
    loop.run(config, run, trainer, channel, store, address, monitor.beat, stopping)
    if task.number == 0:  # hosts the store: the last to leave
        for rank in range(1, placement.world_size):
            store.wait([f"left/{rank}"])
    else:
        store.set(f"left/{task.number}", "")


def agent_main(config: RunConfig, run: RunDirectory, placement: Placement, task: Task, monitor: Monitor) -> None:
    from fp8slurm.rl.agent import Agent
    from fp8slurm.rl.channel import AgentChannel
    from fp8slurm.sync import groups
    from fp8slurm.sync.sealed import SealedStore, read_key

    monitor.expect(config.engine.ready_timeout_s)
    address = address_of(placement)
    gpus = [engine.gpus for engine in placement.engines_of(task.node)]
    agent = Agent(config, run, task.number, placement.nodes, monitor, gpus)
    try:
        agent.start()  # the engine comes up while the ranks do
        where = run.attempt_dir / "store.json"
        store = SealedStore(groups.connect_store(where, RENDEZVOUS_TIMEOUT_S), read_key(where))
        size = placement.world_size + placement.nodes
        group = groups.Group(store, "transport", placement.world_size + task.number, size, address)
        agent.serve(AgentChannel(store, group, placement.world_size, task.number, monitor.beat), store, address)
    finally:
        agent.stop()
