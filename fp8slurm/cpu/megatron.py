"""Megatron-core on a machine without a GPU: its calls to CUDA are answered by the CPU; none of its maths is replaced.

`install` comes before the first `import megatron.core`. Every patch says which call of Megatron it answers;
docs/patches.md lists them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import types
from typing import Any

import torch

from fp8slurm.core.patches import note, patch, wrap

CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Apply all patches, once. RuntimeError where a GPU is in use, or where megatron.core was imported before."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU shim for Megatron must not be installed where a GPU is in use")
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before the CPU shim for it")
    _device_queries()
    _streams()
    _placement()
    _random_state()
    _missing_triton()
    _megatron()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _device_queries() -> None:
    # device=torch.cuda.current_device() wherever a tensor is made: a device object serves as well as an index.
    patch(torch.cuda, "current_device", lambda: CPU)
    # Barriers around checkpoints and pipeline exchanges: CPU operations are already done when they return.
    patch(torch.cuda, "synchronize", _nothing)
    # memory reports of the schedules and the checkpoint reader
    patch(torch.cuda, "reset_peak_memory_stats", _nothing)


class _Stream:
    """A stream and an event at once: everything on the CPU is done in order and at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__
    wait_stream = wait_event = synchronize = wait = record = _nothing

    def record_event(self, *args: Any) -> _Stream:
        return self

    def query(self) -> bool:
        return True


def _streams() -> None:
    # Overlapped gradient reduction, parameter gathers and the CPU-offloaded optimizer order their work by streams.
    for name in ("Stream", "Event", "current_stream", "default_stream"):
        patch(torch.cuda, name, _Stream)
    patch(torch.cuda, "stream", lambda s=None: contextlib.nullcontext())
    patch(torch.Tensor, "record_stream", _nothing)
    # profiler ranges in the attention and transformer layers
    for name in ("range_push", "range_pop"):
        patch(torch.cuda.nvtx, name, _nothing)


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _placement() -> None:
    # `with torch.device(...)` knows factories by identity, from a list made at its first use: it has to be made of the
    # real ones (transformers builds its models under such a context).
    importlib.import_module("torch.utils._device")._device_constructors()

    # torch.tensor(..., device="cuda") and its like, written out in the schedules, the optimizer and the MoE layers
    def make(factory: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        wrap(torch, name)(make)
    # tensor.cuda(), module.cuda() and tensor.to("cuda"): already where they belong
    for owner, name in ((torch.Tensor, "cuda"), (torch.Tensor, "pin_memory"), (torch.nn.Module, "cuda")):
        patch(owner, name, lambda self, *a, **k: self)

    @wrap(torch.Tensor, "to")
    def to_cpu(to: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *(CPU if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args), **kwargs)

    # The optimizers ask `param.type() == "torch.cuda.FloatTensor"` to sort parameters by dtype, and refuse others.
    @wrap(torch.Tensor, "type")
    def type_on_cuda(type_: Any, self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_(self, *args, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.", 1)


def _random_state() -> None:
    # Megatron's tracker of random states forks the CUDA generator: here the CPU's is the one that is used.
    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    patch(torch.cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))
    for module in (torch.cuda, torch.cuda.random):
        patch(module, "get_rng_state", get_state)
        patch(module, "set_rng_state", set_state)


def _missing_triton() -> None:
    # transformer/moe/paged_stash.py imports its Triton kernels unconditionally; they run on a GPU only. Where a real
    # triton is installed the import works by itself.
    if importlib.util.find_spec("triton") is None:
        kernels = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
        kernels.GLOBAL_BLOCK_SIZE = 1024  # type: ignore[attr-defined]
        kernels.paged_stash_copy_kernel = kernels.paged_stash_pop_kernel = None  # type: ignore[attr-defined]
        sys.modules[kernels.__name__] = kernels
        note(kernels.__name__)


def _megatron() -> None:
    """Patches of Megatron's own functions that branch on `.is_cuda` or on TransformerEngine's optimizer."""
    import megatron.core.models.common.embeddings.rope_utils as rope_utils
    import megatron.core.tensor_parallel.random as random
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    from fp8slurm.cpu import primary_fp8
    from fp8slurm.cpu.packed_attention import apply_packed_rotary

    # activation recomputation restores the CUDA generator through these two
    patch(random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state())
    patch(random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state))

    # The all-to-all dispatcher turns its split sizes into numpy only for tensors with `.is_cuda`.
    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    patch(dispatcher, "maybe_move_tensor_to_cpu", to_numpy)
    # a loop over the segments of a pack otherwise
    patch(rope_utils, "_apply_rotary_pos_emb_thd", apply_packed_rotary)
    _step_of_torch_adam()
    _offload_everything()
    primary_fp8.install()


def _step_of_torch_adam() -> None:
    """Without TransformerEngine the distributed optimizer wraps torch's AdamW, whose state has a `step` tensor.

    Megatron keeps the step in the parameter groups. Loading state then fails on the missing key, and `load_state_dict`
    hands all parameters one `step` tensor: each following step would advance it once for every parameter.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    @wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states")
    def set_states_but_step(set_states: Any, self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        set_states(self, model_param, {"step": None, **tensors})

    @wrap(DistributedOptimizer, "load_state_dict")
    def load_with_own_steps(load: Any, self: Any, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()


def _offload_everything() -> None:
    """HybridDeviceOptimizer offloads the parameters that are `.is_cuda`: here all of them are meant.

    Answers _get_sub_optimizer_param_groups for optimizer_offload_fraction 1, as on a GPU: an fp32 copy of every
    parameter is what the CPU's AdamW updates, and the parameter takes the result over.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    def groups(self: Any, fraction: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict, dict, dict]:
        assert fraction == 1.0 and self.param_update_in_fp32
        copies = {p: p.detach().clone().float() for group in self.param_groups for p in group["params"]}
        on_cpu = [group | {"params": [copies[p] for p in group["params"]]} for group in self.param_groups]
        masters = {p: copy for p, copy in copies.items() if p.dtype != torch.float32}
        return [g for g in on_cpu if g["params"]], [], copies, {copy: p for p, copy in copies.items()}, masters

    patch(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", groups)
