"""One engine's weight updates: the session with the server, and what keeps a failed one from being served.

One update, as a state machine; whatever fails in it leaves the link broken, the server paused and never asked again:

    paused -> session open -> every bucket loaded -> session closed -> (bytes compared) -> version -> running

A session that ends has the server post-process its quantized layers. Servers without sessions (SGLang before 0.5.21)
skip those two states; which kind a server is, it is asked once (EngineClient.begin_update).

Pause modes: `abort` ends what is being generated, with what there is; `retract` puts it back into the queue, and it
goes on under the new weights, its keys and values computed anew; `in_place` goes on with the keys and values of the old
weights."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from fp8slurm.core.files import read_json
from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.engine.server import EngineError
from fp8slurm.sync.bucket import WeightBucket, payload_bytes
from fp8slurm.sync.transport import BroadcastTransport, Transport

log = logging.getLogger(__name__)

PauseMode = Literal["abort", "retract", "in_place"]


Digests = list[dict[str, str]]
"""Of every parameter, a dict for every tensor-parallel rank (engine/inside/digest.py)."""


class Expected:
    """What the engines of a node should hold after one update: computed by the first that asks, for all of them.

    They are alike (one folder, dtype and parallel layout), and their links have the same buckets.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digests: Digests | None = None

    def get(self, compute: Callable[[], Digests]) -> Digests:
        with self._lock:
            if self._digests is None:
                self._digests = compute()
            return self._digests


class EngineLink:
    """Feeds one engine through a transport (gloo unless another is given)."""

    def __init__(
        self,
        client: EngineClient,
        tensor_parallel_size: int = 1,
        transport: Transport | None = None,
        pause_mode: PauseMode = "retract",
        expert_parallel_size: int = 1,
    ) -> None:
        """The sizes are the engine's."""
        self.expert_parallel_size = expert_parallel_size
        self.client, self.tensor_parallel_size, self.pause_mode = client, tensor_parallel_size, pause_mode
        self.transport = BroadcastTransport() if transport is None else transport
        self.broken: str | None = None
        self._is_open = False
        self.seconds: dict[str, float] = {}
        """Of the last update: receive (waiting for buckets), handover and load (sync/transport.py; both overlap with
        receive), session (the server's calls around them), verify."""
        self.counts: dict[str, int] = {}
        """Of the last update: bytes loaded, into each of the engine's ranks, and buckets, as in traffic.Traffic."""

    def open(self) -> None:
        """Get the transport ready. Raises EngineError if the engine does not take part."""
        self.transport.open(self.client, self.tensor_parallel_size)
        self._is_open = True

    def close(self) -> None:
        """Give the transport up, also when the engine is gone."""
        try:
            self.transport.close(engine_answers=self.broken is None)
        except EngineError as error:
            log.debug("closing the link: %s", error)
        self._is_open = False

    def update(
        self, version: int, buckets: Iterable[WeightBucket], verify: bool = False, expected: Expected | None = None
    ) -> Digests | None:
        """Load `buckets` (a whole model, in Hugging Face names) into the engine under `version`.

        While a bucket is loaded the next is asked for, and no further one. verify: compare the raw bytes in the engine
        with what was sent, before anything is generated (the buckets' payloads must last until then), and return the
        engine's digests. expected: this update's, where several links share it. Raises EngineError on any failure; the
        engine then has to be restarted, and gets another link.
        """
        if self.broken is not None:
            raise EngineError(f"{self.client.url} needs a restart: {self.broken}")
        assert self._is_open, "open() comes first"
        self.seconds = dict.fromkeys(("receive", "handover", "load", "session", "verify"), 0.0)
        self.counts = {"loaded": 0, "buckets": 0}
        self.transport.seconds = {"handover": 0.0, "load": 0.0}
        sent = []
        number = 0
        try:
            with self._timed("session"):
                self.client.pause(self.pause_mode)
                session = self.client.begin_update()
            incoming = iter(buckets)
            while True:
                with self._timed("receive"):
                    bucket = next(incoming, None)
                if self.counts["buckets"]:
                    self.transport.finish()
                if bucket is None:
                    break
                number = bucket.number
                assert bucket.version == version, f"bucket of version {bucket.version} in update {version}"
                self.transport.start(bucket)
                self.counts["loaded"] += payload_bytes(bucket.specs)
                self.counts["buckets"] += 1
                if verify:
                    sent.append(bucket)
            self.seconds |= self.transport.seconds
            with self._timed("session"):
                if session:
                    self.client.end_update()
            with self._timed("verify"):
                digests = self.verify(sent, expected) if verify else None
            with self._timed("session"):
                self._flush(session)
                self.client.set_weight_version(version)
                self.client.resume()
            self.transport.number = number
            return digests
        except BaseException as error:
            self._break(f"the update to version {version} failed: {error}")
            raise

    def verify(self, buckets: Iterable[WeightBucket], expected: Expected | None = None) -> Digests:
        """Compare codes, scales and all other parameters in the engine, byte by byte, with these buckets.

        expected: as in update. Returns the engine's digests. Raises EngineError naming the first parameter that
        differs, and breaks the link."""
        config = read_json(Path(self.client.model_info()["model_path"]) / "config.json")
        dtype = getattr(torch, self.client.server_info()["dtype"])
        with ThreadPoolExecutor(1) as pool:  # the engine computes its digests meanwhile
            answer = pool.submit(self.client.digest)
            right = (expected or Expected()).get(
                lambda: expected_digests(
                    (pair for bucket in buckets for pair in bucket.views()),
                    num_key_value_heads=config["num_key_value_heads"],
                    tensor_parallel_size=self.tensor_parallel_size,
                    expert_parallel_size=self.expert_parallel_size,
                    tie_word_embeddings=config.get("tie_word_embeddings", False),
                    dtype=dtype,
                )
            )
            held = answer.result()
        difference = first_difference(held, right)
        if difference is not None:
            self._break(difference)
            raise EngineError(f"the weights in {self.client.url} are not those that were sent: {difference}")
        return held

    def _flush(self, session: bool) -> None:
        """Forget what was computed from the old weights. Servers without sessions refuse that while requests wait."""
        try:
            self.client.flush_cache(if_idle=self.pause_mode == "in_place")
        except EngineError as error:
            if session or self.pause_mode != "retract":
                raise
            why = "SGLang before 0.5.21 keeps cached keys and values while retracted requests wait"
            raise EngineError(f"{error} ({why}; use --sync.pause-mode abort)") from error

    def _break(self, reason: str) -> None:
        self.broken = reason
        self.client.quarantine(reason)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start
