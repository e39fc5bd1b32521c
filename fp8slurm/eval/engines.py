"""The engines of an evaluation: as many as asked for, or as the visible GPUs carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fp8slurm.core.errors import InputError
from fp8slurm.engine.client import GenerateRequest
from fp8slurm.engine.pool import EnginePool, Member, WorkQueue, log
from fp8slurm.engine.server import Engine, EngineError, EngineSettings, visible_gpus
from fp8slurm.eval.nodes import SharedWorkQueue

T = TypeVar("T")


class Engines(EnginePool[Member]):
    """K engines of one model on this machine, started by `with`."""

    def __init__(self, model: Path, log_dir: Path, settings: EngineSettings, count: int) -> None:
        """count 0: as many as the visible GPUs carry, one without GPUs. InputError: more than that."""
        gpus = gpu_shares(settings, count)
        engines = [
            Engine(model, log_dir, replace(settings, gpus=names, share=(i, len(gpus))), f"engine-{i}")
            for i, names in enumerate(gpus)
        ]
        super().__init__([Member(engine, engine.name) for engine in engines], settings.section)
        self._shared: tuple[Path, int] | None = None

    def share(self, claims: Path, engines: int) -> None:
        """What is asked from now on is asked by several nodes, with so many engines: they claim it in this folder."""
        self._shared = claims, engines

    def queue_of(self, work: Sequence[list[T]]) -> WorkQueue[T]:
        if self._shared is None:
            return super().queue_of(work)
        return SharedWorkQueue(work, self.section.max_running_requests, *self._shared)

    def warm_up(self, request: GenerateRequest) -> None:
        """One token from every engine, so that no figure holds what only the first request costs."""
        for member in self.members:
            try:
                self.client(member.engine).generate([replace(request, max_tokens=1)], one_batch=True)
            except EngineError as error:  # `ask` restarts it
                log.warning("%s did not answer its first request: %s", member.title, error)


def gpu_shares(settings: EngineSettings, count: int) -> list[tuple[str, ...] | None]:
    """The GPUs of each engine (None without GPUs). InputError: too few of them."""
    if settings.on_cpu:
        return [None] * max(1, count)
    names = visible_gpus()
    each = settings.section.tensor_parallel_size
    if max(1, count) * each > len(names):
        raise InputError(
            f"--engines {max(1, count)} of --engine.tensor-parallel-size {each} need {max(1, count) * each} GPUs; "
            f"{len(names)} are visible"
        )
    return [tuple(names[i * each : (i + 1) * each]) for i in range(count or len(names) // each)]
