"""torch_dist <-> HF, and torch_dist -> block FP8 in one pass."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fp8slurm.checkpoint.converters.conversion import FORMAT, Conversion, Report, plan, stamp
from fp8slurm.checkpoint.converters.convert_hf import decisions, fp8_block, fp8_config, fp8_works, is_fp8
from fp8slurm.checkpoint.converters.output import OutputFolder
from fp8slurm.checkpoint.converters.progress import Progress
from fp8slurm.checkpoint.converters.stream import ConvertOptions, in_threads, one_thread_each, pieces, stopwatch
from fp8slurm.checkpoint.converters.torch_dist_writer import DistFile, plan_files, write_torch_dist
from fp8slurm.checkpoint.converters.works import Copy
from fp8slurm.checkpoint.formats.hf_folder import INDEX, SINGLE, HfFolder, open_hf, read_json
from fp8slurm.checkpoint.formats.sources import DequantizedSource, HfSource, Source
from fp8slurm.checkpoint.formats.torch_dist_source import EMBEDDING, HEAD, TorchDistSource
from fp8slurm.core.errors import BadCheckpoint
from fp8slurm.models.kv_scales import is_scale
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, listed_modules


@dataclass(frozen=True)
class _Origin:
    """The HF folder that the model came from: config and tokenizer; its weights are not needed."""

    folder: HfFolder
    spec: ModelSpec
    tied_head: bool
    """Tied embeddings, and the folder holds the head all the same."""
    modules_to_not_convert: tuple[str, ...]


def _open_origin(path: str | Path) -> _Origin:
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"--origin-hf-dir {folder}: no such folder")
    if not (folder / "config.json").is_file():
        raise BadCheckpoint(
            f"--origin-hf-dir {folder}: there is no config.json in it; give the model's Hugging Face folder"
        )
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    skip = listed_modules(quantization, str(folder / "config.json")) if isinstance(quantization, dict) else ()
    plain = {k: v for k, v in config.items() if k != "quantization_config"}
    spec = ModelSpec.from_hf_config(plain, str(folder / "config.json"))
    with_weights = (folder / INDEX).exists() or (folder / SINGLE).exists()
    tied_head = spec.tie_word_embeddings and with_weights and HEAD in open_hf(folder).tensors
    return _Origin(HfFolder(folder, plain, {}), spec, tied_head, skip)


def _with_dtype(config: dict[str, Any], source: Source) -> dict[str, Any]:
    """The config, its dtype entry (whichever spelling it has) following the weights."""
    name = str(source.tensors[EMBEDDING].dtype).removeprefix("torch.")
    return {k: name if k in ("dtype", "torch_dtype") else v for k, v in config.items()}


def _plan_from_torch_dist(
    kind: str,
    src: str | Path,
    dst: str | Path,
    origin_hf_dir: str | Path,
    options: ConvertOptions,
    fp8: dict[str, Any] | None,
    texts: Mapping[str, bytes] | None,
) -> Conversion:
    origin = _open_origin(origin_hf_dir)
    source = TorchDistSource(src, origin.spec, origin.tied_head)
    source.check_sealed()
    config = _with_dtype(origin.folder.config, source)
    if fp8 is None:
        works: list[Any] = [Copy(source, info) for info in source.tensors.values()]
    else:
        own = [*origin.modules_to_not_convert, *listed_modules(config, str(origin.folder.path / "config.json"))]
        made = decisions(source.tensors.values(), own, fp8["modules_to_not_convert"])
        works = fp8_works(source, made, fp8["power_of_two"])
        config = fp8_config(config, made, fp8["power_of_two"])
    inputs = [Path(src), origin.folder.path]
    files = [origin.folder.path / "config.json", *source.files]
    return plan(kind, source, works, config, origin.folder.companions, inputs, files, dst, options, texts)


def plan_torch_dist_to_hf(
    src: str | Path,
    dst: str | Path,
    *,
    origin_hf_dir: str | Path,
    options: ConvertOptions = ConvertOptions(),
    texts: Mapping[str, bytes] | None = None,
) -> Conversion:
    """What `torch_dist_to_hf` will do. texts: files by name, in place of origin_hf_dir's of the same names."""
    return _plan_from_torch_dist("torch-dist-to-hf", src, dst, origin_hf_dir, options, None, texts)


