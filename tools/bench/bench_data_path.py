#!/usr/bin/env python3
"""The way of a step's samples from rollout workers to training ranks, for many nodes in one process: CPU seconds a step of a
rank and of a worker, bytes that a rank gets, requests to the job's store.

Real: serialization, packing, the channel of every worker and every rank, and the store, a TCPStore with signed values on
loopback. Played: the network (messages are handed over in memory and counted) and the models (random tokens; lengths are
log-normal, p99 = 8 x median as measured runs have them, or those of a run's saved rollouts). Two ranks, the first and
the last, do all of a rank's work; the others only what concerns the store. CPU seconds are those of one thread, so a
busy machine does not change them much. Samples grow with nodes: each has --groups groups of --samples.

usage: tools/bench/bench_data_path.py [--nodes 1 4 16 64] [--gpus 8] [--cut 1] [--groups 16] [--samples 8] [--median 500]
                                      [--experts LAYERSxK] [--rollouts RUN/rollouts/step_000010.jsonl ...] [--runs 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import statistics
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from fp8slurm.core.types import Prompt, Sample, SampleGroup  # noqa: E402
from fp8slurm.rl import exchange, packing  # noqa: E402
from fp8slurm.rollout.channel import RankChannel, WorkerChannel  # noqa: E402
from fp8slurm.rollout.dealing import Holder  # noqa: E402
from fp8slurm.rollout.groups import merge  # noqa: E402
from fp8slurm.rollout.tally import Tally  # noqa: E402
from fp8slurm.sync import groups as sync_groups  # noqa: E402
from fp8slurm.sync.signed_store import SignedStore, new_key  # noqa: E402

LONG = math.log(8) / 2.326  # of a log-normal whose 99th percentile is 8 times its median
COMMANDS = ("rollout", "deal")


class Wire:
    """What a network does for a group: messages between members, and one broadcast a command."""

    def __init__(self) -> None:
        self.messages: dict[tuple[int, int], queue.Queue] = defaultdict(queue.Queue)
        self.broadcasts: list[tuple[threading.Event, list[torch.Tensor]]] = []
        self.lock = threading.Lock()

    def broadcast(self, number: int) -> tuple[threading.Event, list[torch.Tensor]]:
        with self.lock:
            while len(self.broadcasts) <= number:
                self.broadcasts.append((threading.Event(), []))
            return self.broadcasts[number]


class Done:
    def __init__(self, wait: Any = lambda: None) -> None:
        self.wait = wait


class Member:
    """A member's end of the wire, with the calls of sync/groups.Group; `received` counts bytes."""

    def __init__(self, wire: Wire, rank: int, size: int, copies: bool) -> None:
        self.wire, self.rank, self.size, self.copies = wire, rank, size, copies
        self.received = self._broadcasts = 0

    def start_send(self, tensor: torch.Tensor, to: int) -> Done:
        self.wire.messages[self.rank, to].put(tensor)
        return Done()

    def start_receive(self, tensor: torch.Tensor, source: int) -> Done:
        self.received += tensor.numel()

        def wait() -> None:
            sent = self.wire.messages[source, self.rank].get(timeout=600)
            if self.copies:
                tensor.copy_(sent)

        return Done(wait)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        there, sent = self.wire.broadcast(self._broadcasts)
        self._broadcasts += 1
        if self.rank == root:
            sent.append(tensor)
            there.set()
            return
        assert there.wait(600)
        self.received += tensor.numel()
        if self.copies:
            tensor.copy_(sent[0])


class CountedStore(SignedStore):
    """The job's store, with the number of its requests."""

    requests = 0

    def __init__(self, plain: Any, key: str) -> None:
        super().__init__(plain, key)
        inner = self

        class Counted:
            def __getattr__(self, name: str) -> Any:
                call = getattr(plain, name)
                if name in ("get", "set", "wait", "check", "delete_key"):
                    type(inner).requests += 1
                return call

        self.plain = Counted()  # type: ignore[assignment]


class Trainer:
    """What the exchange asks of a trainer; neighbouring ranks cut one model."""

    def __init__(self, rank: int, ranks: int, cut: int) -> None:
        self.rank, self.data_parallel_size, self.data_parallel_rank = rank, ranks // cut, rank // cut


