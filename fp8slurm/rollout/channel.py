"""Commands from rank 0 to the rollout workers, answers and samples back.

    rank 0:            command/N = JSON        (TCPStore)
    rollout worker W:  ... works ...; answer/N/W = JSON, "bytes" says how long the payload is
    rank 0:            waits for answer/N/W on the store, then sets taken/N/W: "", or why the command is abandoned
    everybody:         takes part in the broadcasts of the payloads (gloo), rollout worker 0's first; ranks wait for
                       taken/N/W before it

Ranks wait on the store and not inside a collective: a rollout may take longer than any sensible collective timeout,
and a rank that waits on the store can be told to stop.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.stopping import StepAbandoned
from fp8slurm.sync.groups import Group

ABANDON_POLL = timedelta(seconds=1)
AT_WORK_S = 2.0
IDLE_HEARTBEAT = timedelta(seconds=5)
"""How often a rollout worker that waits for a command says that it is alive."""


class RankChannel:
    """A training rank's end. Every rank calls the same methods in the same order."""

    def __init__(
        self, store: dist.Store, group: Group, ranks: int, workers: int, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self.store, self.group, self.ranks, self.workers, self.heartbeat = store, group, ranks, workers, heartbeat
        self.count = 0
        self._progress = [0] * workers

    def post(self, kind: str, **arguments: Any) -> None:
        """Start a command in every rollout worker; `collect` waits for it."""
        if self.group.rank == 0:
            self.store.set(f"command/{self.count}", json.dumps({"kind": kind, **arguments}))

    def collect(self, abandon: Callable[[], str] = lambda: "") -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Every rollout worker's answer and payload (uint8 [bytes]) to the command posted last.

        Raises:
            StepAbandoned: on all ranks, when `abandon`, called on rank 0 every second, gives a reason; workers go on.
        """
        answers = []
        for worker in range(self.workers):
            key, taken = f"answer/{self.count}/{worker}", f"taken/{self.count}/{worker}"
            if self.group.rank == 0:
                self.store.set(taken, self._wait(key, abandon))
            self._wait(taken)
            reason = self.store.get(taken).decode()
            if reason:
                raise StepAbandoned(reason)
            answer = json.loads(self.store.get(key))
            payload = torch.empty(answer["bytes"], dtype=torch.uint8)
            if answer["bytes"]:
                self.group.broadcast(payload, self.ranks + worker)
            answers.append((answer, payload))
            self.heartbeat()
        self.count += 1
        return answers

    def _wait(self, key: str, abandon: Callable[[], str] = lambda: "") -> str:
        """Wait for a key; why not to wait any longer, or "" once it is there. A worker's progress is the ranks' too."""
        while True:
            try:
                self.store.wait([key], ABANDON_POLL)
                return ""
            except dist.DistStoreError as error:
                if "timeout" not in str(error):
                    raise
            if self._workers_moved():
                self.heartbeat()
            reason = abandon()
            if reason:
                return reason

    def _workers_moved(self) -> bool:
        """Whether a rollout worker has counted further. A count that is written again keeps no hung job alive."""
        moved = False
        for worker, before in enumerate(self._progress):
            if self.store.check([key := f"progress/{worker}"]) and (now := int(self.store.get(key))) > before:
                self._progress[worker], moved = now, True
        return moved

    def call(self, kind: str, **arguments: Any) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """post and collect."""
        self.post(kind, **arguments)
        return self.collect()


class WorkerChannel:
    """A rollout worker's end."""

    def __init__(
        self, store: dist.Store, group: Group, ranks: int, number: int, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self.store, self.group, self.ranks, self.number, self.heartbeat = store, group, ranks, number, heartbeat
        self.count = self._progress = 0
        self._lock = threading.Lock()

    def next(self) -> dict[str, Any]:
        """The next command, waiting for it. To have nothing to do is no hang: meanwhile it gives heartbeats."""
        return self.get(f"command/{self.count}")

    def get(self, key: str) -> Any:
        """The JSON under a key of the store, waiting for it."""
        self.wait(key)
        return json.loads(self.store.get(key))

    def wait(self, key: str) -> None:
        """Wait for a key of the store with heartbeats: who sets it has a watchdog of its own."""
        while True:
            try:
                self.store.wait([key], IDLE_HEARTBEAT)
                return
            except dist.DistStoreError as error:
                if "timeout" not in str(error):
                    raise
                self.heartbeat()

    def progress(self) -> None:
        """Something has moved: a heartbeat of this rollout worker and of the ranks that wait for it."""
        with self._lock:  # threads that are at work tell it, too
            self._progress += 1
            self.store.set(f"progress/{self.number}", str(self._progress))
        self.heartbeat()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Something long with a deadline of its own: `progress` now and then."""
        over = threading.Event()

        def tell() -> None:
            while not over.wait(AT_WORK_S):
                self.progress()

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def answer(self, values: dict[str, Any], payload: torch.Tensor | None = None) -> None:
        """Answer the command taken last; payload is uint8 [n]."""
        size = 0 if payload is None else payload.numel()
        self.store.set(f"answer/{self.count}/{self.number}", json.dumps({**values, "bytes": size}))
        self.wait(f"taken/{self.count}/0")  # the ranks may be training still (rollout.max_staleness)
        for worker in range(self.group.size - self.ranks):
            if worker == self.number:
                sent = payload
            else:  # a broadcast is every member's business
                sent = torch.empty(self.get(f"answer/{self.count}/{worker}")["bytes"], dtype=torch.uint8)
            if sent is not None and sent.numel():
                self.group.broadcast(sent, self.ranks + worker)
        self.count += 1