def torch_dist_to_hf(src: str | Path, dst: str | Path, *, origin_hf_dir: str | Path, **settings: Any) -> Report:
    """A Megatron torch_dist checkpoint (any TP, PP, EP; layers stacked or not) -> HF, in the dtype it was saved in.

    origin_hf_dir gives config, tokenizer and the vocabulary's true size. `settings`: fields of ConvertOptions.
    Errors as for hf_to_fp8.
    """
    return plan_torch_dist_to_hf(src, dst, origin_hf_dir=origin_hf_dir, options=ConvertOptions(**settings)).run()


def plan_torch_dist_to_fp8(
    src: str | Path,
    dst: str | Path,
    *,
    origin_hf_dir: str | Path,
    modules_to_not_convert: Sequence[str] = (),
    power_of_two: bool = False,
    options: ConvertOptions = ConvertOptions(),
    texts: Mapping[str, bytes] | None = None,
) -> Conversion:
    """What `torch_dist_to_fp8` will do. texts: as above."""
    fp8 = {"modules_to_not_convert": modules_to_not_convert, "power_of_two": power_of_two}
    return _plan_from_torch_dist("torch-dist-to-fp8", src, dst, origin_hf_dir, options, fp8, texts)


def torch_dist_to_fp8(
    src: str | Path,
    dst: str | Path,
    *,
    origin_hf_dir: str | Path,
    modules_to_not_convert: Sequence[str] = (),
    power_of_two: bool = False,
    **settings: Any,
) -> Report:
    """A torch_dist checkpoint -> block FP8, in one pass; the bytes are those of torch_dist_to_hf and hf_to_fp8.

    modules_to_not_convert adds to what origin_hf_dir's config excludes. `settings`: fields of ConvertOptions.
    """
    return plan_torch_dist_to_fp8(
        src,
        dst,
        origin_hf_dir=origin_hf_dir,
        modules_to_not_convert=modules_to_not_convert,
        power_of_two=power_of_two,
        options=ConvertOptions(**settings),
    ).run()


