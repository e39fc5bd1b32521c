"""What the ranks do with FP8 primary weights and Adam in host memory: Megatron is real, the FP8 weights are emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from trainer_reference import cross_entropy
from trainer_scenarios import TP2, Ranks, batches, save, steps

from fp8slurm.cpu import megatron
from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.quantize import quantize
from fp8slurm.trainer.optimizer_state import distributed_parts
from fp8slurm.trainer.trainer import Trainer

KINDS = [(gather, offload) for gather in (False, True) for offload in (False, True)]
EP2 = {"parallel": {"expert_parallel_size": 2}}


def kind(gather: bool, offload: bool, **sections: Any) -> dict[str, Any]:
    """Settings; without clipping, whose norm is another sum where the buffers are others."""
    fp8 = {"backend": "emulated", "param_gather": gather}
    optim = {"cpu_offload": offload, "clip_grad": 0.0, "weight_decay": 0.1}
    return {"fp8": fp8, "optim": optim, "model": {"dtype": "bfloat16"}} | sections


def state(t: Trainer) -> dict[str, torch.Tensor]:
    """Masters and moments, whole, and codes and scales or values of every parameter of this rank, as bytes."""
    out = {}
    for part in distributed_parts(t.optimizer):
        mine = {p for ps in part.model_float16_groups for p in ps}
        within = {p for buffer in part.buffers for p in buffer.params}
        for entry, p, _ in t.shards.parameters:
            if p not in within:
                continue
            where = part._get_model_param_range_map(p)["param"] if p in mine else None
            held = part._get_main_param_and_optimizer_states(p) if where else {}
            for key in ("param", "exp_avg", "exp_avg_sq"):
                whole = torch.zeros(p.numel())
                if where:
                    whole[where.start : where.end] = held[key].detach()
                dist.all_reduce(whole.view(torch.uint8), group=part.data_parallel_group)
                out[f"{entry.name}/{key}"] = whole
    for name, shard in t.named_shards():
        if isinstance(shard, BlockFP8):
            out |= {f"{name}/codes": shard.data.view(torch.uint8).clone(), f"{name}/scales": shard.scale_inv.clone()}
        else:
            out[f"{name}/value"] = shard.clone()
    return out


def gradients(t: Trainer) -> dict[str, torch.Tensor]:
    """Of every parameter, on the first data; no step is made."""
    t._gradients(batches(t), cross_entropy, False)
    return {entry.name: p.main_grad.clone() for entry, p, _ in t.shards.parameters}


def quantized(found: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What BF16 weights are as FP8 ones, where `like` has those."""
    out = dict(found)
    for key in like:
        if key.endswith("/codes") and key not in found:
            name = key.removesuffix("/codes")
            q = quantize(out.pop(f"{name}/value"))
            out |= {key: q.data.view(torch.uint8), f"{name}/scales": q.scale_inv}
    return out


def unlike(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names whose bytes differ, or that only one of them has."""
    both = a.keys() & b.keys()
    return sorted(a.keys() ^ b.keys()) + sorted(k for k in both if not torch.equal(a[k], b[k]))


@contextmanager
def many_rounds() -> Iterator[None]:
    """Of a small model, and parameters that are cut."""
    megatron.install()  # before Megatron, which host_adam imports, is imported
    from fp8slurm.trainer import host_adam

    before, host_adam.PIECE = host_adam.PIECE, 2**14
    try:
        yield
    finally:
        host_adam.PIECE = before


def against_hybrid(ranks: Ranks, folder: str = "dense", **sections: Any) -> dict[str, Any]:
    """After one step and twenty: what differs from Megatron's CPU-offloaded Adam of BF16 weights, which quantizes them
    for every product."""
    kept, losses, out = {}, {}, {}
    for gather in (False, True):
        with many_rounds(), ranks.trainer(folder, **kind(gather, True, **sections)) as t:
            losses[gather] = [loss for loss, _, _ in steps(t, range(1))]
            kept[gather, 1] = state(t)
            losses[gather] += [loss for loss, _, _ in steps(t, range(1, 20))]
            kept[gather, 20] = state(t)
            if gather:
                parts = distributed_parts(t.optimizer)
                assert all(type(part).__name__ == "HostAdam" for part in parts)
                out["rounds"] = [len(part._rounds) for part in parts]
                out["moved"] = len(unlike(kept[True, 1], kept[True, 20]))
                out["fp8"] = len(t.primary_fp8)
    for n in (1, 20):
        out[f"unlike {n}"] = unlike(quantized(kept[False, n], kept[True, n]), kept[True, n])
    out["codes"] = sum(key.endswith("/codes") for key in kept[True, 20])
    out["losses"] = losses[False] == losses[True]
    return out


def dense(ranks: Ranks) -> dict[str, Any]:
    return against_hybrid(ranks)


def ep2(ranks: Ranks) -> dict[str, Any]:
    return against_hybrid(ranks, "moe", **EP2)


def changes(ranks: Ranks) -> dict[str, Any]:
    """Each kind of weights and Adam continued as each: what differs in state and gradients, and a step that is made."""
    saved, after, out = {}, {}, {"folder": [], "state": [], "gradients": [], "losses": [], "kernel": []}
    for one in KINDS:
        with ranks.trainer(**kind(*one)) as t:
            fresh = gradients(t)
            steps(t, range(2))
            save(t, ranks.make(f"{one}"))
            saved[one] = fresh, state(t), gradients(t), [loss for loss, _, _ in steps(t, range(2, 4))]
    fp8 = saved[True, True][1]
    for (
        one
    ) in KINDS:  # the same values in whatever form: the same gradients, the data's too, which the first layers show
        out["folder"] += unlike(saved[one][0], saved[False, False][0])
    for one in KINDS:
        fresh, left, then, losses = saved[one]
        for other in KINDS:
            with ranks.trainer(load=False, **kind(*other)) as t:
                t.load(ranks.folder / f"{one}")
                out["state"] += [f"{one} {other} {k}" for k in unlike(quantized(state(t), fp8), quantized(left, fp8))]
                out["gradients"] += [f"{one} {other} {k}" for k in unlike(gradients(t), then)]
                # the first is before the update, the second after one: by the same kernel the same
                again = [loss for loss, _, _ in steps(t, range(2, 4))]
                out["losses"].append(again == losses if one[1] == other[1] else again[0] == losses[0])
                after[other] = state(t)
        out["kernel"] += unlike(quantized(after[False, True], fp8), after[True, True])
    out["smallest"] = min(float(g.norm()) for g in saved[True, True][2].values())
    return out


def other_layout(ranks: Ranks) -> None:
    """Saved by two data-parallel ranks, continued and saved again by two tensor-parallel ones."""
    for name, layout in (("dp2", {}), ("tp2", TP2)):
        with many_rounds(), ranks.trainer(load=name == "dp2", **kind(True, True, **layout)) as t:
            path = ranks.make(name)
            if name == "dp2":
                steps(t, range(2))
            else:
                t.load(ranks.folder / "dp2")
            save(t, path)
            assert steps(t, range(2, 3))
