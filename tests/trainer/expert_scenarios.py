"""What the ranks of a launch do with mixtures of experts."""

from __future__ import annotations

from typing import Any

import torch
from trainer_reference import AUX_LOSS, LR, cross_entropy, pack, routing
from trainer_scenarios import (
    BF16,
    FP8,
    OFFLOAD,
    Ranks,
    batches,
    continue_here,
    quantized_weights,
    resume_exactly,
    save_before_any_step,
    save_here,
    snapshot_bytes,
    steps,
    train,
    weights,
)

from fp8slurm.core.types import PackedBatch
from fp8slurm.trainer.trainer import Trainer

EP2 = {"parallel": {"expert_parallel_size": 2}}
TP2 = {"parallel": {"tensor_parallel_size": 2, "sequence_parallel": True}}
ETP2 = {"parallel": TP2["parallel"] | {"expert_tensor_parallel_size": 2}}
TP2EP2 = {"parallel": TP2["parallel"] | EP2["parallel"]}
PP2EP2 = {"parallel": EP2["parallel"] | {"pipeline_parallel_size": 2}}
CP2EP2 = {"parallel": EP2["parallel"] | {"context_parallel_size": 2}}
REPLAY = {"rollout": {"routing_replay": True}}
BALANCED = {"moe": {"aux_loss_coef": AUX_LOSS}}
RECOMPUTED = {"train": {"recompute": "full"}}


def replayed(trainer: Trainer, seed: int) -> list[PackedBatch]:
    """This rank's packs, each with the routing that all tests use."""
    share = batches(trainer, seed)
    for batch in share:
        batch.routing = routing(batch)
    return share


def train_replayed(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """As `train`, with given routing; and log-probabilities of the model's own choice, after all that."""
    with ranks.trainer(folder="moe", **REPLAY, **sections) as trainer:
        before = trainer.logprobs(replayed(trainer, 0))
        history = []
        first: list[torch.Tensor] = []
        for seed in range(3):
            keep = None if seed else first.extend
            result = trainer.train_step(replayed(trainer, seed), cross_entropy, LR, before_update=keep)
            history.append([result.loss, result.grad_norm, result.metrics["tokens"]])
        after = trainer.logprobs(replayed(trainer, 0))
        return {"before": before, "first": first, "steps": history, "after": after}


def train_balanced(ranks: Ranks, **sections: Any) -> dict[str, Any]:
    """[loss, grad norm] of a step with the load-balancing loss, and what it says about the balance."""
    with ranks.trainer(folder="moe", **BALANCED, **sections) as trainer:
        result = trainer.train_step(batches(trainer), cross_entropy, LR)
        again = trainer.train_step(batches(trainer), cross_entropy, 0.0)
        return {
            "step": [result.loss, result.grad_norm],
            "aux": result.metrics["moe/aux_loss"],
            "second": again.metrics["moe/aux_loss"],
        }


# One rank.


def one_rank(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe")


def one_rank_fused(ranks: Ranks) -> dict[str, Any]:
    with ranks.trainer(folder="fused") as trainer:
        return {"before": trainer.logprobs(batches(trainer))}


def one_rank_not_normalized(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="not_normalized")


def one_rank_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **FP8)


def fp8_layers(ranks: Ranks) -> dict[str, Any]:
    return quantized_weights(ranks, folder="moe", **FP8)


def few_tokens(ranks: Ranks) -> dict[str, Any]:
    """A step on a pack of two tokens, which leaves experts without any."""
    with ranks.trainer(folder="moe", **FP8, **BF16) as trainer:
        result = trainer.train_step([pack([2], 0)], cross_entropy, LR)
        return {"ok": result.ok, "loss": result.loss}


def one_rank_balanced(ranks: Ranks) -> dict[str, Any]:
    return train_balanced(ranks)


def one_rank_replayed(ranks: Ranks) -> dict[str, Any]:
    return train_replayed(ranks)


def one_rank_replayed_recomputed(ranks: Ranks) -> dict[str, Any]:
    return train_replayed(ranks, **RECOMPUTED)


def replay_is_only_replay(ranks: Ranks) -> dict[str, Any]:
    """Log-probabilities with replay switched on but without a routing, and of a reference model, which has its own."""
    with ranks.trainer(folder="moe", **REPLAY) as trainer:
        trainer.snapshot_reference()
        reference = trainer.logprobs(replayed(trainer, 0), reference=True)
        chosen = trainer.logprobs(replayed(trainer, 0))
        return {"own": trainer.logprobs(batches(trainer)), "reference": reference, "replayed": chosen}


def save_one_rank(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "one", folder="moe")


def offloaded(ranks: Ranks) -> dict[str, Any]:
    """Four steps with Adam on the host and with the ordinary one: steps, weights, what both optimizers hold."""
    out = {}
    for name, sections in (("offloaded", OFFLOAD), ("ordinary", {})):
        with ranks.trainer(folder="moe", **FP8, **BF16, **sections) as trainer:
            history = steps(trainer, range(4))
            masters = []
            for part in trainer.optimizer.chained_optimizers:
                for p, state in part.optimizer.state.items():
                    masters.append(state.get("master_param", p).detach().clone())
            out[name] = {"steps": history, "weights": weights(trainer), "masters": masters}
            out[name]["dtypes"] = sorted({str(p.dtype) for _, p, _ in trainer.shards.parameters})
    return out


def offloaded_resume(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, folder="moe", **FP8, **BF16, **OFFLOAD)


def offloaded_before_any_step(ranks: Ranks) -> dict[str, Any]:
    return save_before_any_step(ranks, folder="moe", **BF16, **OFFLOAD)


def ep2_offloaded_resume(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, folder="moe", **EP2, **FP8, **BF16, **OFFLOAD)


def save_one_rank_offloaded(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "one_offloaded", folder="moe", **BF16, **OFFLOAD)


def one_to_ep2_offloaded(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one_offloaded", folder="moe", **EP2, **BF16, **OFFLOAD)


def one_to_ep2_ordinary(ranks: Ranks) -> dict[str, Any]:
    """From an offloaded Adam to the ordinary one."""
    return continue_here(ranks, "one_offloaded", folder="moe", **EP2, **BF16)


# Two ranks.


def ep2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **EP2)


def ep2_plain_optimizer(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", optim={"distributed": False}, **EP2)


def etp2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **ETP2)


def ep2_fp8(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **EP2, **FP8)


def ep2_fp8_layers(ranks: Ranks) -> dict[str, Any]:
    return quantized_weights(ranks, folder="moe", **EP2, **FP8)


def ep2_balanced(ranks: Ranks) -> dict[str, Any]:
    return train_balanced(ranks, **EP2)


def cp2ep2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **CP2EP2)


