"""The last hop of a weight update: from the node's agent into its engine, through a gloo group on loopback.

One update, as a state machine; whatever fails in it leaves the link broken, the server paused and never asked again:

    paused -> session open -> for every bucket: (POST in a thread | broadcast) -> session closed -> version -> running

A session that ends has the server post-process its quantized layers. Servers without sessions skip those two states.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Iterable

import torch
import torch.distributed as dist

from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.digest import expected_digests, first_difference
from fp8slurm.engine.server import EngineError
from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.groups import listen

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT = timedelta(seconds=120)
_numbers = itertools.count()


class EngineLink:
    """Feeds one engine. Rank 0 of the group is this process, ranks 1 to tensor_parallel_size are the engine's."""

    def __init__(self, client: EngineClient, tensor_parallel_size: int = 1) -> None:
        self.client, self.tensor_parallel_size = client, tensor_parallel_size
        self.broken: str | None = None
        self._group: dist.ProcessGroupGloo | None = None
        self._store: dist.TCPStore | None = None
        self._name = ""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine-link")

    def open(self) -> None:
        """Make the group. Raises EngineError if the engine does not join."""
        assert self._group is None, "the link is open"
        self._name = f"fp8slurm-{os.getpid()}-{next(_numbers)}"
        size = 1 + self.tensor_parallel_size
        listener = listen(LOOPBACK)  # a TCPStore by itself listens on every interface
        port = listener.getsockname()[1]
        fd = listener.detach()
        self._store = dist.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=JOIN_TIMEOUT, master_listen_fd=fd
        )
        own_keys = self._store.num_keys()
        joining = self._pool.submit(self.client.join_group, self._name, port, size, "gloo")
        while not joining.done() and self._store.num_keys() == own_keys:
            time.sleep(0.01)
        if joining.done():  # it cannot have joined without us: the group would wait in vain for an engine that is gone
            joining.result()
        try:
            self._group = _gloo_group(self._store, self._name, size)
            joining.result()
        except RuntimeError as error:
            raise EngineError(f"{self.client.url} did not join the weight group: {error}") from error

    def close(self) -> None:
        """Give the group up, also when the engine is gone."""
        if self._group is not None and self.broken is None:
            try:
                self.client.leave_group(self._name)
            except EngineError as error:
                log.debug("closing the link: %s", error)
        self._group = self._store = None

    def reopen(self, client: EngineClient) -> None:
        """Link up with a restarted engine."""
        self.close()
        self.client, self.broken = client, None
        self.open()

    def update(
        self, version: int, buckets: Iterable[WeightBucket], verify: bool = False
    ) -> list[dict[str, str]] | None:
        """Load `buckets` (a whole model, in Hugging Face names) into the engine under `version`.

        verify: compare the raw bytes in the engine with what was sent, before anything is generated (keeps the buckets
        until then), and return the engine's digests. Raises EngineError on any failure; the engine then has to be
        restarted and the link reopened.
        """
        if self.broken is not None:
            raise EngineError(f"{self.client.url} needs a restart: {self.broken}")
        assert self._group is not None, "open() comes first"
        sent = []
        try:
            self.client.pause("retract")
            session = self.client.begin_update()
            for bucket in buckets:
                assert bucket.version == version, f"bucket of version {bucket.version} in update {version}"
                self._send(bucket)
                if verify:
                    sent.append(bucket)
            if session:
                self.client.end_update()
            digests = self.verify(sent) if verify else None
            self.client.flush_cache()
            self.client.set_weight_version(version)
            self.client.resume()
            return digests
        except BaseException as error:
            self._break(f"the update to version {version} failed: {error}")
            raise

    def verify(self, buckets: Iterable[WeightBucket]) -> list[dict[str, str]]:
        """Compare codes, scales and all other parameters in the engine, byte by byte, with these buckets.

        Returns the engine's digests, a dict for every tensor-parallel rank. Raises EngineError naming the first
        parameter that differs, and breaks the link.
        """
        config = json.loads((Path(self.client.model_info()["model_path"]) / "config.json").read_text())
        expected = expected_digests(
            (pair for bucket in buckets for pair in bucket.views()),
            num_key_value_heads=config["num_key_value_heads"],
            tensor_parallel_size=self.tensor_parallel_size,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            dtype=getattr(torch, self.client.server_info()["dtype"]),
        )
        held = self.client.digest()
        difference = first_difference(held, expected)
        if difference is not None:
            self._break(difference)
            raise EngineError(f"the weights in {self.client.url} are not those that were sent: {difference}")
        return held

    def _send(self, bucket: WeightBucket) -> None:
        names = [spec.name for spec in bucket.specs]
        dtypes = [str(spec.dtype).removeprefix("torch.") for spec in bucket.specs]
        shapes = [list(spec.shape) for spec in bucket.specs]
        loading = self._pool.submit(self.client.receive_bucket, self._name, names, dtypes, shapes)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        sending = self._group.broadcast([bucket.payload], options)
        loading.result()  # before the broadcast: an engine that refuses or dies never takes part in it
        sending.wait()

    def _break(self, reason: str) -> None:
        self.broken = reason
        self.client.quarantine(reason)


def _gloo_group(store: dist.Store, name: str, size: int) -> dist.ProcessGroupGloo:
    """Rank 0 of the group that SGLang's init_custom_process_group makes: its keys lie under the same prefixes.

    PrefixStore(name) is SGLang's (utils/common.py); name/ and the first device of the backend are those of torch's
    _new_process_group_helper. A bare group: torch.distributed's default group is neither needed nor touched.
    """
    device = next(iter(dist.distributed_c10d.BackendConfig(dist.Backend("gloo")).get_device_backend_map()))
    for prefix in (name, f"{name}/", f"{device}/"):
        store = dist.PrefixStore(prefix, store)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = JOIN_TIMEOUT
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    return dist.ProcessGroupGloo(store, 0, size, options)
