"""Adam in host memory for FP8 primary weights, behind the interface of Megatron's DistributedOptimizer.

FP32 masters and both moments of this rank's share lie in host memory. A step goes through the share in rounds:

    gradients (FP32)  GPU -> pinned memory       on a stream of its own, while the CPU works on the round before
    Adam              torch's fused CPU kernel   over all of torch's threads
    bf16(master)      pinned memory -> GPU       on a third stream
    quantized there   by TransformerEngine's call for distributed masters: codes = quantize(bf16(master)), as without
                      offload; embeddings and norms are copied

and then Megatron gathers the codes. SLOTS rounds are under way at a time, each of about PIECE elements of a rank: that
is all that is ever pinned, or on the GPU besides the weights. Masters and moments never travel, so they are not pinned:
torch rounds what it pins up to a power of two, and memory that the kernel's threads touch first lies near their cores.

Megatron 0.19.2's own way (HybridDeviceOptimizer) takes a BF16 view of every weight; of an FP8 one there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import is_float8tensor, quantize_param_shard
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import copy_optimizer_param_metadata
from torch.optim.adamw import adamw

from fp8slurm.trainer.primary_fp8 import PIECE, SLOTS, completed_together


@dataclass(frozen=True)
class Share:
    """What this rank updates of a parameter in a round."""

    parameter: Any
    at: slice
    """Of the round's elements."""
    of: slice
    """Of this rank's master."""
    start: int
    """Number of its first element in the flat parameter."""


@dataclass(frozen=True)
class Round:
    """Elements [low, high) of a bucket, of which `mine` are parameters (the rest is padding)."""

    bucket: Any
    low: int
    high: int
    mine: tuple[Share, ...]
    quantized: tuple[Any, ...]
    """FP8 weights that this round completes, the same on all ranks: each is this rank's alone, another's, or shared."""


