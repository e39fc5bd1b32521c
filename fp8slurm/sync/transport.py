"""How an engine is told of a bucket, and the way through the host: one group on loopback, in which this process is rank
0 and the engine's ranks are 1 to tensor_parallel_size. The other ways: sync/mapped.py, sync/direct.py."""

from __future__ import annotations

import itertools
import logging
import os
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist

from fp8slurm.engine.client import EngineClient
from fp8slurm.engine.inside.recorded import KNOWN, Form, bucket_id, delta_name
from fp8slurm.engine.server import EngineError
from fp8slurm.sync.bucket import Delta, WeightBucket, WeightSpec, payload_bytes
from fp8slurm.sync.groups import listen

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT = timedelta(seconds=120)
_numbers = itertools.count()


class Transport(ABC):
    """Carries buckets into one engine."""

    def __init__(self) -> None:
        self.seconds = {"handover": 0.0, "load": 0.0}
        """Since last cleared: until the engine had the bytes, and from then until it had loaded them."""
        self._client: EngineClient | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine-link")
        self._loading: Future[None] = Future()
        self._told: set[str] = set()
        """Buckets that this engine has had: their tensors need no more naming."""
        self._ids: dict[int, tuple[tuple[WeightSpec, ...], str]] = {}
        """Python's id of a bucket's specs, which are the same object in every update -> (specs, the bucket's id)."""
        self.number: int | None = None
        """The update that this engine has whole (WeightBucket.number); set by its link."""
        self._refused: list[str] | None = None

    def announce(self, specs: tuple[WeightSpec, ...]) -> list[Form]:
        """What the engine is told of a bucket: its tensors the first time, and only its id after that."""
        bucket = self._id(specs)
        if bucket in self._told:
            return [(KNOWN + bucket, "uint8", (payload_bytes(specs),), 0)]
        self._told.add(bucket)
        return [spec.form for spec in specs]

    def announce_changes(self, specs: tuple[WeightSpec, ...], change: Delta) -> list[Form]:
        """What the engine is told of changes to a bucket that it has."""
        name = delta_name(self._id(specs), change.changed, change.checksum)
        return [(name, "uint8", (change.payload.numel(),), 0)]

    def changes_refused(self) -> list[str]:
        """Why the engine takes no changes alone, once it has loaded an update; [] if it does. It is asked once."""
        assert self._client is not None, "open() comes first"
        if self._refused is None:
            self._refused = self._client.changes_refused()
            if self._refused:
                log.warning("%s gets whole buckets: %s", self._client.url, self._refused[0])
        return self._refused

    def _id(self, specs: tuple[WeightSpec, ...]) -> str:
        if id(specs) not in self._ids:
            self._ids[id(specs)] = specs, bucket_id(spec.form for spec in specs)
        return self._ids[id(specs)][1]

    def open(self, client: EngineClient, tensor_parallel_size: int) -> None:
        """Get ready. Raises EngineError if the engine does not take part."""
        self._told.clear()
        self.number = self._refused = None
        self._client = client

    @abstractmethod
    def start(self, bucket: WeightBucket) -> None:
        """Begin to have the engine load a bucket; one at a time."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until the bucket under way is loaded: its payload may be overwritten then. Raises EngineError."""

    def failed(self, why: str) -> None:  # noqa: B027 - what others learn of it, if anything
        """The engine failed in an update."""

    def close(self, engine_answers: bool) -> None:
        """Give everything up; `engine_answers`: whether the engine is to be told."""
        self._client = None


class BroadcastTransport(Transport):
    """The engine is told by HTTP what comes, then it comes as one broadcast over gloo."""

    backend = "gloo"

    def __init__(self) -> None:
        super().__init__()
        self._group: dist.ProcessGroup | None = None
        self._store: dist.TCPStore | None = None
        self._name = ""

    def open(self, client: EngineClient, tensor_parallel_size: int) -> None:
        assert self._group is None, "the transport is open"
        super().open(client, tensor_parallel_size)
        size = 1 + tensor_parallel_size
        self._name = f"fp8slurm-{os.getpid()}-{next(_numbers)}"
        listener = listen(LOOPBACK)  # a TCPStore by itself listens on every interface
        port = listener.getsockname()[1]
        fd = listener.detach()
        self._store = dist.TCPStore(
            LOOPBACK, port, is_master=True, wait_for_workers=False, timeout=JOIN_TIMEOUT, master_listen_fd=fd
        )
        own_keys = self._store.num_keys()
        joining = self._pool.submit(client.join_group, self._name, port, size, self.backend)
        while not joining.done() and self._store.num_keys() == own_keys:
            time.sleep(0.01)
        if joining.done():  # it cannot have joined without us: the group would wait in vain for an engine that is gone
            joining.result()
        try:
            self._group = engine_group(self._store, self._name, size, self.backend)
            joining.result()
        except RuntimeError as error:
            raise EngineError(f"{client.url} did not join the weight group: {error}") from error

    def start(self, bucket: WeightBucket) -> None:
        assert self._client is not None and self._group is not None, "open() comes first"
        change, payload = bucket.delta, bucket.payload
        if change is not None and change.base == self.number and not self.changes_refused():
            forms, payload = self.announce_changes(bucket.specs, change), change.payload
        else:
            forms = self.announce(bucket.specs)
        self._times = times = [time.perf_counter()]
        self._loading = self._pool.submit(self._client.receive_bucket, self._name, forms)
        self._loading.add_done_callback(lambda _: times.append(time.perf_counter()))
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._sending = self._group.broadcast([payload], options)
        self._sending.get_future().add_done_callback(lambda _: times.append(time.perf_counter()))

    def finish(self) -> None:
        self._loading.result()  # before the broadcast: an engine that refuses or dies never takes part in it
        self._sending.wait()
        began, arrived = self._times[0], min(self._times[1:], default=self._times[0])
        self.seconds["handover"] += arrived - began
        self.seconds["load"] += max(self._times) - arrived

    def close(self, engine_answers: bool) -> None:
        if self._group is not None and self._client is not None and engine_answers:
            self._leave(self._client, self._group)
        self._group = self._store = None

    def _leave(self, client: EngineClient, group: dist.ProcessGroup) -> None:
        client.leave_group(self._name)


def engine_group(
    store: dist.Store, name: str, size: int, backend: str, address: str = LOOPBACK, timeout: timedelta = JOIN_TIMEOUT
) -> dist.ProcessGroup:
    """Rank 0 of the group that SGLang's init_custom_process_group makes: its keys lie under the same prefixes.

    PrefixStore(name) is SGLang's (utils/common.py); name/ and the first device of the backend are those of torch's
    _new_process_group_helper. A bare group: torch.distributed's default group is neither needed nor touched.
    """
    device = next(iter(dist.distributed_c10d.BackendConfig(dist.Backend(backend)).get_device_backend_map()))
    for prefix in (name, f"{name}/", f"{device}/"):
        store = dist.PrefixStore(prefix, store)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, 0, size, options)  # type: ignore[return-value]
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, 0, size, options)  # type: ignore[return-value]
