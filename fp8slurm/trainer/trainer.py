"""The trainer: one Megatron model behind a few calls. All ranks make the same calls in the same order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.config.schema import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import PackedBatch
from fp8slurm.fp8.block import BlockFP8
from fp8slurm.models.layout import check_layout
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec
from fp8slurm.trainer import build, checkpoint, primary_fp8
from fp8slurm.trainer.context_parallel import ModelInput
from fp8slurm.trainer.experts import RoutingReplay, choose_grouped_products, scale_aux_loss, take_aux_loss
from fp8slurm.trainer.forward import Outputs, run_schedule
from fp8slurm.trainer.kv_scales import KvScales
from fp8slurm.trainer.optimizer_sleep import OptimizerSleep
from fp8slurm.trainer.start import check_grouped
from fp8slurm.trainer.weights import HfReader, ParameterShards

LossFunction = Callable[
    [torch.Tensor, "torch.Tensor | None", PackedBatch], "tuple[torch.Tensor, dict[str, torch.Tensor]]"
]
"""(logprobs fp32 [T] with grad, entropy fp32 [T] with grad or None, batch) -> (loss, metrics).

The loss is the sum over this micro-batch of loss_weights times the per-token loss; metrics are scalars to be summed.
"""

NCCL_WATCHDOG_S = 0.15
"""torch's watchdog of a group looks this often, and a bit, at what has ended."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on all ranks."""

    loss: float
    """Sum of the loss over all micro-batches of all data-parallel ranks, without the experts' load-balancing loss."""
    grad_norm: float
    """Global 2-norm of the gradient, before clipping."""
    ok: bool
    """False: the loss or the gradient was not finite; the step was skipped and no weight changed."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The loss function's metrics, summed over micro-batches and data-parallel ranks."""


