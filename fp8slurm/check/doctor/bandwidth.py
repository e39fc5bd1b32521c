"""All-reduce within and across nodes: NCCL with GPUs, gloo without.

    python -m fp8slurm.check.doctor.bandwidth {"rank", "size", "local", "address", "where", "device"}

One process a GPU, or two a node without. The first hosts the store on the interface between the nodes and writes its
place to the file `where`; the first of every node prints its figures as one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fp8slurm.check.doctor.finding import Check, Finding

BANDWIDTH = Check("bandwidth")

LIMIT_S = 240.0
NCCL_BYTES, GLOO_BYTES = 256 * 2**20, 4 * 2**20
SLOW_WITHIN, SLOW_ACROSS = 100e9, 10e9
"""Bytes a second of NCCL's bus bandwidth below which a warning is given: assumed, about a quarter of an NVLink 4 node,
and one 200 Gb/s card a node not even half used."""


def measure(rank: int, size: int, local: int, address: str, where: Path, device: int | None) -> dict[str, float]:
    """{"within": bytes a second, "across": ...}, bus bandwidth as nccl-tests has it: 2 (n - 1) / n x bytes / time."""
    import torch
    import torch.distributed as dist

    from fp8slurm.sync import groups

    if rank == 0:
        store, port = groups.host_store(address)
        groups.publish(where, address, port)
    else:
        store = groups.connect_store(where, LIMIT_S)
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if device is None else "nccl", store=store, rank=rank, world_size=size)
    nodes = [list(range(start, start + local)) for start in range(0, size, local)]
    mine = [dist.new_group(ranks) for ranks in nodes][rank // local]
    figures = {}
    if local > 1:
        figures["within"] = _busbw(mine, local, device)
    if size > local:
        figures["across"] = _busbw(dist.group.WORLD, size, device)
    dist.barrier()
    store.add("left", 1)
    if rank == 0:  # hosts the store: the last to leave
        while store.add("left", 0) < size:
            time.sleep(0.05)
    return figures


def _busbw(group: Any, members: int, device: int | None, rounds: int = 5) -> float:
    import torch
    import torch.distributed as dist

    size = GLOO_BYTES if device is None else NCCL_BYTES
    tensor = torch.ones(size // 4, device="cpu" if device is None else f"cuda:{device}")
    times = []
    for _ in range(rounds + 2):
        dist.barrier(group)
        began = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        if device is not None:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        tensor.fill_(1.0)
    return 2 * (members - 1) / members * size / min(times[2:])


def check_bandwidth(node: int, nodes: int, address: str, where: Path, gpus: int) -> list[Finding]:
    """Run this node's processes and judge. gpus: processes of this node with a GPU each; 0: two on gloo."""
    local = gpus or 2
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment |= {"GLOO_SOCKET_IFNAME": _interface(address), "NCCL_SOCKET_IFNAME": _interface(address)}
    workers = []
    for index in range(local):
        arguments = {
            "rank": node * local + index,
            "size": nodes * local,
            "local": local,
            "address": address,
            "where": str(where),
            "device": index if gpus else None,
        }
        command = [sys.executable, "-m", "fp8slurm.check.doctor.bandwidth", json.dumps(arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        workers.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    kind = "NCCL" if gpus else "gloo"
    deadline = time.monotonic() + LIMIT_S
    try:
        while (
            any(w.poll() is None for w in workers)
            and not any(w.poll() for w in workers)
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        hung = time.monotonic() >= deadline
        failed = next((w for w in workers if w.poll()), None)
        if hung or failed is not None:
            text = "no end within {LIMIT_S:g} s" if hung else _last_line(failed.communicate()[1]) if failed else ""
            return [
                BANDWIDTH.error(
                    f"all-reduce over {kind} failed: {text.format(LIMIT_S=LIMIT_S)}",
                    "NCCL_DEBUG=INFO in --slurm.setup says which card and interface it takes; NCCL_SOCKET_IFNAME,"
                    " NCCL_IB_HCA choose them",
                )
            ]
        return judge(json.loads(workers[0].communicate()[0].splitlines()[-1]), kind, nodes)
    finally:
        for w in workers:
            if w.poll() is None:
                w.kill()
            w.communicate()


def judge(figures: dict[str, float], kind: str, nodes: int) -> list[Finding]:
    """Findings for the figures of one node."""
    limits = {"within": SLOW_WITHIN, "across": SLOW_ACROSS}
    names = {"within": "within the node", "across": f"across {nodes} nodes"}
    out = []
    for where, value in figures.items():
        text = f"all-reduce {names[where]} over {kind}: {value / 1e9:.1f} GB/s (bus)"
        if kind == "NCCL" and value < limits[where]:
            fix = (
                "PCIe instead of NVLink, or sockets instead of InfiniBand: NCCL_DEBUG=INFO tells; NCCL_IB_HCA,"
                " NCCL_SOCKET_IFNAME choose"
            )
            out.append(BANDWIDTH.warning(f"{text}, below {limits[where] / 1e9:.0f}", fix))
        else:
            out.append(BANDWIDTH.ok(text))
    return out


def _interface(address: str) -> str:
    from fp8slurm.scheduler.job import SlurmError, interface_of

    try:
        return interface_of(address)
    except SlurmError:
        return "lo"


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "it ended without a word")[-300:]


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    figures = measure(**(arguments | {"where": Path(arguments["where"])}))
    print(json.dumps(figures), flush=True)
    os._exit(0)  # process groups that hang at exit are nobody's business here
