"""The distributed optimizer's state on its way into a checkpoint.

Megatron puts it together before a save is planned: whole, in FP32, on every data-parallel rank. Only the first of them
writes it, and only the plan has to be made while training waits:

    planning           tensors without data stand for the whole state
    OptimizerShards()  every rank copies its own share to host memory
    complete()         in any thread: the first rank gathers the shares, over a group that nobody else uses

The file is the same to the byte.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.core.patches import patched

PIECE = 2**24
"""Elements that are sent at once."""
Places = list[tuple[int, torch.Tensor]]
"""Parts of a tensor, in order: (position of the first element, flat tensor to be filled)."""
Items = list[tuple[Any, torch.Tensor]]
"""What a rank writes, as Megatron's writer holds it: (what it is, tensor)."""


def distributed_parts(optimizer: Any) -> list[Any]:
    """Megatron's DistributedOptimizers in `optimizer`; none without optim.distributed."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]


@contextmanager
def planning(parts: list[Any]) -> Iterator[dict[int, tuple[int, int, str]]]:
    """While it lasts the parts describe their whole state without having it: nothing is copied, sent or allocated.

    Yields a dict that then says, for every such tensor's storage, (part, buffer, key) of `OptimizerShards`.
    """
    owners: dict[int, tuple[int, int, str]] = {}

    def describe(number: int, part: Any) -> dict[Any, Any]:
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for i, ranges in enumerate(part.gbuf_ranges):
            (dtype,) = ranges
            size = part.buffers[i].numel_unpadded
            whole = {key: torch.empty(size, dtype=torch.float32, device="meta") for key in _keys(part)}
            owners.update({_storage(t): (number, i, key) for key, t in whole.items()})
            state[i] = {dtype: whole | {"numel_unpadded": size}}
        return state

    with ExitStack() as stack:
        # Megatron ends each part with a full garbage collection: half a second over all objects from before.
        gc.freeze()
        stack.callback(gc.unfreeze)
        for number, part in enumerate(parts):
            whole = partial(describe, number, part)
            stack.enter_context(patched(part, "get_parameter_state_dp_zero", lambda whole=whole, **_: whole()))
        yield owners


class OptimizerShards:
    """This rank's share of the parts' state as it is now, in host memory, FP32; `host_bytes` of it."""

    def __init__(self, parts: list[Any], groups: list[dist.ProcessGroup | None]) -> None:
        """groups: for each part a gloo group of the ranks that share it, None where it has only this rank."""
        self.groups = groups
        self.held: dict[tuple[int, int, str], list[tuple[torch.Tensor, int]]] = {}
        """(part, buffer, key) -> for every bucket its share and how many elements of the whole bucket count."""
        for number, part in enumerate(parts):
            size = part.data_parallel_group.size()
            for i, ranges in enumerate(part.gbuf_ranges):
                (buckets,) = ranges.values()
                for n, bucket in enumerate(buckets):
                    of = part.buffers[i].buckets[n]
                    share = {key: torch.zeros(of.grad_data.numel() // size) for key in _keys(part)}
                    for parameter, where in bucket["param_map"].items():
                        local, state = where["gbuf_local"], part._get_main_param_and_optimizer_states(parameter)
                        for key, to in share.items():
                            to[local.start : local.end].copy_(state[key].detach())
                    for key, t in share.items():
                        self.held.setdefault((number, i, key), []).append((t, of.numel_unpadded))

    @property
    def host_bytes(self) -> int:
        return sum(t.nbytes for buckets in self.held.values() for t, _ in buckets)

    def complete(self, items: Items, owners: dict[int, tuple[int, int, str]]) -> int:
        """Give the items that were planned without data theirs; all ranks together, in any thread. The shares go.

        Returns the most bytes of host memory that shares and items took.
        """
        waiting: dict[tuple[int, int, str], list[tuple[int, int]]] = {}
        for i, (_, tensor) in enumerate(items):
            if tensor.is_meta:
                assert tensor.is_contiguous(), "a piece of the state that is not in one piece"
                waiting.setdefault(owners[_storage(tensor)], []).append((int(tensor.storage_offset()), i))
        held = most = self.host_bytes + sum(t.nbytes for _, t in items if not t.is_meta)
        for owner in list(self.held):
            buckets, group = self.held.pop(owner), self.groups[owner[0]]
            to: Places = []
            for offset, i in sorted(waiting.get(owner, ())):
                items[i] = (items[i][0], torch.empty(items[i][1].shape))
                to.append((offset, items[i][1].view(-1)))
                held += items[i][1].nbytes
            passing = max(min(PIECE, t.numel()) * 4 for t, _ in buckets) if to and group is not None else 0
            most = max(most, held + passing)
            _gather(group, buckets, to)
            held -= sum(t.nbytes for t, _ in buckets)
            del buckets
        return most


def _gather(group: dist.ProcessGroup | None, buckets: list[tuple[torch.Tensor, int]], to: Places) -> None:
    """Send the shares of one tensor to the group's first rank, piece by piece, which puts them where they belong."""
    start = 0  # of the bucket: they stand one behind the other, without their padding
    for share, elements in buckets:
        end, first = start + elements, group is None or group.rank() == 0
        if first:
            _put(share, start, end, to)
        elif group is not None:
            for piece in share.split(PIECE):
                dist.send(piece, dist.get_global_rank(group, 0), group)
        if group is not None and first:
            buffer = torch.empty(min(PIECE, share.numel()))
            for rank in range(1, group.size()):
                at = start + rank * share.numel()
                for size in (len(piece) for piece in share.split(PIECE)):
                    dist.recv(buffer[:size], dist.get_global_rank(group, rank), group)
                    _put(buffer[:size], at, end, to)
                    at += size
        start = end


def _put(piece: torch.Tensor, at: int, end: int, to: Places) -> None:
    """Copy what stands at positions [at, end) of the whole tensor into the parts of it that `to` has."""
    end = min(end, at + len(piece))
    for i in range(max(0, bisect_right(to, at, key=lambda place: place[0]) - 1), len(to)):
        offset, tensor = to[i]
        if offset >= end:
            break
        a, b = max(at, offset), min(end, offset + len(tensor))
        if a < b:
            tensor[a - offset : b - offset].copy_(piece[a - at : b - at])


def save_groups(parts: list[Any]) -> list[dist.ProcessGroup | None]:
    """For each part a gloo group of its data-parallel ranks, None where that is one rank; all ranks together."""
    from fp8slurm.trainer.start import TIMEOUT

    own = [tuple(dist.get_process_group_ranks(part.data_parallel_group)) for part in parts]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    made = {}
    for ranks in sorted({ranks for one in everyone for ranks in one if len(ranks) > 1}):
        made[ranks] = dist.new_group(list(ranks), timeout=TIMEOUT, backend="gloo")
    return [made.get(ranks) for ranks in own]


def _keys(part: Any) -> tuple[str, ...]:
    return ("param", *part.optimizer_state_keys)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