def cp2ep2_balanced(ranks: Ranks) -> dict[str, Any]:
    return train_balanced(ranks, **CP2EP2)


def ep2_resume(ranks: Ranks) -> dict[str, Any]:
    return resume_exactly(ranks, folder="moe", **EP2, **FP8, **BF16)


def ep2_snapshot_bytes(ranks: Ranks) -> dict[str, Any]:
    return snapshot_bytes(ranks, folder="moe", **EP2, **FP8, **BF16)


def save_ep2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "ep2", folder="moe", **EP2)


def one_to_ep2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one", folder="moe", **EP2)


def one_to_tp2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "one", folder="moe", **TP2)


def ep2_to_tp2(ranks: Ranks) -> dict[str, Any]:
    ranks.paths["ep2"] = ranks.folder / "ep2"
    return continue_here(ranks, "ep2", folder="moe", **TP2)


def ep2_to_etp2(ranks: Ranks) -> dict[str, Any]:
    ranks.paths["ep2"] = ranks.folder / "ep2"
    return continue_here(ranks, "ep2", folder="moe", **ETP2)


# Four ranks.


def tp2ep2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **TP2EP2)


def pp2ep2(ranks: Ranks) -> dict[str, Any]:
    return train(ranks, folder="moe", **PP2EP2)


def tp2ep2_replayed(ranks: Ranks) -> dict[str, Any]:
    return train_replayed(ranks, **TP2EP2)


def pp2ep2_replayed_recomputed(ranks: Ranks) -> dict[str, Any]:
    return train_replayed(ranks, **PP2EP2, **RECOMPUTED)


def cp2dp2ep2_replayed_recomputed(ranks: Ranks) -> dict[str, Any]:
    return train_replayed(ranks, **CP2EP2, **RECOMPUTED)


def tp2ep2_balanced(ranks: Ranks) -> dict[str, Any]:
    return train_balanced(ranks, **TP2EP2)


def pp2ep2_balanced(ranks: Ranks) -> dict[str, Any]:
    return train_balanced(ranks, **PP2EP2)


def ep2_to_tp2ep2(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "ep2", folder="moe", **TP2EP2)


def save_pp2ep2(ranks: Ranks) -> dict[str, Any]:
    return save_here(ranks, "pp2ep2", folder="moe", **PP2EP2)


# Back on one rank.


def ep2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "ep2", folder="moe")


def pp2ep2_to_one(ranks: Ranks) -> dict[str, Any]:
    return continue_here(ranks, "pp2ep2", folder="moe")
