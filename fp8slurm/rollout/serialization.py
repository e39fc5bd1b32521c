"""Sample groups as one uint8 tensor in the safetensors format, so that nothing that travels can execute anything.

    prompt, response, version   int32: tokens and weight versions of all groups or samples, end to end
    logprob                     float32, as response
    routing/N                   uint8 or int16 [tokens - 1, layers, k]: of sample N, if it has one
    teacher                     float32, as response: where a teacher has scored the samples
    mask/N                      uint8 [response tokens], 1 where a token is trained on: of sample N, if it has one
    prompt/N                    int32, tokens before the response of sample N, where they are not its group's prompt
    metadata                    "groups": JSON of what else groups and samples have, and how many tokens

A description has the metadata alone, with what a rank has to know of samples that it does not train on: `versions` and
`mask` as runs, and the form of `routing`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from fp8slurm.core.types import Elsewhere, Prompt, Runs, Sample, SampleGroup, runs

DTYPES = {"prompt": torch.int32, "response": torch.int32, "version": torch.int32}
DTYPES |= {"logprob": torch.float32, "teacher": torch.float32}
EXPERTS = {"uint8": torch.uint8, "int16": torch.int16}


def encode_groups(groups: list[SampleGroup]) -> torch.Tensor:
    """uint8 [bytes]. Log-probabilities are rounded to float32; OverflowError for token ids or versions beyond int32."""
    samples = [s for g in groups for s in g.samples]
    for s in samples:
        assert len(s.response_ids) == len(s.weight_versions) == len(s.logprobs), "per-token lists differ in length"
        assert s.loss_mask is None or len(s.loss_mask) == len(s.response_ids), "per-token lists differ in length"
    tensors = {
        "prompt": _flat((g.prompt.token_ids for g in groups), "int32"),
        "response": _flat((s.response_ids for s in samples), "int32"),
        "version": _flat((s.weight_versions for s in samples), "int32"),
        "logprob": _flat((s.logprobs for s in samples), "float32"),
    }
    if samples and all(s.teacher_logprobs is not None for s in samples):
        tensors["teacher"] = _flat((s.teacher_logprobs or () for s in samples), "float32")
    tensors |= {f"routing/{n}": s.routing.contiguous() for n, s in enumerate(samples) if s.routing is not None}
    tensors |= {
        f"mask/{n}": torch.tensor(s.loss_mask, dtype=torch.uint8)
        for n, s in enumerate(samples)
        if s.loss_mask is not None
    }
    tensors |= {
        f"prompt/{n}": _flat([s.prompt_ids], "int32") for n, s in enumerate(samples) if s.prompt_ids is not None
    }
    return _bytes(tensors, {"groups": json.dumps([_header(g) for g in groups])})


def describe_groups(groups: list[SampleGroup]) -> torch.Tensor:
    """uint8 [bytes]: all that ranks need of samples that others train on. Text, labels and parts are not in it."""
    described = []
    for g in groups:
        header = _header(g)
        del header["label"]
        for s, of_sample in zip(g.samples, header["samples"]):
            del of_sample["text"]
            of_sample.pop("parts", None)
            of_sample["versions"] = runs(s.weight_versions)
            if s.loss_mask is not None:
                of_sample["mask"] = runs(s.loss_mask)
            if s.prompt_ids is not None:
                of_sample["prompt"] = len(s.prompt_ids)
            if s.routing is not None:
                of_sample["routing"] = [str(s.routing.dtype).removeprefix("torch."), *s.routing.shape[1:]]
        described.append(header)
    return _bytes({}, {"described": json.dumps(described, separators=(",", ":"))})


def decode_groups(data: torch.Tensor) -> list[SampleGroup]:
    """The groups in an uint8 [bytes] tensor; of a description with samples that are not `here`.

    ValueError: not what encode_groups or describe_groups wrote.
    """
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"sample groups: a flat uint8 tensor is expected, not {data.dtype} {tuple(data.shape)}")
    raw = data.contiguous().cpu().numpy().tobytes()
    try:
        tensors = load(raw)
        for name, tensor in tensors.items():
            kind = "prompt" if name.startswith("prompt/") else name
            if tensor.dtype not in ([DTYPES[kind]] if kind in DTYPES else [torch.uint8, torch.int16]):
                raise ValueError(f"{name} is {tensor.dtype}")
        header_bytes = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + header_bytes])["__metadata__"]
        if "described" in metadata:
            return [_described(g) for g in json.loads(metadata["described"])]
        header = json.loads(metadata["groups"])
        prompts = _split(tensors["prompt"], header)
        of_samples = [s for g in header for s in g["samples"]]
        lists = [_split(tensors[name], of_samples) for name in ("response", "logprob", "version")]
        samples = []
        for n, (s, ids, logprobs, versions) in enumerate(zip(of_samples, *lists)):
            scored = str(s["finish_reason"]), str(s["text"]), float(s["reward"])
            routing = tensors.get(f"routing/{n}")
            parts = {str(name): float(value) for name, value in s.get("parts", {}).items()}
            mask = tensors.get(f"mask/{n}")
            if mask is not None and mask.shape != (len(ids),):
                raise ValueError(f"mask/{n} is {tuple(mask.shape)} for {len(ids)} tokens")
            loss_mask = None if mask is None else mask.bool().tolist()
            sample = Sample(ids, logprobs, versions, *scored, routing, bool(s["train"]), parts, loss_mask)
            sample.rollout = None if s.get("rollout") is None else int(s["rollout"])
            sample.prompt_ids = tensors[f"prompt/{n}"].tolist() if f"prompt/{n}" in tensors else None
            samples.append(sample)
        if "teacher" in tensors:
            for sample, values in zip(samples, _split(tensors["teacher"], of_samples)):
                sample.teacher_logprobs = values
        rest = iter(samples)
        return [
            SampleGroup(
                Prompt(int(g["index"]), tuple(ids), str(g["label"]), source=str(g.get("source", ""))),
                [next(rest) for _ in g["samples"]],
            )
            for g, ids in zip(header, prompts)
        ]
    except Exception as error:  # whatever is wrong with the bytes
        raise ValueError(f"sample groups: {error}") from error


def _described(group: dict[str, Any]) -> SampleGroup:
    prompt = Prompt(int(group["index"]), Elsewhere(_count(group["tokens"])), "", source=str(group.get("source", "")))
    samples = []
    for s in group["samples"]:
        length, before = _count(s["tokens"]), _count(s.get("prompt", group["tokens"]))
        absent, versions, mask, routing = Elsewhere(length), Runs(s["versions"]), None, None
        if "mask" in s:
            mask = Runs(s["mask"])
        if any(len(per_token) != length for per_token in (versions, *([] if mask is None else [mask]))):
            raise ValueError(f"per-token lists differ in length from {length} tokens")
        if "routing" in s:
            dtype, layers, k = s["routing"]
            form = max(0, before + length - 1), _count(layers), _count(k)
            routing = torch.empty(form, dtype=EXPERTS[dtype], device="meta")
        scored = str(s["finish_reason"]), "", float(s["reward"])
        sample = Sample(absent, absent, versions, *scored, routing, bool(s["train"]), {}, mask)
        sample.rollout = None if s.get("rollout") is None else int(s["rollout"])
        sample.prompt_ids = Elsewhere(before) if "prompt" in s else None
        samples.append(sample)
    return SampleGroup(prompt, samples)


def _count(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(save(tensors, metadata)), dtype=torch.uint8)


def _flat(lists: Iterable[Sequence[float]], dtype: str) -> torch.Tensor:
    return torch.from_numpy(np.array(list(chain.from_iterable(lists)), dtype=dtype))


def _split(values: torch.Tensor, headers: list[dict[str, Any]]) -> list[list[Any]]:
    """One list for each header, `tokens` long; all of `values` together."""
    return [part.tolist() for part in values.split([h["tokens"] for h in headers])]


def _header(group: SampleGroup) -> dict[str, Any]:
    """All of a group but its arrays, and what only rewards ask for."""
    samples = [
        {"tokens": len(s.response_ids)}
        | {key: getattr(s, key) for key in ("finish_reason", "text", "reward", "train")}
        | ({"parts": s.parts} if s.parts else {})
        | ({"rollout": s.rollout} if s.rollout is not None else {})
        for s in group.samples
    ]
    prompt = group.prompt
    header = {"index": prompt.index, "label": prompt.label, "tokens": len(prompt.token_ids), "samples": samples}
    return header | ({"source": prompt.source} if prompt.source else {})