class _Slot:
    """Staging of a round: pinned gradients and values, values on the GPU, and what they wait for."""

    def __init__(self, elements: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.gradients = torch.zeros(elements, pin_memory=pinned)
        self.values = torch.zeros(elements, dtype=torch.bfloat16, pin_memory=pinned)
        self.on_device = torch.zeros(elements, dtype=torch.bfloat16, device=device)
        self.fetched, self.sent, self.used = (torch.cuda.Event() for _ in range(3))


class HostAdam(DistributedOptimizer):
    """This rank's share of AdamW. Megatron's "main params" are the masters in host memory.

    The gradients' norm and clipping, which Megatron does where the parameters are, get stand-ins on the GPU that take
    no memory and hold the gradients.
    """

    def __init__(self, optimizer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if optimizer is not None:  # groups and state, without a step
            optimizer = torch.optim.Optimizer(optimizer.param_groups, optimizer.defaults)
        super().__init__(optimizer, config, *args, **kwargs)
        self.steps = 0
        self._slots: list[_Slot] = []
        self._of_parameter: dict[Any, tuple[torch.Tensor, int]] = {}
        if self.is_stub_optimizer:
            return
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                self.optimizer.state[master] = {k: torch.zeros_like(master) for k in self.optimizer_state_keys}
        self._rounds = list(self._plan())

    @classmethod
    def _build_model_and_main_param_groups(
        cls, gbuf_ranges: Any, param_gbuf_map: Any, opt_group_ranges: Any, config: Any
    ) -> tuple[list[Any], ...]:
        """Masters of zeros: every way to weights (a checkpoint, a folder, a new optimizer) gives them their values."""
        parameters: list[list[Any]] = []
        stand_ins: list[list[torch.Tensor]] = []
        masters: list[list[torch.Tensor]] = []
        for group in opt_group_ranges:
            parameters.append([])
            stand_ins.append([])
            masters.append([])
            for p in group["params"]:
                if p.dtype != torch.bfloat16:
                    raise RuntimeError(f"a parameter in {p.dtype}; --fp8.param-gather is for BF16 models")
                buffer, dtype, bucket = param_gbuf_map[p]
                size = gbuf_ranges[buffer][dtype][bucket]["param_map"][p]["param"].size
                stand_in = torch.empty((), device=p.device).expand(size)
                master = torch.zeros(size, device="cpu")
                tensor_parallel.copy_tensor_model_parallel_attributes(stand_in, p)
                copy_optimizer_param_metadata(stand_in, p)
                p.main_param, p.main_param_sharded = master, True
                parameters[-1].append(p)
                stand_ins[-1].append(stand_in)
                masters[-1].append(master)
            group["orig_group"]["params"] = masters[-1]
        empty: list[Any] = [[] for _ in parameters]
        return parameters, empty, stand_ins, empty, masters

    # Gradients: where they are, for the norm and for clipping.

    def get_parameters(self) -> list[Any]:
        return [] if self.is_stub_optimizer else [p for group in self.shard_float16_groups for p in group]

    def _copy_model_grads_to_main_grads(self) -> None:
        for parameters, stand_ins in zip(self.model_float16_groups, self.shard_float16_groups):
            for p, stand_in in zip(parameters, stand_ins):
                where = self._get_model_param_range_map(p)["param"]
                stand_in.grad = p.main_grad.view(-1)[where.start : where.end]

    # The step.

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if not self.is_stub_optimizer:
            self._step()
        self.start_param_sync_for_bucket_group_subset()
        return True

    def _plan(self) -> Iterator[Round]:
        """All rounds, in the order in which every rank makes those that quantize."""
        size, rank = self.data_parallel_group.size(), self.data_parallel_group.rank()
        for bucket in (bucket for buffer in self.buffers for bucket in buffer.buckets):
            own = bucket.grad_data.numel() // size  # this rank's elements stand in one piece
            places = sorted(((*bucket.param_to_index[p], p) for p in bucket.params_list), key=lambda place: place[0])
            if is_float8tensor(bucket.params_list[0]):
                assert all(is_float8tensor(p) for p in bucket.params_list)
                for together in completed_together(places, own, size, PIECE):
                    mine = [p for _, _, p in together if p in self._masters()]
                    yield self._round(bucket, mine, rank * own, (rank + 1) * own, tuple(p for _, _, p in together))
            else:
                for low in range(rank * own, (rank + 1) * own, PIECE):
                    high = min(low + PIECE, (rank + 1) * own)
                    yield self._round(bucket, [p for start, end, p in places if start < high and end > low], low, high)

    def _round(self, bucket: Any, mine: list[Any], low: int, high: int, quantized: tuple[Any, ...] = ()) -> Round:
        """What of the parameters `mine` lies in [low, high) of the bucket."""
        cut = []
        for p in mine:
            start, end = bucket.param_to_index[p]
            cut.append((max(start, low), min(end, high), start, p))
        low, high = min((c[0] for c in cut), default=0), max((c[1] for c in cut), default=0)
        shares = []
        for a, b, start, p in cut:
            of_rank = self._get_model_param_range_map(p)["param"].start
            of = slice(a - start - of_rank, b - start - of_rank)
            shares.append(Share(p, slice(a - low, b - low), of, a - start))
        return Round(bucket, low, high, tuple(shares), quantized)

    def _masters(self) -> dict[Any, tuple[torch.Tensor, int]]:
        """parameter -> (this rank's master, number of its group of parameters)."""
        if not self._of_parameter:
            for number, groups in enumerate(zip(self.model_float16_groups, self.shard_fp32_from_float16_groups)):
                self._of_parameter |= {p: (master, number) for p, master in zip(*groups)}
        return self._of_parameter

    def _step(self) -> None:
        self.steps += 1
        if not self._slots:
            elements = max((r.high - r.low for r in self._rounds), default=0)
            self._slots = [_Slot(elements, self.buffers[0].grad_data.device) for _ in range(SLOTS)]
            self._down, self._up = torch.cuda.Stream(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._down.wait_stream(current)  # the gradients are summed and clipped there
        for number, round_ in enumerate(self._rounds):
            if number == 0:
                self._fetch(0)
            if number + 1 < len(self._rounds):
                self._fetch(number + 1)  # into the slot whose gradients the CPU is done with
            slot, size = self._slots[number % SLOTS], round_.high - round_.low
            slot.fetched.synchronize()
            slot.sent.synchronize()  # the values before have left
            self._adam(round_, slot)
            with torch.cuda.stream(self._up):
                self._up.wait_event(slot.used)
                slot.on_device[:size].copy_(slot.values[:size], non_blocking=True)
                slot.sent.record(self._up)
            current.wait_event(slot.sent)
            self._install(round_, slot.on_device)
            slot.used.record(current)

    def _fetch(self, number: int) -> None:
        round_, slot = self._rounds[number], self._slots[number % SLOTS]
        with torch.cuda.stream(self._down):
            into = slot.gradients[: round_.high - round_.low]
            into.copy_(round_.bucket.grad_data[round_.low : round_.high], non_blocking=True)
            slot.fetched.record(self._down)

    def _adam(self, round_: Round, slot: _Slot) -> None:
        """The round's masters and moments a step on, and bf16(master) in the slot."""
        for number, group in enumerate(self.optimizer.param_groups):
            shares = [s for s in round_.mine if self._masters()[s.parameter][1] == number]
            if not shares:
                continue
            masters = [self._masters()[s.parameter][0] for s in shares]
            states = [self.optimizer.state[m] for m in masters]
            first, second = ([st[key][s.of] for st, s in zip(states, shares)] for key in self.optimizer_state_keys)
            updated = [m[s.of] for m, s in zip(masters, shares)]
            beta1, beta2 = group["betas"]
            adamw(
                updated, [slot.gradients[s.at] for s in shares], first, second, [],
                [torch.tensor(float(self.steps - 1)) for _ in shares], fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
            for share, master in zip(shares, updated):
                slot.values[share.at].copy_(master)

    def _install(self, round_: Round, values: torch.Tensor) -> None:
        """The round's values into the model: quantized, or as they are."""
        if round_.quantized:
            shares = {s.parameter: s for s in round_.mine}
            mine = [shares.get(p) for p in round_.quantized]
            quantize_param_shard(
                list(round_.quantized),
                [None if s is None else values[s.at] for s in mine],
                [None if s is None else s.start for s in mine],
                self.data_parallel_group,
            )
            return
        for s in round_.mine:
            low = round_.low + s.at.start
            round_.bucket.param_data[low : low + s.at.stop - s.at.start].copy_(values[s.at])

    # Checkpoints: the tensors are Megatron's business, of the settings only the number of steps is saved and taken.

    def state_dict(self) -> dict[str, Any]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"optimizer": {"param_groups": [group | {"step": self.steps} for group in groups]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = max(int(group.get("step") or 0) for group in state_dict["optimizer"]["param_groups"])
        if "param_state" in state_dict:
            assert state_dict["param_state_sharding_type"] == "fully_reshardable"
            self.load_parameter_state_from_fully_reshardable(state_dict["param_state"])
