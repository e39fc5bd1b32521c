"""Digests of raw weight bytes: what the engine holds against what it should hold.

The engine answers with one sha256 for every parameter of every tensor-parallel rank (engine/inside/plugin.py); the
other side builds the same parameters from tensors in Hugging Face form, as SGLang's loaders do, and names the first
that differs."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from fp8slurm.models.engine_layout import EngineCut, EngineLayout
from fp8slurm.models.kv_scales import engine_name, is_scale

DIGEST_ACTION = "raw_digest"
CHANGES_ACTION = "fp8slurm_changes"
"""Asks which buckets take no changes (recorded.refusals), in the place of sums."""

MOST_THREADS = 8
"""As many parameters are copied to host memory at once."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_CACHE_SCALE = re.compile(r".*\.attn\.[kv]_scale")
"""What some of SGLang's attentions scale an FP8 cache with: no weight of ours, and 1 where no checkpoint says more."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|weight_scale_inv)$")


def raw_digest(tensor: torch.Tensor) -> str:
    """sha256 (hex) of a tensor's dtype, shape and bytes, in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(flat.numpy().data)
    return digest.hexdigest()


def raw_digests(makes: Sequence[Callable[[], torch.Tensor]]) -> list[str]:
    """raw_digest of what each of these makes, several at once: sha256 releases the interpreter."""
    threads = min(MOST_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda make: raw_digest(make()), makes))


def overall(digests: Mapping[str, str]) -> str:
    """One sha256 (hex) for a set of named digests, independent of their order."""
    return hashlib.sha256("".join(f"{name}={digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def expected_digests(
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    num_key_value_heads: int,
    tensor_parallel_size: int = 1,
    tie_word_embeddings: bool = False,
    dtype: torch.dtype | None = None,
    expert_parallel_size: int = 1,
) -> list[dict[str, str]]:
    """Digests that the engine's ranks should report after loading `tensors`, one dict (engine name -> sha256) a rank.

    tensors: a whole model in Hugging Face form, in any order (FP8: X.weight and X.weight_scale_inv; experts one by
    one). dtype: what the engine casts all but codes and scales to (None: nothing is cast). expert_parallel_size: groups
    of neighbouring ranks that hold different experts. Raises ValueError if a fused parameter misses a part."""
    layout = EngineLayout(num_key_value_heads, tensor_parallel_size, expert_parallel_size)
    jobs: list[tuple[int, str, Callable[[], torch.Tensor]]] = []  # (rank, the engine's name, what it holds)
    parts: dict[str, dict[tuple[int, int], torch.Tensor]] = {}  # fused name -> (expert, position) -> tensor
    for name, tensor in tensors:
        if tie_word_embeddings and name == "lm_head.weight":
            continue
        if is_scale(name):
            name, tensor = engine_name(name), tensor.to(torch.float32).reshape(())
        elif dtype is not None and tensor.dtype != torch.float8_e4m3fn and not name.endswith("_scale_inv"):
            tensor = tensor.to(dtype)
        fused, key = _fused_name(name)
        if fused is None:
            jobs += [(rank, name, partial(_shard, layout.cut(name), tensor, rank)) for rank in range(layout.tensor)]
        else:
            parts.setdefault(fused, {})[key] = tensor
    for fused, pieces in parts.items():
        jobs += [(rank, fused, make) for rank, make in enumerate(_fuse(fused, pieces, layout))]
    ranks: list[dict[str, str]] = [{} for _ in range(tensor_parallel_size)]
    for (rank, name, _), digest in zip(jobs, raw_digests([make for _, _, make in jobs])):
        ranks[rank][name] = digest
    return ranks


def first_difference(actual: list[dict[str, str]], expected: list[dict[str, str]]) -> str | None:
    """None if both say the same for every rank, else a sentence with the first rank and parameter that differ."""
    if len(actual) != len(expected):
        return f"the engine has {len(actual)} ranks, {len(expected)} were expected"
    one = raw_digest(torch.tensor(1.0))
    for rank, (have, want) in enumerate(zip(actual, expected)):
        want = {name: one for name in have if _CACHE_SCALE.fullmatch(name)} | want
        for name in sorted(have.keys() | want.keys()):
            if name not in have:
                return f"rank {rank} of the engine has no parameter {name}"
            if name not in want:
                return f"nothing was expected for parameter {name} of the engine's rank {rank}"
            if have[name] != want[name]:
                sums = f"sha256 {have[name][:16]}, expected {want[name][:16]}"
                return f"{name} on the engine's rank {rank} differs: {sums}"
    return None


def _fused_name(name: str) -> tuple[str | None, tuple[int, int]]:
    """Engine parameter that `name` becomes a part of, and which part: (expert or 0, position)."""
    expert = _EXPERT.match(name)
    if expert:
        prefix, index, kind, suffix = expert.groups()
        return f"{prefix}.{'w2' if kind == 'down' else 'w13'}_{suffix}", (int(index), int(kind == "up"))
    for fused, names in _FUSED.items():
        for position, part in enumerate(names):
            if f".{part}." in name:
                return name.replace(f".{part}.", f".{fused}."), (0, position)
    return None, (0, 0)


def _part_names(fused: str) -> tuple[str, ...]:
    """Hugging Face names of the projections that a fused engine parameter stacks, in order."""
    if ".experts." in fused:
        return ("down_proj",) if ".w2_" in fused else ("gate_proj", "up_proj")
    return next(names for target, names in _FUSED.items() if f".{target}." in fused)


def _shard(cut: EngineCut, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """What the engine's rank `rank` keeps of a tensor."""
    if cut.dim is None:
        return tensor
    missing = cut.rows(tensor.shape[0]) - tensor.shape[0]
    if missing:
        tensor = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])
    return tensor.chunk(cut.pieces, cut.dim)[cut.piece(rank)]


def _fuse(
    fused: str, pieces: dict[tuple[int, int], torch.Tensor], layout: EngineLayout
) -> list[Callable[[], torch.Tensor]]:
    """What makes one fused parameter, for every rank: of all experts of a rank, or of one layer's matrices."""
    names = _part_names(fused)
    experts = max(expert for expert, _ in pieces) + 1
    if len(pieces) != experts * len(names):
        raise ValueError(f"{fused} is made of {experts * len(names)} tensors, only {len(pieces)} were given")
    stacked = ".experts." in fused
    cuts = [layout.cut(f"{'.experts' if stacked else ''}.{part}.") for part in names]

    def make(rank: int) -> torch.Tensor:
        held = layout.experts(rank, experts) if stacked else range(1)
        whole = torch.cat([_shard(cut, pieces[e, i], rank) for e in held for i, cut in enumerate(cuts)])
        return whole.unflatten(0, (len(held), -1)) if stacked else whole

    return [partial(make, rank) for rank in range(layout.tensor)]
