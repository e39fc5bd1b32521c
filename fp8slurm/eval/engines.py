"""SGLang engines that take batches from one queue; one that dies is restarted, and its batches are asked again."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Callable, Sequence

from fp8slurm.engine.client import EngineClient, GenerateRequest, Generation
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.eval.asking import Wanted

log = logging.getLogger(__name__)

Answered = Callable[[list[Wanted], list[Generation]], None]


class Engines:
    """K engines of one model on this machine, started by `with`; EngineError: one of them cannot be kept alive."""

    def __init__(self, model: Path, log_dir: Path, settings: EngineSettings, count: int) -> None:
        """count 0: as many as the visible GPUs carry, one without GPUs. ValueError: more than that."""
        shares = gpu_shares(settings, count)
        self.settings, self.restarts = settings, 0
        self.engines = [
            Engine(model, log_dir, replace(settings, gpus=gpus), f"engine-{i}") for i, gpus in enumerate(shares)
        ]
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> Engines:
        try:
            for engine in self.engines:
                engine.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Block until all of them answer. EngineError: one died while starting, or was too slow."""
        for engine in self.engines:
            engine.wait_ready()

    def stop(self) -> None:
        self._stop.set()
        for engine in self.engines:
            engine.stop()

    def client(self, engine: Engine) -> EngineClient:
        return EngineClient(engine.url, engine.api_key, self.settings.section.request_timeout_s)

    def warm_up(self, request: GenerateRequest) -> None:
        """One token from every engine, so that no figure holds what only the first request costs."""
        for engine in self.engines:
            try:
                self.client(engine).generate([replace(request, max_tokens=1)], one_batch=True)
            except EngineError as error:  # `ask` brings it back
                log.warning("%s did not answer its first request: %s", engine.name, error)

    def ask(
        self, work: Sequence[list[Wanted]], request: Callable[[Wanted], GenerateRequest], answered: Answered
    ) -> None:
        """Have every batch answered: engines take the next one as soon as they have room.

        answered(batch, generations) is called from several threads. An engine that fails engine.max_restarts + 1
        times without an answer in between ends it all with EngineError; a refused request with ValueError.
        """
        queue = deque(work)
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=self._drive, args=(e, queue, request, answered, failures), name=e.name, daemon=True)
            for e in self.engines
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # so that Ctrl-C is heard
        if failures:
            raise failures[0]

    def _drive(
        self, engine: Engine, queue: deque, request: Callable, answered: Answered, failures: list[BaseException]
    ) -> None:
        """Thread of one engine: keeps it full until the queue is empty."""
        in_a_row = 0
        try:
            while queue and not failures and not self._stop.is_set():
                left, error, progress = self._until_it_fails(engine, queue, request, answered, failures)
                if error is None:
                    continue
                queue.extendleft(reversed(left))
                in_a_row = 1 if progress else in_a_row + 1
                if in_a_row > self.settings.section.max_restarts or self._stop.is_set():
                    raise error
                log.warning("%s failed, restart %d: %s", engine.name, in_a_row, str(error).splitlines()[0])
                with self._lock:
                    self.restarts += 1
                try:
                    engine.restart()
                except EngineError as again:
                    log.warning("%s did not come back: %s", engine.name, again)
        except BaseException as error:
            failures.append(error)

    def _until_it_fails(
        self, engine: Engine, queue: deque, request: Callable, answered: Answered, failures: list[BaseException]
    ) -> tuple[list[list[Wanted]], EngineError | None, bool]:
        """(batches that were on their way when the engine failed, why, whether any was answered before)."""
        client = self.client(engine)
        running: dict[Future, list[Wanted]] = {}
        most, progress = self.settings.section.max_running_requests, False
        with ThreadPoolExecutor(min(most, 1024)) as pool:
            while not failures and not self._stop.is_set():
                while queue and sum(map(len, running.values())) < most:
                    try:
                        batch = queue.popleft()
                    except IndexError:  # another engine took it
                        break
                    running[pool.submit(client.generate, [request(w) for w in batch], True)] = batch
                if not running:
                    return [], None, progress
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                failed = None
                for future in done:
                    try:
                        generations = future.result()
                    except EngineError as error:
                        failed = error
                        continue
                    answered(running.pop(future), generations)
                    progress = True
                if failed is not None:
                    if engine.alive():  # hung, or a broken answer: end the other requests too
                        engine.stop()
                    return self._rest(running, answered), failed, progress
            if not self._stop.is_set():  # another engine failed for good: nobody waits for these any more
                engine.stop()
        return [], None, progress

    def _rest(self, running: dict[Future, list[Wanted]], answered: Answered) -> list[list[Wanted]]:
        """Wait for what was on its way; the batches without an answer."""
        left = []
        for future, batch in running.items():
            if future.exception() is None:
                answered(batch, future.result())
            else:
                left.append(batch)
        return left


def gpu_shares(settings: EngineSettings, count: int) -> list[tuple | None]:
    """The GPUs of each engine (None without GPUs). ValueError: too few of them."""
    if settings.on_cpu:
        return [None] * max(1, count)
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (
        [n for n in visible.split(",") if n]
        if visible is not None
        else list(map(str, range(torch.cuda.device_count())))
    )
    each = settings.section.tensor_parallel_size
    if max(1, count) * each > len(names):
        raise ValueError(
            f"--engines {max(1, count)} of --engine.tensor-parallel-size {each} need {max(1, count) * each} GPUs; "
            f"{len(names)} are visible"
        )
    return [tuple(names[i * each : (i + 1) * each]) for i in range(count or len(names) // each)]
