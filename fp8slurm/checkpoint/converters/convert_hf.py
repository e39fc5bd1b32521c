"""HF <-> HF: BF16 to block FP8 and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fp8slurm.checkpoint.converters.conversion import Conversion, Report, plan
from fp8slurm.checkpoint.converters.stream import ConvertOptions
from fp8slurm.checkpoint.converters.works import Copy, Quantize, Work
from fp8slurm.checkpoint.formats.hf_folder import HfFolder, open_hf
from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo
from fp8slurm.checkpoint.formats.sources import SCALE_SUFFIX, DequantizedSource, HfSource, Source
from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.fp8.block import FLOAT_DTYPES
from fp8slurm.fp8.policy import LINEAR, Decision, decide, engine_matrix, has_effect, kept_name
from fp8slurm.models.spec import QuantizationSpec, listed_modules

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
Decided = tuple[TensorInfo, Decision]


def decisions(tensors: Iterable[TensorInfo], own: Sequence[str] = (), given: Sequence[str] = ()) -> list[Decided]:
    """The policy's decision for every tensor. own: modules_to_not_convert of the input's config; given: more.

    Raises:
        BadCheckpoint: a tensor cannot be quantized although it should.
        InputError: a given entry matches no module, or an entry keeps only a part of what SGLang holds as one matrix.
    """
    tensors = list(tensors)
    modules = list(dict.fromkeys(info.name.rpartition(".")[0] for info in tensors))
    for entry in given:
        if not has_effect(entry, modules):
            alone = (m for m in modules if LINEAR.fullmatch(f"{m}.weight") and engine_matrix(m) == m)
            example = next(alone, modules[0])
            parent, _, last = example.rpartition(".")
            raise InputError(
                f"--modules-to-not-convert {entry}: the model has no such module; allowed: a full name, an ancestor's, "
                f"or last components, such as {example}, {parent} or {last}"
            )
    made = []
    for info in tensors:
        decision = decide(info.name, info.shape, [*own, *given])
        if decision.quantize and info.dtype not in FLOAT_DTYPES:
            raise BadCheckpoint(f"{info.name} is {info.dtype}; only bf16, fp16 and fp32 weights can be quantized")
        made.append((info, decision))
    _check_whole_matrices(made)
    return made


def _check_whole_matrices(made: Sequence[Decided]) -> None:
    """InputError if SGLang would hold a kept and a quantized matrix as one."""
    quantized = {engine_matrix(_module(info)): _module(info) for info, decision in made if decision.quantize}
    for info, decision in made:
        other = quantized.get(engine_matrix(_module(info))) if decision.entry is not None else None
        if other is not None:
            raise InputError(
                f"modules_to_not_convert: {decision.entry} keeps {_module(info)} but not {other}; SGLang holds both in "
                f"one matrix, so all of {engine_matrix(other)} or nothing of it can be kept (--modules-to-not-convert)"
            )


def _module(info: TensorInfo) -> str:
    return info.name.removesuffix(".weight")


def fp8_works(source: Source, made: Sequence[Decided], power_of_two: bool = False) -> list[Work]:
    """Every tensor of a source, quantized where it was decided."""
    return [
        Quantize(source, info, power_of_two) if decision.quantize else Copy(source, info) for info, decision in made
    ]


def fp8_config(config: dict[str, Any], made: Sequence[Decided], power_of_two: bool) -> dict[str, Any]:
    """config.json of the FP8 form: the input's, and the quantization_config that transformers and SGLang read.

    Named in modules_to_not_convert are the output head, the routers (some versions of transformers make them Linear
    layers), and in full what was kept because of an entry: SGLang and transformers match entries otherwise than we.
    """
    routers = [_module(info) for info, _ in made if info.name.endswith(".mlp.gate.weight")]
    kept = [kept_name(_module(info)) for info, decision in made if decision.entry is not None]
    spec = QuantizationSpec(modules_to_not_convert=tuple(dict.fromkeys(["lm_head", *routers, *kept])))
    quantization = spec.to_config()
    if power_of_two:
        quantization["scale_fmt"] = "ue8m0"
    return {**config, "quantization_config": quantization}


def is_fp8(folder: HfFolder) -> bool:
    """Whether the weights are block FP8. BadCheckpoint if config and weights contradict each other."""
    codes = [n for n, t in folder.tensors.items() if t.info.dtype in FP8_DTYPES]
    scales = [n for n in folder.tensors if n.endswith(SCALE_SUFFIX)]
    quantization = folder.config.get("quantization_config")
    if quantization and not codes:
        raise BadCheckpoint(
            f"{folder.path}: config.json has a quantization_config, but no weight is FP8; take it out if the weights "
            f"are right"
        )
    if codes and not quantization:
        raise BadCheckpoint(f"{folder.path}: {codes[0]} is FP8, but config.json has no quantization_config")
    if scales and not codes:
        raise BadCheckpoint(f"{folder.path}: {scales[0]} is there, but no weight is FP8")
    return bool(codes)


def fp8_block(folder: HfFolder) -> tuple[int, int]:
    """Block size of an FP8 folder, from its config. BadCheckpoint for another kind of quantization."""
    quantization = folder.config["quantization_config"]
    values = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
    method, fmt, block = values.get("quant_method"), values.get("fmt", "e4m3"), values.get("weight_block_size")
    sizes = [b for b in block if isinstance(b, int) and b > 0] if isinstance(block, list) else []
    if method != "fp8" or fmt != "e4m3" or len(sizes) != 2 or sizes != block:
        raise BadCheckpoint(
            f"{folder.path}: quantization_config with quant_method {method!r}, fmt {fmt!r}, weight_block_size "
            f"{block!r} cannot be read; allowed: fp8, e4m3, [rows, columns]"
        )
    return sizes[0], sizes[1]


def _files(folder: HfFolder) -> list[Path]:
    return [folder.path / "config.json", *sorted({t.path for t in folder.tensors.values()})]


def plan_hf_to_fp8(
    src: str | Path,
    dst: str | Path,
    *,
    modules_to_not_convert: Sequence[str] = (),
    power_of_two: bool = False,
    options: ConvertOptions = ConvertOptions(),
) -> Conversion:
    """What `hf_to_fp8` will do."""
    folder = open_hf(src)
    if is_fp8(folder):
        raise BadCheckpoint(f"{folder.path} is FP8 already; fp8slurm convert fp8-to-hf makes BF16 of it")
    source = HfSource(folder)
    own = listed_modules(folder.config, str(folder.path / "config.json"))
    made = decisions(source.tensors.values(), own, modules_to_not_convert)
    config = fp8_config(folder.config, made, power_of_two)
    works = fp8_works(source, made, power_of_two)
    if not any(isinstance(work, Quantize) for work in works):
        raise BadCheckpoint(f"{folder.path}: no tensor is one that FP8 quantizes (fp8slurm convert hf-to-fp8 --list)")
    files = _files(folder)
    return plan("hf-to-fp8", source, works, config, folder.companions, [folder.path], files, dst, options)


def hf_to_fp8(
    src: str | Path,
    dst: str | Path,
    *,
    modules_to_not_convert: Sequence[str] = (),
    power_of_two: bool = False,
    **settings: Any,
) -> Report:
    """An HF folder in BF16 (or fp16, fp32) -> the same model in block FP8, as SGLang and transformers load it.

    `settings`: fields of ConvertOptions (jobs, memory_mib, verify, progress, ...).
    Raises BadCheckpoint for a damaged or contradictory input and for weights that are not finite,
    InputError for an output that exists and for modules that cannot be kept, OSError for a full disk. Nothing is left
    at dst then; dst.tmp keeps the finished shards and the same call goes on with them.
    """
    return plan_hf_to_fp8(
        src,
        dst,
        modules_to_not_convert=modules_to_not_convert,
        power_of_two=power_of_two,
        options=ConvertOptions(**settings),
    ).run()


def plan_fp8_to_hf(src: str | Path, dst: str | Path, *, options: ConvertOptions = ConvertOptions()) -> Conversion:
    """What `fp8_to_hf` will do."""
    folder = open_hf(src)
    if not is_fp8(folder):
        raise BadCheckpoint(f"{folder.path} is not FP8: there is nothing to dequantize")
    source = DequantizedSource(HfSource(folder), fp8_block(folder))
    works = [Copy(source, info) for info in source.tensors.values()]
    config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    return plan("fp8-to-hf", source, works, config, folder.companions, [folder.path], _files(folder), dst, options)


def fp8_to_hf(src: str | Path, dst: str | Path, **settings: Any) -> Report:
    """An HF folder in block FP8 (any block size) -> BF16; settings and errors as for hf_to_fp8."""
    return plan_fp8_to_hf(src, dst, options=ConvertOptions(**settings)).run()
