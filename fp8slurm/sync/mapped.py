"""Weights for engines that share the ranks' GPUs: every engine maps the bucket that lies on its own GPU.

    source   fills a bucket                          (sync/stream.py)
    ranks    one broadcast to all of them: a copy on every GPU            (NCCL; none with a single rank)
    rank     mapped/N/B/R = handle of its copy of bucket B of update N    (the job's store)
    rollout worker    has each engine load from the handles of its own GPUs, all engines at once
    rollout worker    mapped/N/B/done/R once its engines are done with bucket B; its memory is bucket B + 2's then

Weights do not pass through the host, so the rollout worker has none to hold: an engine that restarts waits for the next
update. Without GPUs (sync.transport shared-memory) the copies are files that the engines map: the same protocol, for
tests and for trying it out."""

from __future__ import annotations

import base64
import json
import math
import os
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.gpu_memory import mappable
from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.inside.recorded import Form
from fp8slurm.sync.bucket import WeightBucket, WeightSpec, payload_bytes
from fp8slurm.sync.receiver import PastTheHost, Source
from fp8slurm.sync.stream import BUFFERS, HostCopy, Pending, Sender, WeightStream
from fp8slurm.sync.transport import Transport

Buckets = Sequence[tuple[WeightSpec, ...]]


@dataclass
class MappedBucket(WeightBucket):
    """A bucket that lies in the memory of the ranks of this node. The payload is empty, or a copy to compare with."""

    handles: tuple[str, ...] = ()
    """By the ranks of the node, in order: what memory_handle returned there."""


def memory_handle(payload: torch.Tensor | Path) -> str:
    """Where a payload lies, for another process of this node: JSON.

    payload: uint8 on a GPU (core/gpu_memory.mappable), or a file that holds it.
    """
    if isinstance(payload, Path):
        return json.dumps({"file": str(payload)})
    from torch.multiprocessing.reductions import reduce_tensor

    # Every call puts another wrapper around the storage's pointer (torch's CudaIPCSentData: some 200 bytes of host
    # memory) until the storage is freed. One handle for all updates would save that, but every opening counts its
    # counter down, and below zero torch takes the memory for one that is used, and keeps it when parameters move and
    # get new buffers.
    _, arguments = reduce_tensor(payload)
    plain = [a if i not in CONSTANT else None for i, a in enumerate(arguments)]
    # numbers of GPUs differ by process: it is named by its UUID, and SGLang looks for it there
    plain[DEVICE] = str(torch.cuda.get_device_properties(payload.device).uuid)
    return json.dumps([{"bytes": base64.b64encode(a).decode()} if isinstance(a, bytes) else a for a in plain])


CONSTANT: dict[int, Any] = {0: torch.Tensor, 4: torch.storage.TypedStorage, 5: torch.uint8}
DEVICE = 6
"""Arguments of torch.multiprocessing.reductions.rebuild_cuda_tensor: what they are for every payload; the GPU's."""


def flat_bucket(handle: str, forms: Sequence[Form]) -> str:
    """base64 of what /update_weights_from_tensor takes as a flattened bucket: where the memory is, and what lies there.

    handle: memory_handle's. Pickled, because SGLang takes nothing else: the only pickled object of this project, for an
    engine on this node, behind its API key.
    """
    metadata = []
    for name, dtype, shape, start in forms:
        kind = getattr(torch, dtype)
        size = kind.itemsize * math.prod(shape)
        where = {"start_idx": start, "end_idx": start + size, "numel": size}
        metadata.append(SimpleNamespace(name=name, shape=torch.Size(shape), dtype=kind, **where))
    where = json.loads(handle)
    memory = where["file"] if isinstance(where, dict) else _CudaMemory(where)
    return base64.b64encode(pickle.dumps({"flattened_tensor": memory, "metadata": metadata})).decode()


class _CudaMemory:
    """Pickles as the tensor that a handle stands for; it is not opened here."""

    def __init__(self, arguments: list[Any]) -> None:
        self.arguments = [base64.b64decode(a["bytes"]) if isinstance(a, dict) else a for a in arguments]

    def __reduce__(self) -> tuple[Any, ...]:
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        arguments = [CONSTANT.get(i, a) for i, a in enumerate(self.arguments)]
        arguments[1:3] = torch.Size(arguments[1]), tuple(arguments[2])
        return rebuild_cuda_tensor, tuple(arguments)


