"""Commands from rank 0 to the agents, answers and samples back.

    rank 0:     command/N = JSON               (TCPStore)
    agent A:    ... works ...; answer/N/A = JSON, "bytes" says how long the payload is
    all ranks:  wait for answer/N/A on the store, then take part in the broadcast of the payload (gloo)

Ranks wait on the store and not inside a collective: a rollout may take longer than any sensible collective timeout,
and a rank that waits on the store can be told to stop.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any, Callable

import torch
import torch.distributed as dist

from fp8slurm.sync.groups import Group

IDLE_BEAT = timedelta(seconds=5)
"""How often an agent that waits for a command says that it is alive."""


class RankChannel:
    """A training rank's end. Every rank calls the same methods in the same order."""

    def __init__(
        self, store: dist.Store, group: Group, ranks: int, agents: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.store, self.group, self.ranks, self.agents, self.beat = store, group, ranks, agents, beat
        self.count = 0

    def post(self, kind: str, **arguments: Any) -> None:
        """Start a command in every agent; `collect` waits for it."""
        if self.group.rank == 0:
            self.store.set(f"command/{self.count}", json.dumps({"kind": kind, **arguments}))

    def collect(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Every agent's answer and payload (uint8 [bytes]) to the command posted last."""
        answers = []
        for agent in range(self.agents):
            key = f"answer/{self.count}/{agent}"
            self.store.wait([key])
            answer = json.loads(self.store.get(key))
            payload = torch.empty(answer["bytes"], dtype=torch.uint8)
            if answer["bytes"]:
                self.group.broadcast(payload, self.ranks + agent)
            answers.append((answer, payload))
            self.beat()
        self.count += 1
        return answers

    def call(self, kind: str, **arguments: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """post and collect."""
        self.post(kind, **arguments)
        return self.collect()


class AgentChannel:
    """An agent's end."""

    def __init__(
        self, store: dist.Store, group: Group, ranks: int, number: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.store, self.group, self.ranks, self.number, self.beat = store, group, ranks, number, beat
        self.count = 0

    def next(self) -> dict[str, Any]:
        """The next command, waiting for it. To have nothing to do is no hang: while it waits it beats."""
        key = f"command/{self.count}"
        while True:
            try:
                self.store.wait([key], IDLE_BEAT)
                return json.loads(self.store.get(key))
            except dist.DistStoreError as error:
                if "timeout" not in str(error):
                    raise
                self.beat()

    def answer(self, values: dict[str, Any], payload: torch.Tensor | None = None) -> None:
        """Answer the command taken last; payload is uint8 [n]."""
        size = 0 if payload is None else payload.numel()
        self.store.set(f"answer/{self.count}/{self.number}", json.dumps({**values, "bytes": size}))
        if size:
            self.group.broadcast(payload, self.ranks + self.number)
        self.count += 1
