"""Scales of the engines' FP8 KV cache, from the keys and values that the trainer's attention sees.

Keys after norm and rotary embedding, and values, pass by on their way into attention (a hook before every layer's
core attention). Their largest magnitudes by layer, over micro-batches and all ranks, give the scales of the next update
(fp8/kv_cache.py): the engines then have new weights and the scales of the step before, which HEADROOM covers.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fp8slurm.checkpoint.formats.kv_scales import FILE, read_scales, scales_in
from fp8slurm.config import RunConfig
from fp8slurm.core.files import write_atomic
from fp8slurm.fp8.block import E4M3_MAX
from fp8slurm.fp8.kv_cache import scale_of, through_cache
from fp8slurm.models.kv_scales import scale_entries
from fp8slurm.models.spec import ModelSpec
from fp8slurm.trainer.weights import HfReader

log = logging.getLogger(__name__)


class KvScales:
    """A training rank's; all ranks have those of all layers."""

    def __init__(self, config: RunConfig, spec: ModelSpec, module: torch.nn.Module) -> None:
        """module: this rank's layers, whose attention is watched from now on.

        InputError, BadCheckpoint: model.rollout_checkpoint, where scales begin with its, cannot be read."""
        self.calibrated, self.quantized = config.engine.kv_scales == "calibrated", config.train.quantize_kv
        first = torch.ones(spec.num_layers, 2)
        folder = config.model.rollout_checkpoint
        if folder is not None and config.engine.kv_scales != "unit":
            first = scales_in(HfReader(folder), first)
        device = next(module.parameters()).device
        self.values = first.to(device)
        """float32 [layers, 2]: of keys and of values, as the engines have them."""
        self._amax = torch.zeros(spec.num_layers, 2, device=device)
        self._one = torch.ones((), device=device)
        self._held: list[int] = []
        for layer in module.decoder.layers:  # type: ignore[union-attr]
            number = int(layer.layer_number) - 1
            self._held.append(number)
            layer.self_attention.core_attention.register_forward_pre_hook(partial(self._pass, number))

    def _pass(self, layer: int, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the core attention of a layer: inputs are q [T, heads, d], k and v [T, groups, d], and others."""
        q, k, v, *others = inputs
        with torch.no_grad():
            amax = torch.stack([torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32) for x in (k, v)])
            torch.maximum(self._amax[layer], amax, out=self._amax[layer])
        if not self.quantized:
            return None
        scales = (self._one, self.values[layer, 0], self.values[layer, 1])
        return (*(_Rounded.apply(x, scale) for x, scale in zip((q, k, v), scales)), *others)

    def forget(self) -> None:
        """Leave out what has passed since the last `advance`: it was none of a step's tokens."""
        self._amax.zero_()

    def advance(self) -> dict[str, float]:
        """New scales, from what has passed since the last call, on all ranks; where nothing has they stay.

        Metrics: the largest key and value as a share of what the old scales could hold, over all layers; above 1 the
        engines cut it off."""
        amax = torch.where(self._amax.isfinite(), self._amax, 0.0)  # a step with NaN is skipped
        dist.all_reduce(amax, op=dist.ReduceOp.MAX)
        full = (amax / (E4M3_MAX * self.values)).amax(0).tolist()
        if self.calibrated:
            self.values.copy_(scale_of(amax, self.values))
        self.forget()
        return {"kv_cache/k_full": full[0], "kv_cache/v_full": full[1]}

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(global name, scale [1]) of this rank's layers, as updates send them."""
        for layer in self._held:
            for i, entry in enumerate(scale_entries(layer)):
                yield entry.name, self.values[layer, i : i + 1]

    def write(self, folder: Path) -> None:
        """Into a checkpoint's folder; one rank does. OSError."""
        write_atomic(folder / FILE, json.dumps({"scales": self.values.tolist()}))

    def read(self, folder: Path) -> None:
        """Those of a checkpoint, if it has any and they are the run's to change. BadCheckpoint: the file is not what
        `write` made."""
        if not self.calibrated or not (folder / FILE).is_file():
            return
        self.values.copy_(read_scales(folder / FILE, len(self.values)))


class _Rounded(torch.autograd.Function):
    """Rounded as in the cache; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return through_cache(x, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None