class MappedSender(Sender):
    """A rank's end. Every rank makes one and takes part in every update: its GPU has engines to feed."""

    def __init__(self, store: dist.Store, sources: Sequence[tuple[str, int, Buckets]], folder: Path) -> None:
        """sources: (name, the rank that is the source, its buckets), in the order in which they are sent, the same on
        all ranks. folder: for the files that stand in for GPU memory where there is none."""
        super().__init__()  # sync.delta is refused with it
        self.store, self.sources = store, sources
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.on_gpu = torch.cuda.is_available()
        self._files = [] if self.on_gpu else [folder / f"weights_{self.rank}_{i}" for i in range(BUFFERS)]
        self._buffers: list[torch.Tensor] = []
        """For the buckets of other ranks, and where files stand in for GPUs for all of them."""
        mine = [root == self.rank for _, root, _ in sources]
        largest = max(payload_bytes(specs) for _, _, plan in sources for specs in plan)
        if self._files:
            self._buffers = [_map_file(path, largest) for path in self._files]
        elif not all(mine):
            with mappable():
                self._buffers = [torch.empty(largest, dtype=torch.uint8, device="cuda") for _ in range(BUFFERS)]

    def send(self, number: int, version: int, stream: WeightStream, to_hosts: HostCopy, verify: bool) -> None:
        """Update `number`, under `version`. Collective over all ranks; returns when the last bucket is handed over.

        verify: what this rank is the source of also goes `to_hosts`, to be compared.
        """
        own = stream.buckets(version)
        under_way: deque[tuple[str, Pending | None]] = deque()
        turn = 0
        for name, root, plan in self.sources:
            for specs in plan:
                if len(under_way) == BUFFERS:
                    with stream.waiting():
                        self._wait(*under_way.popleft())
                bucket = next(own)[1] if name in stream.shared else None
                copying = to_hosts(name, bucket) if verify and bucket is not None else None
                payload = self._spread(specs, bucket, root, turn)
                memory = payload if self.on_gpu else self._files[turn % BUFFERS]
                self.store.set(f"mapped/{number}/{turn}/{self.rank}", memory_handle(memory))
                under_way.append((f"mapped/{number}/{turn}/done/{self.rank}", copying))
                turn += 1
        assert next(own, None) is None, "the stream has more buckets than the plan"
        # the engines are done with the last ones when their rollout worker answers the command
        for copying in filter(None, (pending for _, pending in under_way)):
            copying.wait()

    def _spread(self, specs: Sequence[WeightSpec], bucket: WeightBucket | None, root: int, turn: int) -> torch.Tensor:
        """The bucket's payload on this rank's GPU (or in its file), finished: another process may read it."""
        size = payload_bytes(tuple(specs))
        if bucket is not None and self.on_gpu:
            assert root == self.rank, (root, self.rank)
            payload = bucket.payload
        else:
            payload = self._buffers[turn % BUFFERS][:size]
            if bucket is not None:
                payload.copy_(bucket.payload)
        if self.world > 1:
            dist.broadcast(payload, root)
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()
        return payload

    def close(self) -> None:
        """Remove the files."""
        for path in self._files:
            path.unlink(missing_ok=True)

    def _wait(self, key: str, copying: Pending | None) -> None:
        self.store.wait([key])
        self.store.delete_key(key)
        if copying is not None:
            copying.wait()


class MappedReceiver(PastTheHost):
    """A rollout worker's end."""

    def __init__(self, store: dist.Store, ranks: Sequence[int], sources: Sequence[Source]) -> None:
        """ranks: those of this node."""
        super().__init__(store, sources)
        self.store, self.ranks = store, ranks

    def receive(self, version: int, number: int, verify: bool) -> Iterator[WeightBucket]:
        """The buckets of update `number`, which gets `version`. Each is good until the next but one is asked for; with
        verify they come with payloads, which last (CorruptUpdate as in Receiver.receive)."""
        payloads = self.payloads(version, number, verify)
        for turn, (_, specs) in enumerate(self.plan):
            if turn >= BUFFERS:
                for rank in self.ranks:  # a key for each, who deletes it
                    self.store.set(f"mapped/{number}/{turn - BUFFERS}/done/{rank}", "")
            keys = [f"mapped/{number}/{turn}/{rank}" for rank in self.ranks]
            handles = tuple(self.store.get(key).decode() for key in keys)
            for key in keys:
                self.store.delete_key(key)
            yield MappedBucket(version, specs, next(payloads), handles=handles)
        next(payloads, None)


class MappedTransport(Transport):
    """The engine maps the payload where it lies: on a GPU that it shares with a training rank, or in a file."""

    def __init__(self, ranks: Sequence[int] = (0,)) -> None:
        """ranks: for every rank of the engine the number on its node of the training rank that shares its GPU."""
        super().__init__()
        self._ranks = tuple(ranks)

    def open(self, client: EngineClient, tensor_parallel_size: int) -> None:
        assert tensor_parallel_size == len(self._ranks), (tensor_parallel_size, self._ranks)
        super().open(client, tensor_parallel_size)

    def start(self, bucket: WeightBucket) -> None:
        """A MappedBucket, or one on this process's GPU."""
        assert self._client is not None, "open() comes first"
        start = time.perf_counter()
        if isinstance(bucket, MappedBucket):
            memory = [bucket.handles[rank] for rank in self._ranks]
        else:
            torch.cuda.current_stream().synchronize()  # the payload is finished before another process reads it
            memory = [memory_handle(bucket.payload)] * len(self._ranks)
        forms = self.announce(bucket.specs)
        handles = [flat_bucket(handle, forms) for handle in memory]
        self.seconds["handover"] += time.perf_counter() - start
        self._loading = self._pool.submit(self._load, self._client, handles)

    def _load(self, client: EngineClient, handles: list[str]) -> None:
        start = time.perf_counter()
        client.receive_handles(handles)  # the engine's plugin answers once its copies are done
        self.seconds["load"] += time.perf_counter() - start

    def finish(self) -> None:
        self._loading.result()


def _map_file(path: Path, size: int) -> torch.Tensor:
    """uint8 [size] in a file that other processes can map."""
    with path.open("wb") as file:
        os.chmod(path, 0o600)
        file.truncate(size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
