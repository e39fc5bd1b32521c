"""Which path the weights take from ranks to engines: the one place that chooses by sync.transport.

host     sources -> rollout workers -> their engines, over gloo; a rollout worker can keep the last update
mapped   engines map the memory of the ranks whose GPUs they share (sync/mapped.py)
direct   sources -> engines (sync/direct.py)

A path is three ends, and nobody else knows which one a run takes:

    a rank             Sender     prepare (may ask the rollout workers), send
    a rollout worker   Receiver   prepare (the answer), receive
    an engine          Transport  start and finish of a bucket
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import transport_of
from fp8slurm.sync.delta import LastSent
from fp8slurm.sync.direct import DirectReceiver, DirectSender, DirectTransport
from fp8slurm.sync.mapped import MappedReceiver, MappedSender, MappedTransport
from fp8slurm.sync.receiver import HostReceiver, Receiver, Source
from fp8slurm.sync.stream import Sender, WeightStream, parse_description
from fp8slurm.sync.transport import BroadcastTransport, Transport

PATHS = {"gloo": "host", "cuda-ipc": "mapped", "shared-memory": "mapped", "nccl": "direct", "gloo-direct": "direct"}


def sender(config: RunConfig, store: Any, stream: WeightStream, address: str, folder: Path) -> Sender:
    """A rank's end, once all plans are in the job's store. address: where gloo listens. folder: for files."""
    path, e = PATHS[transport_of(config)], config.engine
    last = LastSent(store) if config.sync.delta else None
    if path == "direct":
        ranks = config.slurm.nodes * e.per_node * e.tensor_parallel_size
        return DirectSender(store, list(stream.sources), ranks, address, last)
    if path == "mapped":
        names = store.get("sync/sources").decode().split()
        roots = [int(store.get(f"sync/root/{n}")) for n in names]
        plans = [parse_description(store.get(f"sync/plan/{n}").decode()) for n in names]
        return MappedSender(store, list(zip(names, roots, plans)), folder)
    return Sender(last)


def receiver(config: RunConfig, node: int, store: dist.Store, sources: Sequence[Source]) -> Receiver:
    """The end of the rollout worker of `node`."""
    path, ranks = PATHS[transport_of(config)], config.slurm.ranks_per_node
    if path == "direct":
        each = config.engine.tensor_parallel_size
        return DirectReceiver(store, sources, node, config.slurm.nodes, each, config.sync.delta)
    if path == "mapped":
        return MappedReceiver(store, range(node * ranks, (node + 1) * ranks), sources)
    return HostReceiver(store, sources, config.sync.keep_last_update is not False, config.sync.delta)


def transport(config: RunConfig, gpus: Sequence[int]) -> Transport:
    """How an engine on these GPUs of its node (none: on the CPU) is told."""
    path = PATHS[transport_of(config)]
    if path == "direct":
        return DirectTransport("nccl" if gpus else "gloo")
    if path == "mapped":  # without GPUs all map the first rank's
        return MappedTransport(gpus or (0,) * config.engine.tensor_parallel_size)
    return BroadcastTransport()
