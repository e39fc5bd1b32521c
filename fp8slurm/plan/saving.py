"""Host memory that a checkpoint takes while it is written: copies of weights and optimizer state, and what passes
through.

The arithmetic of trainer/checkpoint.py and trainer/optimizer_state.py; tests/plan compares it, rank by rank, with the
bytes that they count."""

from __future__ import annotations

from fp8slurm.config import RunConfig
from fp8slurm.plan.memory import weight_bytes
from fp8slurm.plan.parameters import StageParameters
from fp8slurm.trainer.optimizer_state import PIECE

KEYS = 3
"""FP32 tensors of a parameter in the distributed optimizer's state: master weight and two moments."""


def rank_bytes(config: RunConfig, parts: list[StageParameters], rank: int) -> int:
    """The most bytes on a rank; `parts`: one of each pipeline stage.

    Of the ranks that hold the same parameters the first writes them. With optim.distributed every rank copies its share
    of the state, and the first then takes in one FP32 tensor of all parameters after the other, in pieces."""
    layout = parts[0].layout
    p = parts[rank // (layout.world // layout.pipeline)]
    dense = rank // layout.tensor % layout.replicas == 0
    experts = rank // (layout.expert_tensor * layout.expert) % layout.expert_data == 0
    copied = p.numel(p.head_copy) if p.head_copy else 0  # the first stage writes it
    weights = (p.dense - copied) * dense + p.experts * experts
    held = weights * weight_bytes(config) * (2 if config.algorithm.kl_coef else 1)
    if not config.optim.distributed:  # FP32 weights are their own masters
        return held + weights * 4 * (KEYS if config.model.dtype == "bfloat16" else KEYS - 1)
    held += sum(b.padded // b.data for b in p.buffers) * 4 * KEYS
    most = held
    for b in p.buffers:
        share = b.padded // b.data * 4
        piece = min(PIECE * 4, share) if b.data > 1 else 0
        for _ in range(KEYS):
            if experts if b.experts else dense:
                held += (b.elements - (0 if b.experts else copied)) * 4
                most = max(most, held + piece)
            held -= share
    return most


def node_bytes(config: RunConfig, parts: list[StageParameters]) -> int:
    """The most bytes on a node: its ranks together."""
    world, here = parts[0].layout.world, config.slurm.ranks_per_node
    ranks = [rank_bytes(config, parts, rank) for rank in range(world)]
    return max(sum(ranks[first : first + here]) for first in range(0, world, here))
