"""Start of a Megatron rank: what the machine has, torch.distributed, parallel state, seeds, the layer's modules.

This is the only place of the trainer that knows whether there is a GPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import warnings
from datetime import timedelta
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from packaging.version import Version

from fp8slurm.config.schema import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.gpu_memory import use_expandable_segments
from fp8slurm.fp8 import BLOCK
from fp8slurm.fp8.environment import set_fp32_scales
from fp8slurm.models.spec import ModelSpec

GATHERS_PACKED = Version("2.18")
"""The first TransformerEngine whose cp_comm_type "all_gather" takes qkv_format "thd": 2.17.1 asserts that it is not."""
TIMEOUT = timedelta(hours=24)
"""Of collectives: ranks may wait long for one another, and hangs are the watchdog's business."""


def check_machine(config: RunConfig, cuda: bool, transformer_engine: bool) -> None:
    """Refuse an FP8 setting that this machine cannot honour: training would be BF16 without saying so.

    `cuda`: a GPU is in use; `transformer_engine`: it can be imported. InputError names the flag and what is allowed.
    """
    backend = config.fp8.backend
    here = ("transformer_engine, off" if transformer_engine else "none") if cuda else "emulated, off"
    check_optimizer(config, cuda and transformer_engine)
    if backend == "transformer_engine" and not transformer_engine:
        raise InputError(
            f"--fp8.backend transformer_engine: TransformerEngine is not installed, and training would silently be "
            f"{config.model.dtype}; allowed here: {here}"
        )
    if backend == "transformer_engine" and not cuda:
        raise InputError(f"--fp8.backend transformer_engine needs a GPU; allowed here: {here}")
    if backend == "emulated" and cuda:
        raise InputError(f"--fp8.backend emulated is for machines without a GPU; allowed here: {here}")
    if cuda and not transformer_engine:
        raise InputError("training on a GPU needs TransformerEngine (packed attention); it is not installed")
    check_dispatcher(config.moe.dispatcher, cuda, importlib.util.find_spec("deep_ep") is not None)
    if backend == "transformer_engine" and config.model.dtype != "bfloat16":
        raise InputError(f"--model.dtype {config.model.dtype} with TransformerEngine's FP8; allowed: bfloat16")


def check_optimizer(config: RunConfig, fused_adam: bool) -> None:
    """Refuse optimizer settings that exclude one another or that nobody here offers; InputError names the way out.

    `fused_adam`: TransformerEngine's optimizer is there, and a GPU for it.
    """
    o = config.optim
    if config.fp8.param_gather:
        check_param_gather(config, fused_adam)
    if o.cpu_offload and not o.distributed:
        raise InputError(
            "--optim.cpu-offload needs the distributed optimizer; allowed: --optim.distributed, or "
            "--optim.no-cpu-offload"
        )
    if o.cpu_offload and config.model.dtype != "bfloat16":
        raise InputError(
            f"--optim.cpu-offload with --model.dtype {config.model.dtype}: Megatron cannot load its checkpoints; "
            f"allowed: --model.dtype bfloat16, or --optim.no-cpu-offload"
        )
    if o.sleep:
        _check_optimizer_sleep(config)
    if o.moments == "float32":
        return
    if o.cpu_offload:
        raise InputError(
            f"--optim.moments {o.moments} with --optim.cpu-offload: the CPU's Adam keeps FP32 moments; allowed: "
            f"float32, or --optim.no-cpu-offload"
        )
    if not fused_adam:
        raise InputError(
            f"--optim.moments {o.moments}: only TransformerEngine's FusedAdam on a GPU keeps such moments; allowed "
            f"here: float32"
        )
    if not o.distributed:
        raise InputError(f"--optim.moments {o.moments} needs the distributed optimizer; allowed: --optim.distributed")


def _check_optimizer_sleep(config: RunConfig) -> None:
    if not config.slurm.gpus_per_node or config.engine.placement != "shared" or config.engine.sleep is False:
        raise InputError(
            "--optim.sleep makes room for engines on the trainer's GPUs: it needs --slurm.gpus-per-node, "
            "--engine.placement shared and engines that sleep; allowed here: --optim.no-sleep"
        )
    o = config.optim
    for flag, on, why in (
        ("--optim.cpu-offload", o.cpu_offload, "the state is in host memory already"),
        (f"--optim.moments {o.moments}", o.moments != "float32", "its checkpoints need the state on the GPU"),
        ("--fp8.param-gather", config.fp8.param_gather, "its checkpoints need the masters on the GPU"),
    ):
        if on:
            raise InputError(f"--optim.sleep with {flag}: {why}; allowed: one of the two")


def check_param_gather(config: RunConfig, gpu_engine: bool) -> None:
    """Refuse FP8 primary weights where they would silently be BF16 ones; InputError names the way out.

    `gpu_engine`: there are a GPU and TransformerEngine.
    """
    o = config.optim
    instead = "or --fp8.no-param-gather"
    if config.fp8.backend == "off":
        raise InputError(
            f"--fp8.param-gather with --fp8.backend off: the weights would silently stay {config.model.dtype}; "
            f"allowed: --fp8.backend transformer_engine (GPU), --fp8.backend emulated (CPU), {instead}"
        )
    if config.fp8.backend == "emulated" and config.model.dtype != "bfloat16":
        raise InputError(
            f"--fp8.param-gather with --model.dtype {config.model.dtype}: FP8 weights stand for BF16 ones; allowed: "
            f"--model.dtype bfloat16, {instead}"
        )
    if config.fp8.backend == "transformer_engine" and not gpu_engine:
        raise InputError(
            f"--fp8.param-gather with --fp8.backend transformer_engine needs a GPU and TransformerEngine; here the "
            f"weights would silently stay {config.model.dtype}; allowed here: --fp8.backend emulated, {instead}"
        )
    if not o.distributed:
        raise InputError(
            f"--fp8.param-gather needs the distributed optimizer, which holds the FP32 masters; allowed: "
            f"--optim.distributed, {instead}"
        )
    if o.moments != "float32":
        raise InputError(
            f"--fp8.param-gather with --optim.moments {o.moments}: not tried; "
            f"allowed: --optim.moments float32, {instead}"
        )


