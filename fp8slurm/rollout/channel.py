"""Commands from rank 0 to the rollout workers, answers and samples back.

    rank 0:            command/N = JSON        (TCPStore)
    rollout worker W:  ... works ...; answer/N/W = JSON, "bytes" says how long its payload is
    rank 0:            waits for all of them, then sets taken/N: the answers, or why the command is abandoned
    rollout workers:   send their payloads to rank 0, which broadcasts them as one                 (gloo)
    rollout worker:    may then send to some ranks what only they need: "parts" says how much      (gloo)

Payloads are what all ranks have to know, and small; samples go as parts (dealing.py). Ranks wait on the store and not
inside a collective: a rollout may take longer than any sensible collective timeout, and a rank that waits on the store
can be told to stop. Keys are deleted: commands and answers when rank 0 has the answers, taken/N when all have read it
(`forget`), what workers tell each other when all of them have answered.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.stopping import StepAbandoned
from fp8slurm.run.timeline import Answered
from fp8slurm.sync.groups import Group

Part = tuple[torch.Tensor, Sequence[int]]
"""uint8 [bytes], and the training ranks that get them."""

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
        self.answered: list[Answered] = []
        """Rank 0: of commands and their answers, since taken last."""
        self._posted = 0.0
        self.count = self._forgotten = 0
        self._progress = [0] * workers
        self._told = 0

    def post(self, kind: str, **arguments: Any) -> None:
        """Start a command in every rollout worker; `collect` waits for it."""
        self._posted = time.time()
        if self.group.rank == 0:
            self.store.set(f"command/{self.count}", json.dumps({"kind": kind, **arguments}))

    def collect(self, abandon: Callable[[], str] = lambda: "") -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Every rollout worker's answer and payload (uint8 [bytes]) to the command posted last.

        Raises:
            StepAbandoned: on all ranks, when `abandon`, called on rank 0 every second, gives a reason; workers go on.
        """
        taken = f"taken/{self.count}"
        if self.group.rank == 0:
            self.store.set(taken, json.dumps(self._gather(abandon)))
        self._wait(taken)
        said = json.loads(self.store.get(taken))
        if said["abandoned"]:
            raise StepAbandoned(said["abandoned"])
        answers = said["answers"]
        sizes = [answer["bytes"] for answer in answers]
        payload = torch.empty(sum(sizes), dtype=torch.uint8)
        parts = list(payload.split(sizes))
        if payload.numel():
            if self.group.rank == 0:
                arriving = [self.group.start_receive(part, self.ranks + w) for w, part in enumerate(parts) if len(part)]
                for each in arriving:
                    each.wait()
            self.group.broadcast(payload, 0)
        self.heartbeat()
        self.count += 1
        return list(zip(answers, parts))

    def _gather(self, abandon: Callable[[], str]) -> dict[str, Any]:
        """Rank 0: all workers' answers, or why nobody waits for them any longer."""
        answers = []
        for worker in range(self.workers):
            key = f"answer/{self.count}/{worker}"
            reason = self._wait(key, abandon)
            if reason:
                return {"abandoned": reason}
            answers.append(json.loads(self.store.get(key)))
            if about := answers[-1].pop("about", None):
                engines = [[(float(b), float(e)) for b, e in spans] for spans in about["engines"]]
                times = self._posted, time.time(), about["taken"], about["answered"]
                self.answered.append(Answered(about["kind"], worker, *times, engines))
            self.store.delete_key(key)
        self.store.delete_key(f"command/{self.count}")
        return {"abandoned": "", "answers": answers}

    def receive(self, answers: list[dict[str, Any]], to: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
        """The parts that this rank gets from the workers that gave these answers, at once: [part][worker], uint8
        [bytes]. to: the ranks that get each part; parts of others are left out."""
        got = [[torch.empty(answer["parts"][i], dtype=torch.uint8) for answer in answers]
               for i, ranks in enumerate(to) if self.group.rank in ranks]  # fmt: skip
        arriving = [
            self.group.start_receive(tensor, self.ranks + worker)
            for part in got for worker, tensor in enumerate(part) if tensor.numel()
        ]  # fmt: skip
        for each in arriving:
            each.wait()
            self.heartbeat()
        return got

    def forget(self) -> None:
        """Rank 0, when all ranks are past the last `collect`: delete what everybody has read. A worker has read what
        was said about a command when it has answered the next one."""
        for number in range(self._forgotten, self.count - 1):
            self.store.delete_key(f"taken/{number}")
        self._forgotten = max(self._forgotten, self.count - 1)

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
        """Whether a rollout worker has counted further. A count that is written again keeps no hung job alive.

        Rank 0 looks at all workers and counts for the other ranks, which look at one name each.
        """
        if self.group.rank:
            moved = self.store.check([key := "progress/all"]) and (now := int(self.store.get(key))) > self._told
            self._told = now if moved else self._told
            return moved
        moved = False
        for worker, before in enumerate(self._progress):
            if self.store.check([key := f"progress/{worker}"]) and (now := int(self.store.get(key))) > before:
                self._progress[worker], moved = now, True
        if moved and self.ranks > 1:
            self._told += 1
            self.store.set("progress/all", str(self._told))
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
        self.engines_busy: Callable[[], list[list[tuple[float, float]]]] = list
        """When each engine had requests, since it was last called."""
        self._taken = "", 0.0
        self._telling: list[str] = []
        """Names that this worker has set for the other workers."""
        self._lock = threading.Lock()

    def next(self) -> dict[str, Any]:
        """The next command, waiting for it. To have nothing to do is no hang: meanwhile it gives heartbeats."""
        command = self.get(f"command/{self.count}")
        self._taken = command["kind"], time.time()
        return command

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

    def tell(self, key: str, value: str) -> None:
        """Set a name that the other workers read before they answer the present command."""
        self.store.set(key, value)
        self._telling.append(key)

    def answer(self, values: dict[str, Any], payload: torch.Tensor | None = None, parts: Sequence[Part] = ()) -> None:
        """Answer the command taken last; payload is uint8 [n] for all ranks, a part for those that it names."""
        size = 0 if payload is None else payload.numel()
        more: dict[str, Any] = {"parts": [part.numel() for part, _ in parts]} if parts else {}
        kind, taken = self._taken
        more["about"] = {"kind": kind, "taken": taken, "answered": time.time(), "engines": self.engines_busy()}
        self.store.set(f"answer/{self.count}/{self.number}", json.dumps({**values, "bytes": size, **more}))
        said = self.get(f"taken/{self.count}")  # the ranks may be training still (rollout.max_staleness)
        for key in self._telling:  # all workers have answered
            self.store.delete_key(key)
        self._telling = []
        if said["abandoned"]:  # nobody takes it: the run stops
            return
        if payload is not None and size:
            self.group.start_send(payload, 0).wait()
        everybody = sum(answer["bytes"] for answer in said["answers"])
        if everybody:  # a broadcast is every member's business
            self.group.broadcast(torch.empty(everybody, dtype=torch.uint8), 0)
        sending = [self.group.start_send(part, rank) for part, ranks in parts for rank in ranks if part.numel()]
        for each in sending:
            each.wait()
            self.heartbeat()
        self.count += 1
