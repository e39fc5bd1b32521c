"""The trainer's part of a checkpoint, in Megatron's torch_dist format: model, reference, optimizer, random state.

    Snapshot()   all ranks together: who writes what, and a copy of each rank's state in host memory
    write()      all ranks, in any thread: the optimizer's state goes to the ranks that write it, over groups of its
                 own; then every rank writes its own file
    finish()     rank 0: the index of all files
    load()       all ranks together; pickles in the folder are read as data, nothing of them is run

The caller makes the folder appear atomically.
"""

from __future__ import annotations

import functools
import io
import json
import queue
import random
import sys
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from fp8slurm.checkpoint.formats.torch_dist import read_metadata
from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.core.patches import patch, wrap
from fp8slurm.trainer import build, primary_fp8
from fp8slurm.trainer.optimizer_state import OptimizerShards, distributed_parts, planning, save_groups

if TYPE_CHECKING:
    from fp8slurm.trainer.trainer import Trainer

METADATA = {
    # The one layout of optimizer state that another TP, PP or DP can read.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}

SIZES = ("tensor", "context", "pipeline", "data", "expert", "expert_tensor")
"""Of the groups in `layout`."""


class Snapshot:
    """This rank's part of a checkpoint as it is now: training may go on while it is written."""

    def __init__(self, trainer: Trainer, path: Path, copy: bool = True) -> None:
        """Made on all ranks together, for the existing, empty folder `path`; nothing is written yet.

        copy: False takes tensors in host memory as they are; they must not change until `write` returns.
        """
        self.path = Path(path)
        parts = distributed_parts(trainer.optimizer)
        if trainer not in _groups:
            _groups[trainer] = save_groups(parts)
        with planning(parts) as self._owners:
            state = _state(trainer, False, True, trainer.reference is not None)
            state["layout"] = layout(trainer)
            self._writer, self._metadata, self._format = _plan(state, self.path)
        for _, _, (_, tensors) in self._writer.write_buckets:
            for i, (item, tensor) in enumerate(tensors):
                tensors[i] = (item, tensor if tensor.is_meta else tensor.to("cpu", copy=copy))
        self._shards = OptimizerShards(parts, _groups[trainer])
        self.most_bytes = 0
        """Known once it is written: the most host memory that tensors took on this rank, copies included."""

    def write(self) -> bytes:
        """Write this rank's file to the disk and free the copy; what `finish` has to know, also where that failed.

        On all ranks, each in a thread of its choice, and not while another snapshot is written.
        """
        writer, entries = self._writer, []
        items = [tensors for _, _, (_, tensors) in writer.write_buckets]
        assert len(items) <= 1, "one file a rank"
        self.most_bytes = self._shards.complete(items[0] if items else [], self._owners)
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        buckets, writer.write_buckets = writer.write_buckets, []
        for number, bucket in enumerate(buckets):
            _, results = writer.write_preloaded_data(transforms, number, bucket, None, None, use_fsync=True)
            if isinstance(results, Exception):
                return zlib.compress(json.dumps({"error": _first_cause(results)}).encode())
            for r in results:
                where = r.storage_data
                assert where.transform_descriptors is None
                offset = None if r.index.offset is None else list(r.index.offset)
                place = [where.relative_path, where.offset, where.length]
                entries.append([r.index.fqn, offset, r.index.index, r.size_in_bytes, *place])
        return zlib.compress(json.dumps({"items": entries}).encode())

    def finish(self, written: list[bytes]) -> None:
        """Rank 0, when all ranks have written: `written` is what their `write` returned, in the order of the ranks.

        Raises:
            OSError: a rank could not write, or the index cannot be written (disk full).
        """
        from megatron.core.dist_checkpointing.core import save_config
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.storage import WriteResult

        ranks = [json.loads(zlib.decompress(text)) for text in written]
        failures = [f"rank {i}: {rank['error']}" for i, rank in enumerate(ranks) if "error" in rank]
        if failures:
            raise OSError("; ".join(failures))

        def result(name: str, offset: Any, index: Any, size: int, *place: Any) -> WriteResult:
            return WriteResult(MetadataIndex(name, offset, index), size, _StorageInfo(*place))

        self._writer.finish(self._metadata, [[result(*item) for item in rank["items"]] for rank in ranks])
        save_config(self._format, str(self.path))


def _first_cause(error: BaseException) -> str:
    """An error by the first OSError behind it: torch answers a write that fails with an `unexpected pos` of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return str(cause or error) or type(cause or error).__name__


_groups: weakref.WeakKeyDictionary[Trainer, list[Any]] = weakref.WeakKeyDictionary()
"""What `OptimizerShards` sends over: made with the first snapshot, by all ranks together."""


def _plan(state: dict[str, Any], path: Path) -> tuple[Any, Any, Any]:
    """Megatron's plan of a save: (this rank's writer with its tensors, metadata on rank 0, format). All ranks together.

    Megatron's own asynchronous save agrees through collectives of the default group, which belongs to the next step
    by then: only its planning and its writer are used.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    # For what a writer hands over between processes; the default is a process of its own, which takes seconds to start
    # and imports the main module again.
    if filesystem_async._results_queue is None:
        patch(filesystem_async, "_results_queue", queue.Queue())
    kept: list[Any] = []

    class Planning(TorchDistSaveShardedStrategy):
        def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, async_strategy: str) -> AsyncRequest:
            kept.extend((writer, planned[1]))
            return AsyncRequest(None, (), [])

    strategy = Planning()
    dist_checkpointing.save(
        state, str(path), sharded_strategy=strategy, async_sharded_save=True, async_strategy="mcore"
    )
    return kept[0], kept[1], CheckpointingConfig(strategy.backend, strategy.version)