class Trainer:
    """One rank's part of the model, with its optimizer. `start` comes first, then `load_hf` or `load`."""

    def __init__(self, config: RunConfig, spec: ModelSpec) -> None:
        """Build the model. InputError for a layout that does not fit it."""
        from megatron.core import parallel_state

        check_layout(spec, config.parallel, config.fp8.backend != "off", dist.get_world_size())
        check_grouped(config, spec)
        self.config, self.spec, self._ps = config, spec, parallel_state
        self._set_ranks(parallel_state)
        self.table = NameTable(spec)
        self.transformer_config = build.transformer_config(config, spec)
        if torch.cuda.is_available():
            choose_grouped_products(torch.cuda.get_device_capability(), self.transformer_config)
        self.module = build.build_module(config, spec, self.transformer_config)
        self.ddp = build.build_ddp(config, self.module, self.transformer_config)
        self.optimizer = build.build_optimizer(config, self.ddp)
        self.sleeping = OptimizerSleep(self.optimizer, self.module)
        self.shards = ParameterShards.of(self.module, self.table)
        self.memory: dict[str, float] = {}
        """GB of torch's allocator at the last make_room, of the fullest rank: memory reserved, the part of it in use,
        and the most of both since the make_room before."""
        self.primary_fp8: list[str] = []
        """Names of the weights that are kept in FP8 (fp8.param_gather)."""
        if config.fp8.param_gather:
            primary_fp8.forget_initial_values(self.module)
            self.primary_fp8 = primary_fp8.check_primary((e, p) for e, p, _ in self.shards.parameters)
        self.kv_scales = KvScales(config, spec, self.module) if config.engine.kv_cache == "fp8" else None
        """Of the engines' KV cache."""
        self.reference: Any = None
        self.replay: RoutingReplay | None = None
        if config.rollout.routing_replay:
            cut = config.parallel.sequence_parallel
            part = (self.tensor_parallel_rank, self.tensor_parallel_size) if cut else (0, 1)
            self.replay = RoutingReplay(self.module, part[0], part[1], compare=config.model.exact)

    def _set_ranks(self, ps: Any) -> None:
        """Who this rank is, for those that pack batches and send weights."""
        self.rank = dist.get_rank()
        self.data_parallel_rank, self.data_parallel_size = (
            ps.get_data_parallel_rank(),
            ps.get_data_parallel_world_size(),
        )
        self.replica_rank = ps.get_data_parallel_rank(with_context_parallel=True)
        """Number of this rank among those that hold the same dense weights: data- and context-parallel ones."""
        self.context_parallel_group: dist.ProcessGroup = ps.get_context_parallel_group()
        self.tensor_parallel_group: dist.ProcessGroup = ps.get_tensor_model_parallel_group()
        self.tensor_parallel_rank = ps.get_tensor_model_parallel_rank()
        self.tensor_parallel_size = ps.get_tensor_model_parallel_world_size()
        self.pipeline_parallel_rank = ps.get_pipeline_model_parallel_rank()
        self.expert_parallel_rank = ps.get_expert_model_parallel_rank()
        self.expert_data_parallel_rank = ps.get_expert_data_parallel_rank()
        """Number of this rank among those that hold the same experts."""
        experts = ps.get_expert_tensor_parallel_group()
        rank_and_size = ps.get_expert_tensor_parallel_rank(), ps.get_expert_tensor_parallel_world_size()
        self.expert_tensor_parallel: tuple[int, int, dist.ProcessGroup] = (*rank_and_size, experts)
        """(rank, size, group) of the ranks that cut each expert."""
        first = self.tensor_parallel_rank == 0 == ps.get_context_parallel_rank()
        self.is_data_parallel_leader = first and ps.is_pipeline_last_stage()
        """One rank, the first of the last stage, for every data-parallel rank."""
        sequence = self.tensor_parallel_size if self.config.parallel.sequence_parallel else 1
        self._part_multiple = sequence * (128 if self.config.fp8.backend == "transformer_engine" else 1)
        """What the number of tokens that a rank's model is given has to be a multiple of."""
        self.pad_multiple = self._part_multiple if self.context_parallel_group.size() == 1 else 1
        """The length of every micro-batch has to be a multiple of this; one that is cut among ranks is padded here."""

    # Weights.

    def load_hf(self, path: str | Path) -> None:
        """Load a Hugging Face folder in BF16, FP16 or FP32 and start the optimizer's master weights from it."""
        if self.spec.quantization is not None:
            raise InputError(f"{path}: holds FP8 weights; --model.hf-checkpoint must be in BF16, FP16 or FP32")
        if self.config.fp8.param_gather:  # the masters start from the values, not from the codes
            self.shards.load(HfReader(path), str(path), primary_fp8.Masters(self.optimizer).set)
        else:
            self.shards.load(HfReader(path), str(path))
            self.optimizer.reload_model_params()
        self.weights_changed()

    def named_shards(self) -> Iterator[tuple[str, torch.Tensor | BlockFP8]]:
        """(global Megatron name, this rank's shard [detached, not a copy]) for every parameter of this stage; FP8
        primary weights as their codes and scales. Then the scales of the engines' KV cache, where it is in FP8."""
        yield from self.shards.named()
        if self.kv_scales is not None:
            yield from self.kv_scales.named()

    def weights_changed(self) -> None:
        """Drop what was derived from the weights (the emulation's quantized copies)."""
        for module in self.module.modules():
            if hasattr(module, "weights_changed"):
                module.weights_changed()

    def snapshot_reference(self) -> None:
        """Keep the present weights as the reference model (`logprobs(..., reference=True)`)."""
        # without gradients TransformerEngine makes no transposed copy of an FP8 weight
        with torch.set_grad_enabled(not self.config.fp8.param_gather):
            module = build.build_module(self.config, self.spec, self.transformer_config)
        reference = build.wrap_precision(module.requires_grad_(False), self.transformer_config)
        with torch.no_grad():
            for kept, current in zip(module.parameters(), self.module.parameters(), strict=True):
                if primary_fp8.is_primary(current):
                    primary_fp8.copy(kept, current)
                else:
                    kept.copy_(current)
        self.reference = reference

    def new_optimizer(self) -> None:
        """Start the optimizer afresh: no moments, step 0, master weights from the present weights."""
        kept = primary_fp8.Masters(self.optimizer).rounded() if self.config.fp8.param_gather else None
        self.optimizer = build.build_optimizer(self.config, self.ddp)
        self.sleeping = OptimizerSleep(self.optimizer, self.module)
        if kept is not None:  # Megatron would start from the codes
            primary_fp8.Masters(self.optimizer).restore(kept)

    def settle_memory(self, room: bool = True) -> None:
        """Allocate what is there between steps, the optimizer's state too, and nothing more; all ranks together. room:
        give back what engines that sleep between steps find free while they work."""
        build.allocate_fused_state(self.optimizer)
        if room:
            self.make_room()

    def make_room(self) -> None:
        """Before engines work on this GPU: give back what the next step can take or make again, on all ranks. The
        gradients' memory, TransformerEngine's quantized copies of the weights, with optim.sleep the optimizer's state
        (to host memory), and what only torch's allocator holds. The weights stay."""
        if torch.cuda.is_available():
            self.ddp.offload_grad_buffers(empty_cache=False)
            for module in self.module.modules():
                getattr(module, "_fp8_workspaces", {}).clear()
            self.weights_changed()
            if self.config.optim.sleep:
                self.sleeping.to_host()
            self._collect_gathered()
            c = torch.cuda
            c.empty_cache()
            now = [c.memory_reserved(), c.memory_allocated(), c.max_memory_allocated(), c.max_memory_reserved()]
            held = torch.tensor(now, device="cuda")
            c.reset_peak_memory_stats()
            dist.all_reduce(held, op=dist.ReduceOp.MAX)  # and nobody goes on before all have made room
            names = ("memory/kept", "memory/in_use", "memory/peak", "memory/reserved")
            self.memory = {name: n / 1e9 for name, n in zip(names, held.tolist())}
        else:
            dist.barrier()

    def _collect_gathered(self) -> None:
        """Have torch let go of what TransformerEngine gathered in FP8 and nobody waited for.

        Torch keeps such a collective's tensors until NCCL's watchdog, which looks every 100 ms, has seen it end and the
        same group is used again: 2 to 5 GB of the 4B at tensor_parallel_size 2, all through the next rollout
        (docs/perf.md).
        """
        if self.tensor_parallel_size > 1 and self.config.fp8.backend != "off":
            torch.cuda.synchronize()
            time.sleep(NCCL_WATCHDOG_S)
            dist.all_reduce(torch.zeros(1, device="cuda"), group=self._ps.get_tensor_model_parallel_group())

    # Forward and backward.

    def logprobs(self, micro_batches: list[PackedBatch], reference: bool = False) -> list[torch.Tensor]:
        """Log-probability of every label, fp32 [T] for each micro-batch, on all ranks that share this data.

        `reference`: under the weights of the last snapshot_reference() instead of the present ones.
        """
        if reference and self.reference is None:
            raise ValueError("no reference model: snapshot_reference() was not called")
        model = self.reference if reference else self.ddp

        def keep(out: Outputs, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
            return out[0].sum(), out[0]

        model.eval()
        with torch.no_grad():
            replay = None if reference else self.replay  # a reference chooses its own experts
            kept = self._run(model, micro_batches, keep, with_entropy=False, forward_only=True, replay=replay)
        model.train()
        return self._on_all_stages(kept, micro_batches)

    def train_step(
        self, micro_batches: list[PackedBatch], loss_fn: LossFunction, lr: float, with_entropy: bool = False,
        before_update: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> StepResult:  # fmt: skip
        """One optimizer step on the sum of the losses of these micro-batches and of the other data-parallel ranks'.

        All data-parallel ranks have equally many micro-batches. Without `with_entropy` loss_fn gets None for it.
        before_update: called on all ranks when the gradients are there and no weight has changed, with what `logprobs`
        would return, from this step's own forward; what it raises leaves the weights as they are.
        """
        total, sums, kept = self._gradients(micro_batches, loss_fn, with_entropy)
        if before_update is not None:
            before_update(self._on_all_stages(kept, micro_batches))
        grad_norm, ok = self._update(lr, math.isfinite(total))
        return StepResult(total, grad_norm, ok, sums)

    def warm_up(self, micro_batches: list[PackedBatch]) -> None:
        """Go through everything of a step but the step itself, all ranks together: no weight and no state changes.

        Libraries and communicators take memory for good when they are first used: engines that share the GPU must find
        it taken when they count what is free, and it must not lie in the midst of what the first real step will give
        back.
        """
        self.logprobs(micro_batches)

        def nothing(logprobs: torch.Tensor, entropy: torch.Tensor | None, _: PackedBatch) -> tuple[torch.Tensor, dict]:
            return logprobs.sum() * 0 + (0 if entropy is None else entropy.sum() * 0), {}

        self._gradients(micro_batches, nothing, True)
        self.sleeping.finish()
        self.optimizer.prepare_grads()
        self.optimizer.get_grad_norm()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.kv_scales is not None:
            self.kv_scales.forget()

    def _gradients(
        self, micro_batches: list[PackedBatch], loss_fn: LossFunction, with_entropy: bool
    ) -> tuple[float, dict[str, float], list[torch.Tensor]]:
        """Forward and backward; loss and metrics, both summed over micro-batches and data-parallel ranks, and on the
        last stage the log-probabilities of every micro-batch."""
        logprobs: list[torch.Tensor] = []
        self.sleeping.begin()
        if torch.cuda.is_available():
            self.ddp.restore_grad_buffers(synchronize=False)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

        def loss(out: Outputs, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logprobs.append(out[0].detach())
            value, metrics = loss_fn(*out, batch)
            kept = {"loss": value} | {f"metric/{k}": v for k, v in metrics.items()}
            return value, {k: torch.as_tensor(v).detach() for k, v in kept.items()}

        balance = self.spec.is_moe and self.config.moe.aux_loss_coef > 0
        if balance:
            context = self.context_parallel_group
            given = (ModelInput.of(b, context, self._part_multiple) for b in micro_batches)
            tokens = sum(len(g.tokens) for g in given) * context.size()
            scale_aux_loss(self.transformer_config, tokens, self._ps.get_data_parallel_group())
        how = {"with_entropy": with_entropy, "forward_only": False, "replay": self.replay}
        sums = self._sum(self._run(self.ddp, micro_batches, loss, **how))
        total = sums.pop("loss")
        if balance:
            sums["moe/aux_loss"] = take_aux_loss(self.spec.num_layers, len(micro_batches), self.data_parallel_size)
        return total, {k.removeprefix("metric/"): v for k, v in sums.items()}, logprobs

    def _run(self, model: Any, micro_batches: list[PackedBatch], loss: Callable[..., Any], **how: Any) -> list[Any]:
        if not micro_batches:
            raise ValueError("no micro-batches")
        for size in (len(b.tokens) for b in micro_batches):
            if size % self.pad_multiple:
                raise ValueError(f"a micro-batch of {size} tokens; allowed here: multiples of {self.pad_multiple}")
        how |= {"exact": self.config.model.exact, "multiple": self._part_multiple}
        return run_schedule(model, micro_batches, loss, **how)

    def _update(self, lr: float, loss_is_finite: bool) -> tuple[float, bool]:
        """Clip and step; (gradient norm, whether the step was made). Every rank comes to the same verdict."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.sleeping.finish()
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (loss_is_finite and math.isfinite(grad_norm)):
            return grad_norm, False
        o = self.config.optim
        for part in self.optimizer.chained_optimizers:
            if o.clip_grad > 0 and part.get_parameters():
                decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), o.clip_grad, grad_norm, use_decoupled_grad=decoupled
                )
        for group in self.optimizer.param_groups:  # a checkpoint brings the settings of the run that wrote it
            # norms have a wd_mult of 0, which only Megatron's own scheduler would apply
            decay = o.weight_decay * group.get("wd_mult", 1.0)
            group |= {"lr": lr, "weight_decay": decay, "betas": (o.beta1, o.beta2), "eps": o.eps}
            if o.cpu_offload:  # checkpoints of runs without offload say otherwise
                group["fused"] = True
        self.optimizer.step_with_ready_grads()
        self.weights_changed()
        return grad_norm, True

    def _sum(self, kept: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Sums over micro-batches and data-parallel ranks, on all ranks; `kept` is empty but on the last stage."""
        device = torch.cuda.current_device()
        names = sorted({name for one in kept for name in one})
        if self.config.parallel.pipeline_parallel_size > 1:
            names = self._names_from_last_stage(names)
        values = torch.zeros(len(names), dtype=torch.float64, device=device)
        for one in kept:
            values += torch.stack([torch.as_tensor(one.get(n, 0.0), device=device).double() for n in names])
        if kept:
            dist.all_reduce(values, group=self._ps.get_data_parallel_group())
        self._from_last_stage(values)
        return dict(zip(names, values.tolist()))

    def _names_from_last_stage(self, names: list[str]) -> list[str]:
        text = json.dumps(names).encode()
        length = torch.tensor([len(text)], device=torch.cuda.current_device())
        self._from_last_stage(length)
        payload = torch.zeros(int(length), dtype=torch.uint8, device=length.device)
        if self._ps.is_pipeline_last_stage():
            payload.copy_(torch.tensor(list(text), dtype=torch.uint8))
        self._from_last_stage(payload)
        return json.loads(bytes(payload.tolist()))

    def _on_all_stages(self, logprobs: list[torch.Tensor], micro_batches: list[PackedBatch]) -> list[torch.Tensor]:
        """fp32 [T] of every micro-batch, which the last stage has, on all ranks that share this data."""
        sizes = [len(b.tokens) for b in micro_batches]
        flat = torch.cat(logprobs) if logprobs else torch.empty(sum(sizes), device=torch.cuda.current_device())
        self._from_last_stage(flat)
        return list(flat.split(sizes))

    def _from_last_stage(self, tensor: torch.Tensor) -> None:
        if self.config.parallel.pipeline_parallel_size > 1:
            group = self._ps.get_pipeline_model_parallel_group()
            dist.broadcast(tensor, self._ps.get_pipeline_model_parallel_last_rank(), group=group)

    # Checkpoints.

    def snapshot(self, path: str | Path, copy: bool = True) -> checkpoint.Snapshot:
        """Model, reference, optimizer and random state, to be written in the background (trainer/checkpoint.py) into an
        existing, empty folder; all ranks together."""
        return checkpoint.Snapshot(self, Path(path), copy)

    def load(self, path: str | Path) -> bool:
        """Continue from a checkpoint, in this or another layout; whether a reference model came with it. Errors as for
        checkpoint.load."""
        with_reference = checkpoint.load(self, Path(path))
        if self.kv_scales is not None:
            self.kv_scales.read(Path(path))
        self.weights_changed()
        return with_reference
