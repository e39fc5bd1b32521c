"""Sample groups as one uint8 tensor: a JSON header and raw arrays, so that nothing that travels can execute anything.

    8 bytes magic | uint64 header length | header (JSON, UTF-8) | zero padding to 8 bytes
    int32 prompt tokens of all groups | of all samples: int32 response tokens, int32 weight versions, float32 logprobs
    | of all samples that have one: routing, uint8 or int16 as the header says

All numbers are little-endian.
"""

from __future__ import annotations

import json
import math
from itertools import chain
from typing import Any

import numpy as np
import torch

from fp8slurm.core.types import Prompt, Sample, SampleGroup

MAGIC = b"f8sgrp01"
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")
_ROUTING = {torch.uint8: np.dtype("u1"), torch.int16: np.dtype("<i2")}


def encode_groups(groups: list[SampleGroup]) -> torch.Tensor:
    """uint8 [bytes]. Log-probabilities are rounded to float32; OverflowError for token ids or versions beyond int32."""
    samples = [s for g in groups for s in g.samples]
    for s in samples:
        assert len(s.response_ids) == len(s.weight_versions) == len(s.logprobs), "per-token lists differ in length"
    text = json.dumps([_header(g) for g in groups]).encode()
    start = len(MAGIC) + 8 + len(text)
    parts = [
        MAGIC + len(text).to_bytes(8, "little") + text + bytes(-start % 8),
        _raw(chain.from_iterable(g.prompt.token_ids for g in groups), _INT),
        _raw(chain.from_iterable(s.response_ids for s in samples), _INT),
        _raw(chain.from_iterable(s.weight_versions for s in samples), _INT),
        _raw(chain.from_iterable(s.logprobs for s in samples), _FLOAT),
        *(r.numpy().astype(_ROUTING[r.dtype]).tobytes() for r in (s.routing for s in samples) if r is not None),
    ]
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def decode_groups(data: torch.Tensor) -> list[SampleGroup]:
    """The groups in an uint8 [bytes] tensor. ValueError: not what encode_groups wrote."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"sample groups: a flat uint8 tensor is expected, not {data.dtype} {tuple(data.shape)}")
    raw = data.contiguous().cpu().numpy().tobytes()
    if len(raw) < 16 or raw[:8] != MAGIC:
        raise ValueError(f"sample groups: {len(raw)} bytes that do not start with {MAGIC!r}")
    length = int.from_bytes(raw[8:16], "little")
    if length > len(raw) - 16:
        raise ValueError(f"sample groups: a header of {length} bytes in {len(raw)}")
    try:
        header = json.loads(raw[16 : 16 + length])
        prompts = [_count(g["tokens"]) for g in header]
        responses = [_count(s["tokens"]) for g in header for s in g["samples"]]
        start = 16 + length + (-(16 + length)) % 8
        routings = [_routing_form(s) for g in header for s in g["samples"]]
        expected = start + 4 * (sum(prompts) + 3 * sum(responses))
        expected += sum(dtype.itemsize * math.prod(shape) for dtype, shape in filter(None, routings))
        if expected != len(raw):
            raise ValueError(f"{len(raw)} bytes, the header says {expected}")
        prompt_ids, start = _lists(raw, start, prompts, _INT)
        response_ids, start = _lists(raw, start, responses, _INT)
        versions, start = _lists(raw, start, responses, _INT)
        logprobs, start = _lists(raw, start, responses, _FLOAT)
        routing, start = _tensors(raw, start, routings)
        groups, at = [], 0
        for ids, g in zip(prompt_ids, header):
            group = SampleGroup(Prompt(index=int(g["index"]), token_ids=tuple(ids), label=str(g["label"])))
            for s in g["samples"]:
                sample = Sample(
                    response_ids[at], logprobs[at], versions[at], str(s["finish_reason"]), routing=routing[at]
                )
                sample.text, sample.reward, sample.train = str(s["text"]), float(s["reward"]), bool(s["train"])
                group.samples.append(sample)
                at += 1
            groups.append(group)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"sample groups: {error}") from None
    return groups


def _raw(values: Any, dtype: np.dtype) -> bytes:
    return np.array(list(values), dtype=dtype).tobytes()


def _header(group: SampleGroup) -> dict[str, Any]:
    """All of a group but its arrays."""
    samples: list[dict[str, Any]] = []
    for s in group.samples:
        header = {"tokens": len(s.response_ids), "finish_reason": s.finish_reason, "text": s.text, "reward": s.reward}
        samples.append(header | {"train": s.train})
        if s.routing is not None:
            dtype = str(s.routing.dtype).removeprefix("torch.")
            samples[-1] |= {"routing": list(s.routing.shape), "routing_dtype": dtype}
    prompt = group.prompt
    return {"index": prompt.index, "label": prompt.label, "tokens": len(prompt.token_ids), "samples": samples}


def _routing_form(sample: dict[str, Any]) -> tuple[np.dtype, list[int]] | None:
    if "routing" not in sample:
        return None
    names = {str(dtype).removeprefix("torch."): form for dtype, form in _ROUTING.items()}
    return names[sample["routing_dtype"]], [_count(n) for n in sample["routing"]]


def _tensors(
    raw: bytes, start: int, forms: list[tuple[np.dtype, list[int]] | None]
) -> tuple[list[torch.Tensor | None], int]:
    """(one tensor for each form, None for None, first byte behind them)."""
    tensors: list[torch.Tensor | None] = []
    for form in forms:
        if form is None:
            tensors.append(None)
            continue
        dtype, shape = form
        flat = np.frombuffer(raw, dtype, count=math.prod(shape), offset=start)
        tensors.append(torch.from_numpy(flat.astype(dtype.newbyteorder("=")).reshape(shape)))
        start += dtype.itemsize * flat.size
    return tensors, start


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a length of {value!r}")
    return value


def _lists(raw: bytes, start: int, lengths: list[int], dtype: np.dtype) -> tuple[list[list], int]:
    """(one list for each length, first byte behind them)."""
    flat = np.frombuffer(raw, dtype, count=sum(lengths), offset=start).tolist()
    lists, at = [], 0
    for n in lengths:
        lists.append(flat[at : at + n])
        at += n
    return lists, start + 4 * at