def load(trainer: Trainer, path: Path) -> bool:
    """Take over a folder that a Snapshot wrote, in this or (with optim.distributed) another layout; whether a reference
    came with it.

    InputError where that cannot be: another kind of optimizer, another dtype, another layout without optim.distributed.
    BadCheckpoint: its metadata or a pickle in it is damaged, or would run something.
    """
    from torch.distributed.checkpoint import CheckpointException

    with _read_as_data(Path(path)):
        try:
            return _load(trainer, path)
        except CheckpointException as error:  # of several ranks, each with its own
            for failure, *_ in error.failures.values():
                if isinstance(failure, BadCheckpoint):
                    raise failure from None
            raise


@contextmanager
def _read_as_data(path: Path) -> Iterator[None]:
    """Megatron and torch read this folder through the converters' restricted reader meanwhile.

    By themselves they unpickle .metadata and the objects in it (random state, the optimizer's settings), which may call
    anything. BadCheckpoint.
    """
    _restrict_torch()
    _metadata[str(path)] = read_metadata(path)[0]
    try:
        yield
    finally:
        _metadata.clear()


_metadata: dict[str, Any] = {}
"""Of the folder that is being loaded: torch asks for it several times."""


@functools.cache
def _restrict_torch() -> None:
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    def accepted_metadata(reader: Any) -> Any:
        metadata = _metadata[str(reader.path)]
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    patch(FileSystemReader, "read_metadata", accepted_metadata)

    @wrap(DefaultLoadPlanner, "load_bytes")
    def load_bytes(load: Callable[..., None], planner: Any, item: Any, value: Any) -> None:
        _check_object(item.storage_index.fqn, value)
        load(planner, item, value)


