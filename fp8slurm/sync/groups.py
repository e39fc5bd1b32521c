"""The job's key-value store and the process groups that are not Megatron's.

A group here is a bare ProcessGroup object: it is in no registry, so it neither needs nor disturbs torch.distributed's
default group, which belongs to the training ranks alone.
"""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fp8slurm.core.files import patiently, read_json, write_atomic

TIMEOUT = timedelta(hours=24)  # hangs are the watchdog's business: it knows what progress is


def listen(address: str) -> socket.socket:
    """A listening socket on `address`, port chosen by the system."""
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.bind((address, 0))
    s.listen(512)
    return s


def host_store(address: str) -> tuple[dist.TCPStore, int]:
    """A TCPStore that listens on `address` only, and its port. TCPStore by itself would listen on every interface."""
    s = listen(address)
    port = s.getsockname()[1]
    store = dist.TCPStore(
        address, port, None, is_master=True, timeout=TIMEOUT, wait_for_workers=False, master_listen_fd=s.detach()
    )
    return store, port


def publish(path: Path, address: str, port: int) -> None:
    """Tell the attempt's other tasks where the store is, and the key of its values, in a file for nobody else."""
    from fp8slurm.sync.signed_store import new_key

    text = json.dumps({"address": address, "port": port, "key": new_key()})
    patiently(lambda: write_atomic(path, text, mode=0o600))


def connect_store(path: Path, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that rank 0 published. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not patiently(path.is_file):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {timeout_s:g} s: rank 0 did not start")
        time.sleep(0.05)
    where = patiently(lambda: read_json(path))
    return dist.TCPStore(
        where["address"], where["port"], None, is_master=False, timeout=TIMEOUT, wait_for_workers=False
    )


class Group:
    """A gloo group of `size` members; every member makes it with the same name."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int, address: str) -> None:
        self.rank, self.size = rank, size
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = TIMEOUT
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._group = dist.ProcessGroupGloo(dist.PrefixStore(f"group/{name}", store), rank, size, options)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """In place; blocks until this member's part is done."""
        self.start_broadcast(tensor, root).wait()

    def start_send(self, tensor: torch.Tensor, to: int) -> dist.Work:
        """Begin to send to one member; as for start_broadcast. Messages between two members arrive in order."""
        return self._group.send([tensor], to, 0)  # type: ignore[attr-defined]

    def start_receive(self, tensor: torch.Tensor, source: int) -> dist.Work:
        """Begin to receive from one member, in place; the size has to be the sent one's."""
        return self._group.recv([tensor], source, 0)  # type: ignore[attr-defined]

    def start_broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work:
        """Begin a broadcast in place; the tensor is the group's until wait() returns. All start in the same order."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        return self._group.broadcast([tensor], options)  # type: ignore[attr-defined]
