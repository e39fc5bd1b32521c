"""What the engine's own processes get on top of SGLang, on GPUs and CPUs alike (docs/patches.md)."""

from __future__ import annotations

import functools
import importlib
import json
import tempfile
from typing import Any

from fp8slurm.core.patches import patch, wrap
from fp8slurm.engine.inside import kv_cache
from fp8slurm.engine.inside.digest import CHANGES_ACTION, DIGEST_ACTION, overall, raw_digests
from fp8slurm.engine.inside.recorded import RECORDED, FlatBucket, load_bucket, loads_of, refusals
from fp8slurm.models.families import FAMILIES


@functools.cache
def apply() -> None:
    """Patch SGLang in this process, once: a forked process has its parent's patches."""
    from sglang.srt.managers import load_snapshot

    # answers the load statistics' file in /dev/shm, which stays there when a server is killed: the engine's temporary
    # folder goes with it
    patch(load_snapshot, "shm_path_for", lambda ipc_name: f"{tempfile.gettempdir()}/loads")
    _add_raw_digest()
    _finish_loads()
    _finish_before_release()
    _clear_padding_after_waking()
    _load_block_scales()
    _record_loads()


def _add_raw_digest() -> None:
    """Teach /weights_checker the action "raw_digest": sha256 of the bytes of every parameter, on every rank;
    and an action that says which buckets take no changes.

    SGLang's own checksums are of weights dequantized to BF16, which hides a scale that is off by one ulp.
    """
    import torch
    from sglang.srt.utils.weight_checker import WeightChecker

    @wrap(WeightChecker, "handle")
    def handle(original: Any, self: Any, action: str, *args: Any, **kwargs: Any) -> Any:
        if action not in (DIGEST_ACTION, CHANGES_ACTION):
            return original(self, action, *args, **kwargs)
        role = {"role": kwargs["role"]} if "role" in kwargs else {}  # older servers know no roles
        where = self._parallelism_info(**role).model_dump()
        if action == CHANGES_ACTION:
            texts = {str(i): why for i, why in enumerate(refusals(self._get_model()))}
            return {"checksums": texts, "per_gpu_checksum": "", "parallelism_info": where}
        if torch.cuda.is_available():  # the digests' threads copy on a stream of theirs, which waits for no other
            torch.cuda.synchronize()
        model = self._get_model()
        parameters = dict(model.named_parameters())
        makes = [functools.partial(parameters.__getitem__, name) for name in parameters]
        checksums = dict(zip(parameters, raw_digests(makes)))
        whole = overall(checksums)
        # the server passes nothing on but these three, of which only the first is a dict of texts
        checksums[RECORDED] = json.dumps([load.replays for load in loads_of(model).values()])
        return {"checksums": checksums, "per_gpu_checksum": whole, "parallelism_info": where}


def _finish_loads() -> None:
    """Answer that a bucket is loaded when it is, not when its broadcast and its copies are queued on the GPU.

    The sender overwrites the memory that it shares as soon as it has the answer. Of a broadcast, the answer would come
    before the bytes: an engine whose sender gives up would say that it has a whole update, and nobody would restart it.
    And a load begins when nothing reads the weights any more: after a pause "in_place" the last batch may still do.
    """
    import torch
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    if not torch.cuda.is_available():
        return

    def load(original: Any, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.synchronize()
        result = original(*args, **kwargs)
        torch.cuda.synchronize()
        return result

    # with sessions (0.5.21) receiving and loading a broadcast are two methods, before them one
    distributed = ("load_weights_from_distributed", "update_weights_from_distributed")
    for name in ("update_weights_from_tensor", next(n for n in distributed if hasattr(WeightUpdater, n))):
        wrap(WeightUpdater, name)(load)


def _finish_before_release() -> None:
    """Unmap memory when the GPU is done with it: a scheduler without requests may have queued work that is not
    finished.

    SGLang (0.5.16 to 0.5.23) waits for the GPU only afterwards; by then its last batch may have died of an illegal
    access."""
    import torch
    from sglang.srt.utils.torch_memory_saver_adapter import _TorchMemorySaverAdapterReal as Adapter

    @wrap(Adapter, "pause")
    def pause(original: Any, self: Any, tag: str) -> Any:
        torch.cuda.synchronize()
        return original(self, tag)


def _clear_padding_after_waking() -> None:
    """Zero the table of cache slots when its memory comes back, with whatever is in it then.

    Its row 0 stands for the requests that fill a batch up to the size of a CUDA graph: they read the slot that it
    names."""
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Manager

    @wrap(Manager, "resume_memory_occupation")
    def resume_memory_occupation(original: Any, self: Any, recv_req: Any) -> Any:
        result = original(self, recv_req)
        if self.memory_saver_adapter.enabled and (not recv_req.tags or "kv_cache" in recv_req.tags):
            self.scheduler.req_to_token_pool.req_to_token.zero_()
        return result


def _load_block_scales() -> None:
    """SGLang's Llama (0.5.21) looks for a block's scales under another name, warns that there is none, and serves
    without them; its Qwen2 has the same parameters and finds them."""
    from sglang.srt.models.llama import LlamaForCausalLM
    from sglang.srt.models.qwen2 import Qwen2ForCausalLM

    if hasattr(LlamaForCausalLM, "_legacy_load_weights"):  # versions before it have not been looked at
        patch(LlamaForCausalLM, "_legacy_load_weights", Qwen2ForCausalLM._legacy_load_weights)


def _record_loads() -> None:
    """Buckets are loaded by the copies that SGLang made of them the first time (engine/inside/recorded.py)."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    def reconstruct_tensors(self: Any) -> FlatBucket:
        forms = [(m.name, str(m.dtype).removeprefix("torch."), tuple(m.shape), m.start_idx) for m in self.metadata]
        return FlatBucket(self.flattened_tensor, forms)

    def load_weights(original: Any, self: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(weights, FlatBucket):
            return load_bucket(self, weights, lambda model, pairs: load(original, model, pairs, True, *args, **kwargs))
        return load(original, self, weights, False, *args, **kwargs)

    def load(original: Any, model: Any, weights: Any, as_sent: bool, *args: Any, **kwargs: Any) -> Any:
        return original(model, kv_cache.take_scales(model, weights, as_sent), *args, **kwargs)

    patch(FlattenedTensorBucket, "reconstruct_tensors", reconstruct_tensors)
    for family in FAMILIES.values():
        model = getattr(importlib.import_module(family.engine_module), family.architecture)
        wrap(model, "load_weights")(load_weights)