def _check_object(name: str, saved: io.BytesIO) -> None:
    try:
        with torch.serialization.safe_globals(_optimizers()):
            torch.load(saved, weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise BadCheckpoint(f"{name} is no data that can be read: {error}") from None
    saved.seek(0)


def _optimizers() -> list[Any]:
    """Classes that Megatron saves with optim.cpu_offload: which optimizer steps on the host, and which on the GPU."""
    engine = sys.modules.get("transformer_engine.pytorch.optimizers")
    return [torch.optim.AdamW, torch.optim.Adam, *([engine.FusedAdam] if engine is not None else [])]


def _load(trainer: Trainer, path: Path) -> bool:
    from megatron.core import dist_checkpointing

    saved = {"moments": "float32", "context": 1} | dist_checkpointing.load_common_state_dict(str(path))["layout"]
    now = {"context": 1} | layout(trainer)
    for key, flag in (
        ("distributed_optimizer", "--optim.distributed"),
        ("dtype", "--model.dtype"),
        ("moments", "--optim.moments"),
    ):
        if saved[key] != now[key]:
            raise InputError(f"{path} was saved with {flag} {saved[key]}, this run has {now[key]}: they must be equal")
    same = all(saved[k] == now[k] for k in SIZES)
    if not trainer.config.optim.distributed and not same:
        raise InputError(
            f"{path} was saved with {_shown(saved)}, this run has {_shown(now)}: without --optim.distributed only the "
            f"same layout can be resumed"
        )
    with_reference = saved["reference"] and trainer.config.algorithm.kl_coef > 0  # else nobody asks it
    if with_reference and trainer.reference is None:
        trainer.snapshot_reference()  # of whatever is there: the saved one is loaded into it
    state = dist_checkpointing.load(_state(trainer, True, same, with_reference), str(path))
    trainer.module.load_state_dict(state["model"])
    for parameter in filter(primary_fp8.is_primary, trainer.module.parameters()):
        primary_fp8.refresh(parameter)
    trainer.optimizer.load_state_dict(_regrouped(trainer, state["optimizer"]))
    if with_reference:
        _inner(trainer.reference).load_state_dict(state["reference"])
    if same:
        _set_random_state(state["random"])
    return with_reference


def _regrouped(trainer: Trainer, loaded: dict[Any, Any]) -> Any:
    """The loaded optimizer state in the form that this layout's optimizer has.

    Experts that are sharded otherwise than the rest have an optimizer of their own, and Megatron then nests the state
    by the optimizer's number: {0: ..., 1: ...} instead of {...}. Its load_state_dict refuses the other form (KeyError,
    or a wrong count), although the tensors of both are the same. What is nested besides them is the parameter groups'
    settings, which are this run's own, and the number of steps, the same in all groups.
    """
    parts = trainer.optimizer.chained_optimizers
    chained_now, chained_then = len(parts) > 1, "optimizer" not in loaded
    if chained_now == chained_then:
        return loaded
    saved = loaded[0] if chained_then else loaded
    step = saved["optimizer"]["param_groups"][0]["step"]
    out = {}
    for i, part in enumerate(parts):
        tensors = (loaded[i] if chained_now else loaded)["param_state"]
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = step
        out[i] = own | {"param_state": tensors, "param_state_sharding_type": METADATA["distrib_optim_sharding_type"]}
    return out if chained_now else out[0]


def layout(trainer: Trainer) -> dict[str, Any]:
    """What `load` compares; without "context" there is no context parallelism."""
    p = trainer.config.parallel
    context = {"context": p.context_parallel_size} if p.context_parallel_size > 1 else {}
    return context | {
        "tensor": p.tensor_parallel_size,
        "pipeline": p.pipeline_parallel_size,
        "data": trainer.data_parallel_size,
        "expert": p.expert_parallel_size,
        "expert_tensor": p.expert_tensor_parallel_size,
        "distributed_optimizer": trainer.config.optim.distributed,
        "dtype": trainer.config.model.dtype,
        "moments": trainer.config.optim.moments,
        "reference": trainer.reference is not None,
    }


def _shown(saved: dict[str, Any]) -> str:
    return ", ".join(f"{k} {saved[k]}" for k in SIZES)


def _inner(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _state(trainer: Trainer, loading: bool, with_random_state: bool, with_reference: bool) -> dict[str, Any]:
    from megatron.core.dist_checkpointing import ShardedObject

    build.allocate_fused_state(trainer.optimizer)
    model = trainer.module.sharded_state_dict()
    state: dict[str, Any] = {
        "model": model,
        "optimizer": trainer.optimizer.sharded_state_dict(dict(model), is_loading=loading, metadata=dict(METADATA)),
    }
    if with_reference:
        state["reference"] = _inner(trainer.reference).sharded_state_dict(prefix="reference.")
        state["reference"] = {k.removeprefix("reference."): v for k, v in state["reference"].items()}
    if trainer.config.fp8.param_gather:  # after the optimizer's, which finds its parameters among the model's
        primary_fp8.in_bf16(model, None if loading else primary_fp8.Masters(trainer.optimizer).whole)
        primary_fp8.in_bf16(state.get("reference", {}), None if loading else primary_fp8.dequantized)
    if with_random_state:
        rank, world = dist.get_rank(), dist.get_world_size()
        state["random"] = ShardedObject("random_state", _random_state(), (world,), (rank,))
    return state


def _random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind, keys, position, has_gauss, cached = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