class Lengths:
    """Lengths of responses: recorded ones in turns, or drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        lines = [line for path in args.rollouts for line in Path(path).read_text().splitlines()]
        self.recorded = [len(json.loads(line)["tokens"]) for line in lines]
        self.median, self.longest = args.median, args.longest

    def of(self, g: torch.Generator, n: int, first: int) -> list[int]:
        if self.recorded:
            return [self.recorded[(first + i) % len(self.recorded)] for i in range(n)]
        drawn = torch.exp(torch.randn(n, generator=g) * LONG) * self.median
        return [max(1, min(self.longest, int(length))) for length in drawn]


def groups_of(worker: int, args: argparse.Namespace, lengths: Lengths) -> list[SampleGroup]:
    g = torch.Generator().manual_seed(worker)
    layers, k = (int(n) for n in args.experts.split("x")) if args.experts else (0, 0)
    groups = []
    for i in range(args.groups):
        prompt = Prompt(worker * args.groups + i, tuple(range(100)), "label")
        samples = []
        for number, length in enumerate(lengths.of(g, args.samples, (worker * args.groups + i) * args.samples)):
            ids = torch.randint(0, 150_000, (length,), generator=g).tolist()
            logprobs = (-torch.rand(length, generator=g)).tolist()
            routing = torch.randint(0, 128, (99 + length, layers, k), dtype=torch.uint8) if layers else None
            samples.append(Sample(ids, logprobs, [3] * length, "stop", "x" * 4 * length, number % 2.0, routing))
        groups.append(SampleGroup(prompt, samples))
    return groups


def work_of_worker(channel: WorkerChannel, holder: Holder, groups: list[SampleGroup], seconds: list[float]) -> None:
    """One step of a rollout worker, without the rollout."""
    begun = time.thread_time()
    for kind in COMMANDS:
        command = channel.next()
        assert command["kind"] == kind
        if kind == "rollout":
            answer = {"cursor": 0, "dropped": 0, "figures": Tally().sums, "reward_failures": 0, "seconds": 1.0}
            channel.answer(answer, holder.hold(answer, groups))
        else:
            parts = holder.parts(command["wanted"], command["first"][holder.number], command["to"], command["texts"])
            channel.answer({}, None, parts)
    seconds.append(time.thread_time() - begun)


def work_of_rank(channel: RankChannel, trainer: Trainer, args: argparse.Namespace) -> int:
    """One step of a rank, from the answers to its micro-batches; how many tokens those have."""
    groups, _ = merge(channel.collect(), 3)
    deals = packing.deal(
        groups, updates=1, data_parallel_size=trainer.data_parallel_size, tokens_per_micro_batch=args.tokens
    )
    exchange.SampleExchange(type("Weights", (), {"channel": channel}), trainer).fetch(groups, deals)
    values = [[0.5] * len(g.samples) for g in groups]
    batches = packing.fill(deals[0], trainer.data_parallel_rank, groups, values)
    return sum(len(b.tokens) for b in batches)


def only_store(channel: RankChannel, trainer: Trainer, to: list[list[int]]) -> None:
    """What the other ranks do, as far as it concerns others."""
    channel.collect()
    channel.receive([a for a, _ in channel.collect()], to)


def step(nodes: int, args: argparse.Namespace, held: list[list[SampleGroup]]) -> dict[str, float]:
    """Figures of one step."""
    ranks = nodes * args.gpus
    plain, _ = sync_groups.host_store("127.0.0.1")
    key, wire = new_key(), Wire()
    CountedStore.requests = 0
    owners = [Trainer(r, ranks, args.cut).data_parallel_rank for r in range(ranks)]
    exchange.ranks_values = lambda value: owners
    to = [[r for r in range(ranks) if owners[r] == d] for d in range(ranks // args.cut)]

    def store() -> CountedStore:
        return CountedStore(plain.clone(), key)

    worker_s: list[float] = []
    threads = []
    for w in range(nodes):
        member = Member(wire, ranks + w, ranks + nodes, copies=False)
        channel = WorkerChannel(store(), member, ranks, w)
        arguments = (channel, Holder(w, nodes), held[w], worker_s)
        threads.append(threading.Thread(target=work_of_worker, args=arguments, daemon=True))
    first, last = (
        (RankChannel(store(), Member(wire, r, ranks + nodes, True), ranks, nodes), Trainer(r, ranks, args.cut))
        for r in (0, ranks - 1)
    )
    shared = store()
    others = [RankChannel(shared, Member(wire, r, ranks + nodes, False), ranks, nodes) for r in range(1, ranks - 1)]
    for thread in threads:
        thread.start()
    figures: dict[str, float] = {}

    def measured(name: str, channel: RankChannel, trainer: Trainer) -> None:
        begun = time.thread_time()
        tokens = work_of_rank(channel, trainer, args)
        figures[f"{name}_s"] = time.thread_time() - begun
        figures[f"{name}_bytes"], figures[f"{name}_tokens"] = channel.group.received, tokens

    first[0].post("rollout")
    running = [threading.Thread(target=measured, args=("first", *first))]
    if ranks > 1:
        running.append(threading.Thread(target=measured, args=("last", *last)))
    for thread in running:
        thread.start()
    for channel in others:
        only_store(channel, Trainer(channel.group.rank, ranks, args.cut), to)
    for thread in (*running, *threads):
        thread.join()
    figures |= {"worker_s": statistics.median(worker_s), "requests": CountedStore.requests}
    figures["samples"] = sum(len(g.samples) for groups in held for g in groups)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--gpus", type=int, default=8, help="training ranks of a node")
    parser.add_argument("--cut", type=int, default=1, help="ranks that cut one model (TP x PP x CP)")
    parser.add_argument("--groups", type=int, default=16, help="of a node and step")
    parser.add_argument("--samples", type=int, default=8, help="of a group")
    parser.add_argument("--median", type=int, default=500, help="tokens of a response")
    parser.add_argument("--longest", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--experts", help="LAYERSxK: with routing replay")
    parser.add_argument("--rollouts", nargs="*", default=[], help="saved rollouts whose lengths are taken")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lengths, rows = Lengths(args), []
    print("nodes  ranks  samples  CPU s: rank 0, last rank, worker    MB: rank 0, last rank    store requests")
    for nodes in args.nodes:
        held = [groups_of(w, args, lengths) for w in range(nodes)]
        runs = [step(nodes, args, held) for _ in range(args.runs)]
        row = {key: statistics.median(r.get(key, 0.0) for r in runs) for key in runs[0]}
        rows.append({"nodes": nodes, "ranks": nodes * args.gpus, **row})
        print(
            f"{nodes:5d}  {nodes * args.gpus:5d}  {row['samples']:7.0f}  {row['first_s']:13.3f} {row.get('last_s', 0):10.3f}"
            f" {row['worker_s']:7.3f}  {row['first_bytes'] / 1e6:13.2f} {row.get('last_bytes', 0) / 1e6:10.2f}"
            f"  {row['requests']:16.0f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
