"""What ranks do with tokens that an exact engine has decoded: compare, in this layout and in that, and with faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trainer_scenarios import Ranks

from fp8slurm.core.types import PackedBatch, Prompt, Sample, SampleGroup
from fp8slurm.rl.packing import pack
from fp8slurm.rl.recompute import ImpossibleGap, check_equal, recompute
from fp8slurm.trainer.trainer import Trainer

EXACT = {"model": {"dtype": "bfloat16", "exact": True}, "fp8": {"backend": "emulated"}}
REPLAY = {"rollout": {"routing_replay": True}}
MIXTURE = {"model": "mixture", "source": "samples_mixture"}


def sampled(ranks: Ranks, temperature: float, source: str = "samples", routing: bool = False) -> list[SampleGroup]:
    """What the engine decoded at this temperature (0: greedy), a group each; with the experts of its tokens."""
    rows = json.loads((ranks.paths[source]).read_text())
    groups = []
    for i, r in enumerate(rows):
        if r["temperature"] == temperature:
            sample = Sample(r["ids"], r["logprobs"], [0] * len(r["ids"]), r["finish"])
            if routing:
                sample.routing = torch.tensor(r["routing"], dtype=torch.uint8).view(
                    len(r["prompt"]) + len(r["ids"]) - 1, 2, -1
                )
            groups.append(SampleGroup(Prompt(i, tuple(r["prompt"]), ""), [sample]))
    return groups


def packed(trainer: Trainer, groups: list[SampleGroup], temperature: float, tokens: int = 2048) -> list[PackedBatch]:
    """This data-parallel rank's micro-batches. What is greedy has its log-probability at temperature 1."""
    ((*ranks,),) = pack(
        groups, [[1.0]] * len(groups), updates=1, data_parallel_size=trainer.data_parallel_size,
        tokens_per_micro_batch=tokens, pad_multiple=trainer.pad_multiple,
    )  # fmt: skip
    for batch in ranks[trainer.data_parallel_rank]:
        batch.temperature = temperature or 1.0
    return ranks[trainer.data_parallel_rank]


def compared(trainer: Trainer, groups: list[SampleGroup], batches: list[PackedBatch]) -> str:
    """What the check of a run says of these batches, "" if it passes."""
    recompute(trainer, batches)
    try:
        check_equal(trainer, batches, groups, 3)
    except ImpossibleGap as error:
        assert not error.permanent
        return str(error)
    return ""


