"""The optimizer's state in host memory while engines work on the GPU that trainer and engine share.

    to_host()   masters and moments -> pinned host memory; their GPU memory is free afterwards
    begin()     they start back, on a stream of their own, beside the forward and backward passes
    finish()    before the optimizer touches them

A checkpoint reads them where they are. The bits do not change on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class OptimizerSleep:
    """Moves the state of one Megatron optimizer that no model parameter shares its memory with."""

    def __init__(self, optimizer: Any, module: torch.nn.Module) -> None:
        self.optimizer = optimizer
        self._weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._host: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """id -> (the tensor, which this keeps alive; its place in host memory, made once)."""
        self._away: list[tuple[torch.Tensor, torch.device]] = []
        self._stream: torch.cuda.Stream | None = None
        self._under_way = False

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Masters and moments. An FP32 model's weights are their own masters, in the model's buffer: they stay."""
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    if p.untyped_storage().data_ptr() not in self._weights:
                        yield p
            for state in part.optimizer.state.values():
                yield from (t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1)

    def to_host(self) -> None:
        """All of it to host memory, done when this returns; torch's allocator holds what it took (empty_cache gives it
        back)."""
        if self._away:
            return
        tensors = list(self._tensors())
        for t in tensors:
            if id(t) not in self._host:
                self._host[id(t)] = t, torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._host[id(t)][1].copy_(t.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for t in tensors:
            self._away.append((t, t.device))
            t.data = self._host[id(t)][1]

    def begin(self) -> None:
        """Start the way back. The tensors are the GPU's again at once; what is in them counts after `finish`."""
        if not self._away:
            return
        cuda = torch.cuda.is_available()
        if cuda and self._stream is None:
            self._stream = torch.cuda.Stream()
        with torch.cuda.stream(self._stream):
            for t, device in self._away:
                t.data = self._host[id(t)][1].to(device, non_blocking=True, copy=True)
        self._away, self._under_way = [], cuda

    def finish(self) -> None:
        """Wait until all of it is back; `begin` is called where nobody has."""
        self.begin()
        if self._under_way and self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for t in self._tensors():
                t.data.record_stream(current)
        self._under_way = False
