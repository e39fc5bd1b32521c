"""Ports, the interface between the nodes, and the clocks of the nodes against each other's."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from fp8slurm.check.doctor.files import skew_finding
from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.scheduler import job as slurm

NETWORK = Check("network")

PORTS = 256
"""Ports that must be free at once: the store, gloo's and NCCL's listeners of every task, the engines."""
ROUNDS = 5
WAIT_S = 120.0


def check_ports(address: str) -> Iterator[Finding]:
    """Whether PORTS sockets can listen on `address`, on ports that the system chooses (all of ours are)."""
    low, high = _range()
    held: list[socket.socket] = []
    try:
        for _ in range(PORTS):
            s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            held.append(s)
            s.bind((address, 0))
            s.listen(1)
    except OSError as error:
        yield NETWORK.error(
            f"{address}: port {len(held)} of {PORTS} could not be had: {error.strerror} (ports {low} to {high})",
            "the range net.ipv4.ip_local_port_range is used up or too small: ss -ltn shows by whom; another node, or"
            " ask the site",
        )
        return
    finally:
        for s in held:
            s.close()
    yield NETWORK.ok(f"{address}: {PORTS} ports at once, of {low} to {high}")


def _range() -> tuple[int, int]:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return low, high


def check_interface() -> tuple[str, list[Finding]]:
    """(address, findings): the interface that joins the nodes of a job."""
    try:
        address = slurm.address()
        name = slurm.interface_of(address)
    except (slurm.SlurmError, OSError) as error:
        fix = "the node's name must resolve to an address that other nodes reach (/etc/hosts, DNS)"
        return "127.0.0.1", [NETWORK.error(f"no address for the other nodes: {error}", fix)]
    if problem := slurm.no_such_interface(os.environ.get("NCCL_SOCKET_IFNAME", "")):
        return address, [NETWORK.error(problem, f"unset it: NCCL then takes {name}, on which nodes meet")]
    return address, [NETWORK.ok(f"nodes meet on {name}")]


def serve_clock(name: str, address: str, others: int, where: Path) -> list[Finding]:
    """On the first node: tell every other node what time it is here, ROUNDS times; listens on `address` only."""
    seen = 0
    with socket.create_server((address, 0), backlog=others + 1) as listener:
        partial = where.with_suffix(".tmp")
        partial.write_text(json.dumps({"name": name, "address": address, "port": listener.getsockname()[1]}))
        os.replace(partial, where)
        listener.settimeout(WAIT_S)
        try:
            while seen < others:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(10)
                    for _ in range(ROUNDS):
                        if not connection.recv(1):
                            break
                        connection.sendall(f"{time.time():.6f}\n".encode())
                seen += 1
        except OSError as error:
            fix = "a firewall between the nodes, or no route: the other nodes say more"
            return [
                NETWORK.error(f"{seen} of {others} nodes connected to {address} within {WAIT_S:g} s ({error})", fix)
            ]
    return []


def compare_clock(where: Path) -> list[Finding]:
    """On the other nodes: this clock against the first's, by the fastest of ROUNDS exchanges (RFC 5905, section 8)."""
    deadline = time.monotonic() + WAIT_S
    while not where.is_file():
        if time.monotonic() > deadline:
            fix = "--run.root must be the same file system on every node"
            return [NETWORK.error(f"{where}, which the first node writes, did not appear within {WAIT_S:g} s", fix)]
        time.sleep(0.1)
    server = json.loads(where.read_text())
    best: tuple[float, float] | None = None
    try:
        with socket.create_connection((server["address"], server["port"]), timeout=30) as s, s.makefile("rb") as lines:
            for _ in range(ROUNDS):
                began, before = time.monotonic(), time.time()
                s.sendall(b"?")
                there = float(lines.readline())
                took = time.monotonic() - began
                one = (took, before + took / 2 - there)
                best = one if best is None else min(best, one)
    except (OSError, ValueError) as error:
        fix = "a firewall between the nodes, or no route; --slurm.exclude leaves the node out"
        return [NETWORK.error(f"cannot reach {server['name']} at {server['address']}: {error}", fix)]
    assert best is not None
    return list(skew_finding(best[1], f"{server['name']}'s", "network")) or [NETWORK.ok("clocks agree within 1 s")]