def unequal_in_training(trainer: Trainer, batches: list[PackedBatch], lr: float) -> tuple[int, int, float]:
    """(tokens, those that a training step sees another log-probability of, gradient norm)."""

    def loss(logprobs: torch.Tensor, entropy: Any, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert entropy is not None
        differ = batch.loss_mask & (logprobs.detach() != batch.rollout_logprobs)
        return -(logprobs * batch.loss_weights).sum(), {"differ": differ.sum(), "tokens": batch.loss_mask.sum()}

    result = trainer.train_step(batches, loss, lr, with_entropy=True)
    return int(result.metrics["tokens"]), int(result.metrics["differ"]), result.grad_norm


def layout(
    ranks: Ranks, budgets: tuple[int, ...] = (2048,), source: str = "samples", model: str = "model",
    **sections: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What the check says at every temperature and size of a pack, and what a training step sees."""
    said: list[str] = []
    routing = "rollout" in sections
    with ranks.trainer(model, **EXACT | sections) as trainer:
        for temperature in (0.7, 1.0, 0.0):
            groups = sampled(ranks, temperature, source, routing)
            said += [compared(trainer, groups, packed(trainer, groups, temperature, size)) for size in budgets]
        training = unequal_in_training(trainer, packed(trainer, sampled(ranks, 0.7, source, routing), 0.7), 0.0)
    return {"said": said, "training": list(training)}


def one_rank(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks, budgets=(256, 4096))


def recomputed(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks, train={"recompute": "full"})


def two_stages(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks, parallel={"pipeline_parallel_size": 2})


def two_replicas(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks)


def two_contexts(ranks: Ranks) -> dict[str, Any]:
    """Each rank has a part of every sequence, and gathers the keys of the other."""
    return layout(ranks, parallel={"context_parallel_size": 2})


def two_shards(ranks: Ranks) -> dict[str, Any]:
    """Against an engine of two tensor-parallel ranks."""
    return layout(ranks, source="samples_tp2", parallel={"tensor_parallel_size": 2})


def two_shards_of_sequences(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks, source="samples_tp2", parallel={"tensor_parallel_size": 2, "sequence_parallel": True})


def mixture(ranks: Ranks) -> dict[str, Any]:
    """A mixture of experts. Nothing is replayed: the trainer's routers have to choose what the engine's chose."""
    return layout(ranks, budgets=(512,), **MIXTURE)


def mixture_replayed(ranks: Ranks) -> dict[str, Any]:
    """With the engine's choice compared with the trainer's, and recomputation."""
    return layout(ranks, **MIXTURE, **REPLAY, train={"recompute": "full"})


def two_expert_ranks(ranks: Ranks) -> dict[str, Any]:
    """Tokens go to the experts of the other rank and come back."""
    return layout(ranks, **MIXTURE, **REPLAY, parallel={"expert_parallel_size": 2})


def two_stages_of_experts(ranks: Ranks) -> dict[str, Any]:
    return layout(ranks, **MIXTURE, **REPLAY, parallel={"pipeline_parallel_size": 2})


def gradients(ranks: Ranks, model: str = "model", source: str = "samples") -> list[list[float]]:
    """For each parameter: distance of the exact gradient to the ordinary emulation's, and of that to BF16's."""
    found = []
    for sections in (EXACT, EXACT | {"model": {"dtype": "bfloat16"}}, {"model": {"dtype": "bfloat16"}}):
        with ranks.trainer(model, **sections) as trainer:
            unequal_in_training(trainer, packed(trainer, sampled(ranks, 1.0, source), 1.0), 0.0)
            found.append([p.main_grad.clone() for p in trainer.module.parameters()])
    return [[float((a - b).norm()), float((b - c).norm())] for a, b, c in zip(*found, strict=True)]


def mixture_gradients(ranks: Ranks) -> list[list[float]]:
    return gradients(ranks, **MIXTURE)


def stock_activations(x: torch.Tensor) -> Any:
    """SGLang's own formula, as its emulation has it: scale = amax / 448, code = x / scale."""
    from fp8slurm.cpu import exact
    from fp8slurm.fp8 import BLOCK

    groups = x.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=1e-10).div_(448.0)
    codes = groups.div(scale).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
    return exact.Blocks(codes.double().flatten(-2), scale[..., 0].double())


@contextmanager
def replaced(owner: Any, attribute: str, new: Any) -> Any:
    before = getattr(owner, attribute)
    setattr(owner, attribute, new)
    yield
    setattr(owner, attribute, before)


def mixture_faults(ranks: Ranks) -> dict[str, str]:
    """What the check says where the engine's experts are replayed and something else of a mixture is not the engine's."""
    from fp8slurm.cpu import exact

    weights, choose = exact.expert_weights, exact.top_experts

    def of_rounded_logits(logits: torch.Tensor, *how: Any) -> torch.Tensor:
        return weights(logits.bfloat16().float(), *how)

    def of_rounded_parts(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        parts = (outputs.float() * weights[..., None]).to(outputs.dtype)
        return parts.float().sum(1).to(outputs.dtype)

    said = {}
    with ranks.trainer("mixture", **EXACT | REPLAY) as trainer:
        groups = sampled(ranks, 0.7, MIXTURE["source"], routing=True)

        def check(name: str, within: Any) -> None:
            with within:
                said[name] = compared(trainer, groups, packed(trainer, groups, 0.7))

        check("weights of BF16 logits", replaced(exact, "expert_weights", of_rounded_logits))
        check("parts rounded before the sum", replaced(exact, "combine", of_rounded_parts))
        check("other experts", replaced(exact, "top_experts", lambda logits, k: choose(-logits, k)))
        router = trainer.module.decoder.layers[1].mlp.router.weight
        before = router.detach().clone()
        router.data[3].mul_(1.0625)
        check("router", nullcontext())
        router.data.copy_(before)
        check("nothing", nullcontext())
    return said


def faults(ranks: Ranks) -> dict[str, str]:
    """What the check says of each fault, made on one side."""
    from fp8slurm.cpu import exact
    from fp8slurm.cpu.exact_layers import ExactRotary

    said = {}
    with ranks.trainer("model", **EXACT) as trainer:
        groups, weights = sampled(ranks, 0.7), [p.detach().clone() for p in trainer.module.parameters()]
        layer = trainer.module.decoder.layers[0]

        def check(name: str, change: Callable[[], Any], within: Any = None, temperature: float = 0.7) -> None:
            with within or nullcontext():
                change()
                trainer.weights_changed()
                said[name] = compared(trainer, groups, packed(trainer, groups, temperature))
            for p, before in zip(trainer.module.parameters(), weights):
                p.data.copy_(before)

        def nothing() -> None:
            pass

        check("quantizer", nothing, replaced(exact, "activations", stock_activations))
        check("weights", lambda: layer.mlp.linear_fc2.weight.data[:, :128].mul_(1.125))
        check("rope", nothing, replaced(trainer.module, "rotary_pos_emb", ExactRotary(10001.0, 128)))
        check("temperature", nothing, temperature=0.71)
        check("missed update", lambda: unequal_in_training(trainer, packed(trainer, groups, 0.7), 1e-3))
        trainer.weights_changed()
        assert compared(trainer, groups, packed(trainer, groups, 0.7)) == "", "a fault was left in"
        right = list(groups)
        groups[:] = [SampleGroup(Prompt(g.prompt.index, g.prompt.token_ids[1:], ""), g.samples) for g in right]
        said["chat template"] = compared(trainer, groups, packed(trainer, groups, 0.7))
    return said