def check_grouped(config: RunConfig, spec: ModelSpec) -> None:
    """Refuse grouped products of fp8.grouped where there are none of the kind; InputError names the way out."""
    if config.fp8.grouped == "transformer_engine":
        return
    flag, instead = f"--fp8.grouped {config.fp8.grouped}", "or --fp8.grouped transformer_engine"
    if config.fp8.backend != "transformer_engine":
        raise InputError(
            f"{flag} with --fp8.backend {config.fp8.backend}: these products are FP8 on a GPU; allowed: --fp8.backend "
            f"transformer_engine, {instead}"
        )
    if not spec.is_moe:
        raise InputError(f"{flag}: the model has no experts; leave it out")
    if config.fp8.param_gather:
        raise InputError(
            f"{flag} with --fp8.param-gather: the experts' codes are made of BF16 weights; allowed: "
            f"--fp8.no-param-gather, {instead}"
        )
    if spec.hidden_size % BLOCK:  # the experts' own width is a multiple: check_layout
        raise InputError(f"{flag}: hidden_size {spec.hidden_size}; allowed: multiples of {BLOCK}, {instead}")


def check_context_parallel(config: RunConfig, transformer_engine: str) -> None:
    """Refuse context parallelism with a TransformerEngine that cannot gather the keys of packed sequences; InputError.

    transformer_engine: its version.
    """
    size = config.parallel.context_parallel_size
    if size > 1 and Version(transformer_engine) < GATHERS_PACKED:
        raise InputError(
            f"--parallel.context-parallel-size {size} with TransformerEngine {transformer_engine}: it gathers keys and "
            f"values of packed sequences from {GATHERS_PACKED} on; allowed here: 1, or install requirements/gpu.txt"
        )


def check_dispatcher(dispatcher: str, cuda: bool, deep_ep: bool) -> None:
    """Refuse a token dispatcher that this machine does not have. `deep_ep`: the package can be imported."""
    if dispatcher != "flex":
        return
    if not deep_ep:
        raise InputError("--moe.dispatcher flex: DeepEP (package deep_ep) is not installed; allowed here: alltoall")
    if not cuda:
        raise InputError("--moe.dispatcher flex: DeepEP's kernels need a GPU; allowed here: alltoall")


def start(config: RunConfig, rank: int, world_size: int, store: dist.Store, local_rank: int = 0) -> None:
    """Make this process Megatron rank `rank` of `world_size`.

    `store` is shared by exactly these ranks (or a PrefixStore of theirs); `local_rank` picks the GPU on this node.
    Afterwards torch.distributed's default group is the training ranks, and `Trainer` can be built. InputError for
    settings that this machine or the number of ranks cannot honour.
    """
    cuda = torch.cuda.is_available()
    check_machine(config, cuda, importlib.util.find_spec("transformer_engine") is not None)
    if cuda:
        check_context_parallel(config, metadata.version("transformer_engine"))
    set_fp32_scales()
    if cuda:
        torch.cuda.set_device(local_rank)
        use_expandable_segments()
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    else:
        from fp8slurm.cpu import megatron as shim

        _quiet()
        shim.install()
        if config.slurm.nodes == 1:
            # else gloo listens on the interface that the host's name resolves to
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    from megatron.core import parallel_state

    p = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor_parallel_size,
        pipeline_model_parallel_size=p.pipeline_parallel_size,
        context_parallel_size=p.context_parallel_size,
        expert_model_parallel_size=p.expert_parallel_size,
        expert_tensor_parallel_size=p.expert_tensor_parallel_size,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
        create_gloo_process_groups=cuda,  # on the CPU the groups are gloo already
    )
    seed(config)


def stop() -> None:
    """Undo `start`: destroy Megatron's and torch's process groups."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router_replay import RouterReplay

    RouterReplay.clear_global_router_replay_instances()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed(config: RunConfig) -> None:
    """Seed Python, NumPy, torch and Megatron's per-rank generators from run.seed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    value = config.run.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    model_parallel_cuda_manual_seed(value + 1)


def _quiet() -> None:
    """Megatron warns about every GPU package that a CPU has no use for."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def layer_spec(config: RunConfig, transformer_config: Any) -> Any:
    """Megatron's specification of this stage's layers: TransformerEngine's on a GPU, cpu/'s without one."""
    if not torch.cuda.is_available():
        from fp8slurm.cpu.layer_spec import layer_spec as cpu_layer_spec

        return cpu_layer_spec(transformer_config, config.fp8.backend == "emulated", config.model.exact)
    if config.model.exact:
        from fp8slurm.trainer import exact_cuda, exact_layer

        exact_cuda.prepare()
        return exact_layer.layer_spec(transformer_config, exact_cuda)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    moe = transformer_config.num_moe_experts
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=moe, moe_grouped_gemm=moe is not None, qk_layernorm=transformer_config.qk_layernorm
    )
    if config.fp8.grouped == "deep_gemm":
        from fp8slurm.trainer import grouped_cuda
        from fp8slurm.trainer.grouped_layer import replace_experts

        grouped_cuda.prepare()
        replace_experts(spec, grouped_cuda)
    return spec
