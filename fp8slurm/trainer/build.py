"""Megatron's objects from our configuration: transformer config, model, DDP, optimizer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from fp8slurm.config.schema import RunConfig
from fp8slurm.core.patches import patched
from fp8slurm.models.spec import ModelSpec
from fp8slurm.trainer.start import layer_spec


def torch_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of parameters and activations outside FP8 GEMMs."""
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.dtype]


def transformer_config(config: RunConfig, spec: ModelSpec) -> Any:
    """Megatron's TransformerConfig for this model, layout, precision and machine."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    def sum_of_gradients(model: list[Any], num_tokens: Any = None, **groups: Any) -> None:
        # Megatron would divide by the number of tokens; the objective here is the plain sum of the losses.
        finalize_model_grads(model, None, **groups)

    cuda = torch.cuda.is_available()
    dtype = torch_dtype(config)
    p = config.parallel
    arguments = spec.transformer_config_arguments()
    arguments |= {
        "tensor_model_parallel_size": p.tensor_parallel_size,
        "pipeline_model_parallel_size": p.pipeline_parallel_size,
        "context_parallel_size": p.context_parallel_size,
        "cp_comm_type": "all_gather",
        "expert_model_parallel_size": p.expert_parallel_size,
        "expert_tensor_parallel_size": p.expert_tensor_parallel_size,
        "sequence_parallel": p.sequence_parallel,
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": config.moe.dispatcher,  # the default refuses variable lengths, experts or not
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "attention_softmax_in_fp32": True,
        "perform_initialization": False,  # every parameter comes from a checkpoint
        "use_cpu_initialization": not cuda,
        "calculate_per_token_loss": True,  # gradients are summed, not averaged: see sum_of_gradients
        "finalize_model_grads_func": sum_of_gradients,
    }
    for fusion in ("apply_rope_fusion", "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion",
                   "masked_softmax_fusion", "persist_layer_norm"):  # fmt: skip
        arguments[fusion] = cuda and fusion in ("apply_rope_fusion", "persist_layer_norm", "bias_activation_fusion")
    if spec.is_moe:
        arguments |= {"moe_grouped_gemm": cuda, "moe_permute_fusion": cuda}
        arguments |= {"moe_enable_routing_replay": config.rollout.routing_replay}
        if config.moe.aux_loss_coef:
            balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": config.moe.aux_loss_coef}
            arguments |= balance
    if config.train.recompute == "full":
        arguments |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if config.model.exact and not cuda:
        from fp8slurm.cpu import exact_layers

        arguments["activation_func"] = exact_layers.silu
    if config.fp8.backend == "transformer_engine" and not config.model.exact:  # exact layers multiply by themselves
        arguments |= {"fp8": config.fp8.format, "fp8_recipe": config.fp8.recipe, "fp8_param": config.fp8.param_gather}
    made = TransformerConfig(**arguments)
    if spec.yarn is not None:
        # Megatron (0.19.2) reads these from a TransformerConfig, which declares none of them. mscale None: cos and sin
        # are multiplied by 0.1 ln(factor) + 1, which TransformerEngine's fused rotary embedding of packs leaves out.
        for name, value in {
            "rotary_scaling_factor": spec.yarn.factor,
            "original_max_position_embeddings": spec.yarn.original_positions,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": None,
            "mscale_all_dim": None,
            "correction_range_round_to_int": True,
        }.items():
            setattr(made, f"yarn_{name}", value)
        made.apply_rope_fusion = False
    return made


def build_module(config: RunConfig, spec: ModelSpec, tconfig: Any) -> Any:
    """This stage's GPTModel, its parameters uninitialised, without wrappers."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    module = GPTModel(
        config=tconfig,
        transformer_layer_spec=layer_spec(config, tconfig),
        vocab_size=spec.vocab_size,
        max_sequence_length=spec.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tie_word_embeddings,
        position_embedding_type="yarn" if spec.yarn is not None else "rope",
        rotary_base=spec.rope_theta,
        rope_scaling=spec.rope_scaling is not None,
        rope_scaling_factor=spec.rope_scaling or 1.0,
    )
    if config.model.exact and not torch.cuda.is_available():
        from fp8slurm.cpu.exact_layers import ExactRotary

        module.rotary_pos_emb = ExactRotary(spec.rope_theta, spec.head_dim)
    module = module.to(torch.cuda.current_device(), torch_dtype(config))
    if config.fp8.param_gather and config.fp8.backend == "emulated":
        from fp8slurm.cpu.fp8_linear import FP8ColumnParallelLinear, FP8RowParallelLinear
        from fp8slurm.cpu.primary_fp8 import make_primary

        make_primary(module, (FP8ColumnParallelLinear, FP8RowParallelLinear))
    return module


