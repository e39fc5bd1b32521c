"""Which weights the engines have, as every training rank sees it.

    connect   what travels how is planned, and the rollout workers are told
    sync      the trainer's weights go to every engine, under a version: the number of steps taken
    sleep     engines give their memory back, and with it the weights
    ask       a command that needs weights: they are sent first where engines slept, and again where one lost them

Three ways (sync/): through the hosts, mapped where trainer and engine share a GPU, straight from GPU to GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_sleep
from fp8slurm.models.names import NameTable
from fp8slurm.models.precision import engine_quantization
from fp8slurm.rl.stopwatch import Stopwatch
from fp8slurm.rollout.channel import RankChannel
from fp8slurm.sync import paths
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.groups import Group
from fp8slurm.sync.plan import source_names
from fp8slurm.sync.receiver import checksum, forget_checksums, publish_checksums
from fp8slurm.sync.stream import Cut, Sender, WeightStream

VERIFIED_AT_FIRST = 2
"""Updates that sync.verify = "first" compares: SGLang's own load, the first as copies or as changes
(engine/inside/recorded.py)."""
Answers = list[tuple[dict[str, Any], torch.Tensor]]


class EngineWeights:
    """A training rank's end; all ranks make the same calls in the same order."""

    def __init__(
        self, config: RunConfig, trainer: Any, channel: RankChannel, store: dist.Store, address: str, attempt_dir: Path,
        watch: Stopwatch,
    ) -> None:  # fmt: skip
        self.config, self.trainer, self.channel, self.store = config, trainer, channel, store
        self.address, self.attempt_dir, self.watch = address, attempt_dir, watch
        self.sleeps = engines_sleep(config) and not config.control.freeze_engine
        self.sent_version: int | None = None
        """What all engines have; None: nothing, or not all of them."""
        self._figures: dict[str, float] = {}
        self._asleep = False
        self._sender = Sender()
        self._sends = self._verified = 0

    def connect(self) -> None:
        """Plan the updates, and tell the rollout workers."""
        c, t = self.config, self.trainer
        rank, size, group = t.expert_tensor_parallel
        self._stream = WeightStream(
            NameTable(t.spec, kv_scales=c.engine.kv_cache == "fp8"),
            t.named_shards, engine_quantization(c), c.sync.bucket_bytes,
            getattr(torch, c.engine.dtype),
            Cut(t.tensor_parallel_rank, t.tensor_parallel_size, t.tensor_parallel_group, t.replica_rank == 0),
            t.pipeline_parallel_rank,
            Cut(rank, size, group, t.expert_data_parallel_rank == 0), t.expert_parallel_rank,
        )  # fmt: skip
        if t.rank == 0:
            p = c.parallel
            names = source_names(p.pipeline_parallel_size, p.expert_parallel_size if t.spec.is_moe else 0)
            self.store.set("sync/sources", " ".join(names))
        for name in self._stream.sources:  # all plans before the first group: a rollout worker wants all of them first
            self.store.set(f"sync/plan/{name}", self._stream.describe(name))
            self.store.set(f"sync/root/{name}", str(t.rank))
        size = 1 + self.channel.workers
        self._groups = {n: Group(self.store, f"sync/{n}", 0, size, self.address) for n in self._stream.sources}
        self._sender = paths.sender(c, self.store, self._stream, self.address, self.attempt_dir)

    def sync(self, version: int) -> None:
        """Send the trainer's weights to every engine; once a version."""
        while version != self.sent_version:
            if self._send(version):
                self.sent_version = version

    def advance_scales(self) -> dict[str, float]:
        """The scales of an FP8 KV cache, from the step's own keys and values, for the next update; metrics of them."""
        return self.trainer.kv_scales.advance() if self.config.engine.kv_cache == "fp8" else {}

    def calibrate(self, version: int) -> None:
        """Before the first RL step: engines whose scales are a checkpoint's, or 1, get those of the tokens that the
        trainer has seen since, with the weights that they have."""
        if self.advance_scales() and self.config.engine.kv_scales == "calibrated":
            self.sent_version = None
            self.sync(version)

    def sleep(self) -> None:
        """Before the trainer works: the engines give their memory back, and with it the weights that they were sent."""
        if self.sleeps and not self._asleep:
            with self.watch.timed("sleep"):
                self.channel.call("sleep")
            self._asleep, self.sent_version = True, None

    def ask(self, kind: str, version: int, abandon: Callable[[], str] | None = None, **arguments: Any) -> Answers:
        """The rollout workers' answers to a command that needs the weights of `version`, or those that engines were
        sent last. Where an engine lost them they are sent again, and then the command.

        Raises:
            StepAbandoned: as RankChannel.collect.
            RuntimeError: weights are gone that the engines were to keep (control.freeze_engine).
        """
        if self._asleep:
            self.sync(version)
        self.post(kind, **arguments)
        return self.collect(kind, version, abandon, **arguments)

    def post(self, kind: str, **arguments: Any) -> None:
        """Have the rollout workers begin a command; `collect` comes before any other."""
        self.channel.post(kind, **arguments)

    def collect(self, kind: str, version: int, abandon: Callable[[], str] | None = None, **arguments: Any) -> Answers:
        """The answers to the command that was posted, as `ask` gives them."""
        while True:
            answers = self.channel.collect(abandon or (lambda: ""))
            if not any(a.get("weights_lost") for a, _ in answers):
                return answers
            if self.config.control.freeze_engine and version != self.sent_version:
                raise RuntimeError(
                    "--control.freeze-engine: an engine lost the weights that it was to keep; start the run anew"
                )
            self.sent_version = None
            self.sync(version)
            self.post(kind, **arguments)

    def take_figures(self) -> dict[str, float]:
        """Metrics of the last update since they were last taken; only sync.delta has any."""
        figures, self._figures = self._figures, {}
        return figures

    def close(self) -> None:
        """Give groups and files up."""
        self._sender.close()

    def _send(self, version: int) -> bool:
        """One update; False if an engine lost the weights meanwhile, and no copy was kept (sync.keep_last_update)."""
        self._sends += 1
        when = self.config.sync.verify
        verify = when == "always" or when == "first" and self._verified < VERIFIED_AT_FIRST
        checksums: dict[str, list[int]] = {name: [] for name in self._groups}

        def to_hosts(source: str, bucket: WeightBucket) -> dist.Work:
            whole, change = bucket.payload, bucket.delta
            if verify or change is None:
                whole = whole.cpu()
            if verify:
                checksums[source].append(checksum(whole))
            return self._groups[source].start_broadcast(whole if change is None else change.payload.cpu(), 0)

        def send() -> None:
            self._sender.send(self._sends, version, self._stream, to_hosts, verify)
            for source in self._groups if verify else ():
                publish_checksums(self.store, self._sends, source, checksums[source])

        with self.watch.timed("sync"):
            if self.sleeps:
                self.trainer.make_room()
            self._sender.prepare(self._command)
            answers = self._command("update", send, version=version, verify=verify, number=self._sends)
        for source in self._groups if verify else ():  # all have compared
            forget_checksums(self.store, self._sends, source)
        self._asleep = False
        lost = any(a.get("weights_lost") for a in answers)
        self._sender.done(self._sends, not lost)
        if self._sender.last is not None:
            self._figures = answers[0].get("figures", {})
            self.watch.spent("sync_compare", self._sender.last.seconds)
        self._verified += verify and not lost
        for part, seconds in self._stream.seconds.items():
            self.watch.spent(f"sync_{part}", seconds)
        for part in answers[0].get("seconds", ()):
            self.watch.spent(f"sync_{part}", max(a["seconds"][part] for a in answers if "seconds" in a))
        return not lost

    def _command(
        self, kind: str, meanwhile: Callable[[], None] = lambda: None, **arguments: Any
    ) -> list[dict[str, Any]]:
        """The rollout workers' answers to a command; meanwhile() is called while they work on it."""
        self.channel.post(kind, **arguments)
        meanwhile()
        return [answer for answer, _ in self.channel.collect()]
