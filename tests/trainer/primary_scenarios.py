"""What the ranks do with weights that claim to be in FP8: Megatron's optimizer and checkpoints are real, the claim is not."""

from __future__ import annotations

from typing import Any

import torch
from trainer_scenarios import BF16, TP2, Ranks, save, steps

from fp8slurm.fp8.policy import decide
from fp8slurm.trainer.primary_fp8 import Masters, is_primary
from fp8slurm.trainer.trainer import Trainer


def claim(trainer: Trainer) -> list[torch.nn.Parameter]:
    """Give the Linear weights the attributes by which FP8 weights are known, and the trainer the setting."""
    fp8 = trainer.config.fp8.model_copy(update={"param_gather": True})
    trainer.config = trainer.config.model_copy(update={"fp8": fp8})
    out = []
    for entry, p, _ in trainer.shards.parameters:
        if all(decide(t.name, t.shape).quantize for t in entry.tensors):
            p._rowwise_data, p._columnwise_data, p._is_2D_scaled = torch.empty(0), None, True
            out.append(p)
    return out


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


def values(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p, _ in trainer.shards.parameters]


def masters(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """Masters gathered whole, of a folder in FP32 and after steps; kept by a new optimizer; saved, lost and loaded."""
    out: dict[str, Any] = {}
    with ranks.trainer(load=False, **BF16, **sections) as t:
        plain, claimed = ranks.make("plain"), ranks.make("claimed")
        weights = claim(t)
        t.load_hf(ranks.paths["dense"])
        held = Masters(t.optimizer)
        out["mine"] = sum(end - start for _, start, end in held.own.values())
        out["all"] = sum(p.numel() for p in t.module.parameters())
        out["loaded"] = all(same(held.whole(p), p.detach()) for _, p, _ in t.shards.parameters)
        steps(t, range(2))
        out["not rounded"] = any(not torch.equal(s, s.bfloat16().float()) for s, _, _ in held.own.values())
        out["stepped"] = all(same(held.whole(p), p.detach()) for _, p, _ in t.shards.parameters)
        want = values(t)
        t.config = t.config.model_copy(update={"fp8": t.config.fp8.model_copy(update={"param_gather": False})})
        for p in weights:
            del p._rowwise_data
        save(t, plain)
        claim(t)
        with torch.no_grad():
            for p in weights:  # of FP8 weights their values are not saved, but the masters'
                p.fill_(7)
        save(t, claimed)
        shares = {p: s.clone() for p, (s, _, _) in held.own.items()}
        t.new_optimizer()
        now = Masters(t.optimizer)
        out["kept"] = all(torch.equal(now.own[p][0], s.bfloat16().float()) for p, s in shares.items())
        out["a new one"] = all(now.own[p][0].data_ptr() != s.data_ptr() for p, (s, _, _) in held.own.items())
    with ranks.trainer(load=False, **BF16, **sections) as t:
        out["weights"] = len(claim(t))
        out["claimed"] = sum(map(is_primary, t.module.parameters()))
        t.load(claimed)
        out["resumed"] = all(map(same, values(t), want))
        held = Masters(t.optimizer)
        out["resumed masters"] = all(same(held.whole(p), p.detach()) for _, p, _ in t.shards.parameters)
        resumed = steps(t, range(2, 3))
    with ranks.trainer(load=False, **BF16, **sections) as t:  # without the setting from a checkpoint with it
        t.load(claimed)
        out["other kind"] = all(map(same, values(t), want)) and steps(t, range(2, 3)) == resumed
    return out


def dp2_masters(ranks: Ranks) -> dict[str, Any]:
    return masters(ranks)


def tp2_masters(ranks: Ranks) -> dict[str, Any]:
    return masters(ranks, **TP2)