def wrap_precision(module: Any, tconfig: Any) -> Any:
    """The module as Megatron's schedules want it: behind Float16Module in BF16."""
    from megatron.core.transformer.module import Float16Module

    return Float16Module(tconfig, module) if tconfig.bf16 else module


def build_ddp(config: RunConfig, module: Any, tconfig: Any) -> Any:
    """Megatron's DistributedDataParallel: gradients in one fp32 buffer, summed over the data-parallel ranks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.optim.distributed,
        fp8_param_gather=config.fp8.param_gather,
    )
    return DistributedDataParallel(tconfig, ddp_config, wrap_precision(module, tconfig))


def build_optimizer(config: RunConfig, ddp: Any) -> Any:
    """AdamW with fp32 master weights; its state is zero and the learning rate is set at every step.

    With fp8.param_gather and optim.cpu_offload Megatron is told of no offload, and makes HostAdam in the place of its
    DistributedOptimizer. The masters are zero too then.
    """
    from megatron.core import optimizer as megatron
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    o = config.optim
    on_host = o.cpu_offload and config.fp8.param_gather
    hybrid = o.cpu_offload and not on_host
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        # Set at every step. Here it would become part of the identity that Megatron finds a group of parameters by when
        # it loads a checkpoint, and a run could not be continued with another learning rate.
        lr=1.0,
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=config.model.dtype == "bfloat16",
        params_dtype=torch_dtype(config),
        use_distributed_optimizer=o.distributed,
        optimizer_cpu_offload=hybrid,
        optimizer_offload_fraction=1.0 if hybrid else 0.0,
        # gradients travel to the host, and weights back, parameter by parameter while the CPU works on another
        overlap_cpu_optimizer_d2h_h2d=hybrid,
        use_precision_aware_optimizer=hybrid or o.moments != "float32",
        exp_avg_dtype=getattr(torch, o.moments),
        exp_avg_sq_dtype=getattr(torch, o.moments),
        # how Megatron knows that it has to keep the masters itself
        fp8_recipe=config.fp8.recipe if config.fp8.param_gather else None,
    )
    with ExitStack() as stack:
        if on_host:
            from fp8slurm.trainer.host_adam import HostAdam

            stack.enter_context(patched(megatron, "DistributedOptimizer", HostAdam))
        optimizer = get_megatron_optimizer(optimizer_config, [ddp], use_gloo_process_groups=torch.cuda.is_available())
    for part in optimizer.chained_optimizers:
        _allocate_state(part.optimizer)
    return optimizer


def _allocate_state(adam: Any) -> None:
    """torch's AdamW makes its state in the first step, but a checkpoint may be written or read before that.

    For the CPU-offloaded one Megatron would take a step on random gradients instead, and count it.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    if isinstance(adam, HybridDeviceOptimizer):
        for one in adam.sub_optimizers:
            _allocate_state(one)
        adam._sync_sub_optimizers_state_to_hdo()
    if not isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in adam.param_groups:
        for p in group["params"]:
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adam.state[p] = {"step": torch.tensor(0.0), **zeros}


def allocate_fused_state(optimizer: Any) -> None:
    """TransformerEngine's FusedAdam too makes its state in the first step: make it now, as that step would.

    For the checkpoint alone, and not when it is built: with BF16 moments its masters are taken from the weights, which
    are loaded later. A state that is there already is left as it is.
    """
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if not hasattr(adam, "initialize_state"):
            continue
        for group in adam.param_groups:
            group.setdefault("step", 0)
            for p in group["params"]:
                if not adam.state[p]:
                    adam.initialize_state(p, adam.store_param_remainders and p.dtype == torch.bfloat16)