@dataclass(frozen=True)
class ToTorchDist:
    """A planned `hf_to_torch_dist`."""

    source: Source
    spec: ModelSpec
    files: Sequence[DistFile]
    inputs: Sequence[Path]
    """Input folders: never written to."""
    input_files: Sequence[Path]
    """Files that are read, wherever their links lead."""
    output: OutputFolder
    options: ConvertOptions

    @property
    def read_bytes(self) -> int:
        return sum(c.nbytes for f in self.files for c in f.chunks)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of numbers in every file; archives add about a kilobyte a chunk."""
        return {f.name: sum(c.nbytes + 2048 for c in f.chunks) for f in self.files}

    def describe(self) -> str:
        """Sizes and free space, for --dry-run."""
        lines = [f"hf-to-torch-dist: {', '.join(map(str, self.inputs))} -> {self.output.path}"]
        lines += [f"  {name}  {size / 1e9:.3f} GB" for name, size in self.sizes.items()]
        lines.append(f"  {self.read_bytes / 1e9:.3f} GB, free {self.output.free_bytes() / 1e9:.3f} GB")
        return "\n".join(lines)

    def run(self) -> Report:
        """Convert; the output folder appears complete, or not at all."""
        seconds = stopwatch()
        try:
            self.output.check(self.inputs, self.input_files)
            self.output.check_space(self.sizes)
            self.output.begin()
            resumed = sum((self.output.tmp / (f.name + ".lengths")).is_file() for f in self.files)
            with Progress(self.read_bytes * (1 + self.options.verify), self.options.progress) as progress:
                names = write_torch_dist(self.files, self.output, self.source, self.spec, self.options, progress)
                if self.options.verify:
                    self._verify(progress)
            written = sum((self.output.tmp / name).stat().st_size for name in names)
            self.output.finish(names)
        finally:
            self.output.release()
            self.source.close()
        tensors = len({c.entry.name for f in self.files for c in f.chunks})
        return Report(seconds(), self.read_bytes, written, tensors, len(self.files), resumed)

    def _verify(self, progress: Progress) -> None:
        """Read the checkpoint back in HF form, as a later conversion would, and compare every byte with the input."""
        back = TorchDistSource(self.output.tmp, self.spec)
        try:
            infos = {n: i for n, i in self.source.tensors.items() if n in back.tensors}
            if infos != back.tensors:
                raise BadCheckpoint(f"{self.output.tmp}: reads back with other tensors than the input has")

            def compare(piece: Any) -> None:
                name = piece.work.info.name
                expected = self.source.read(name, piece.start, piece.stop).contiguous().view(torch.uint8)
                if not torch.equal(back.read(name, piece.start, piece.stop, "back").view(torch.uint8), expected):
                    raise BadCheckpoint(f"{self.output.tmp}: {name} does not read back as it is in the input")
                progress.advance(piece.nbytes)

            works = [Copy(self.source, info) for info in infos.values()]
            with one_thread_each():
                in_threads(self.options.threads, pieces(works, self.options.piece_bytes()), compare)
        finally:
            back.close()


def _check_names(source: Source, table: NameTable, where: Path) -> None:
    """The source has the model's tensors and no others; a tied model's head may be there if it is the embedding."""
    expected = table.hf_tensors()
    for name, tensor in expected.items():
        if name not in source.tensors:
            raise BadCheckpoint(f"{where}: {name} is missing")
        if source.tensors[name].shape != tensor.shape:
            raise BadCheckpoint(
                f"{where}: {name} has shape {list(source.tensors[name].shape)}, config.json says {list(tensor.shape)}"
            )
    for name in source.tensors:
        if name in expected or is_scale(name):  # of an FP8 KV cache: torch_dist has no place for it
            continue
        if name != HEAD or not _same_rows(source, EMBEDDING, HEAD):
            raise BadCheckpoint(f"{where}: {name} is no tensor of this model (config.json)")


def _same_rows(source: Source, a: str, b: str) -> bool:
    if replace(source.tensors[a], name="") != replace(source.tensors[b], name=""):
        return False
    return all(
        torch.equal(
            source.read(a, p.start, p.stop).view(torch.uint8),
            source.read(b, p.start, p.stop, "other").view(torch.uint8),
        )
        for p in pieces([Copy(source, source.tensors[a])], 1 << 22)
    )


def plan_hf_to_torch_dist(
    src: str | Path, dst: str | Path, *, options: ConvertOptions = ConvertOptions()
) -> ToTorchDist:
    """What `hf_to_torch_dist` will do."""
    folder = open_hf(src)
    source: Source = HfSource(folder)
    if is_fp8(folder):
        source = DequantizedSource(source, fp8_block(folder))
    plain = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    spec = ModelSpec.from_hf_config(plain, str(folder.path / "config.json"))
    table = NameTable(spec)
    _check_names(source, table, folder.path)
    files = plan_files(table, source, options)
    inputs = [folder.path / "config.json", *sorted({t.path for t in folder.tensors.values()})]
    fingerprint = {
        "format": FORMAT,
        "kind": "hf-to-torch-dist",
        "inputs": [os.path.abspath(folder.path)],
        "files": [list(s) for s in stamp(inputs)],
        "plan": [[f.name, [[c.entry.name, c.start, c.stop] for c in f.chunks]] for f in files],
    }
    output = OutputFolder(dst, fingerprint, options.overwrite)
    return ToTorchDist(source, spec, files, [folder.path], inputs, output, options)


def hf_to_torch_dist(src: str | Path, dst: str | Path, **settings: Any) -> Report:
    """An HF folder (BF16 or fp32 as it is, block FP8 as BF16) -> a model-only torch_dist checkpoint for Megatron.

    `settings`: fields of ConvertOptions. Errors as for hf_to_fp8.
    """
    return plan_hf_to_torch_dist(src, dst, options=ConvertOptions(**settings)).run()
