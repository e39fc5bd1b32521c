"""`fp8slurm convert NAME IN OUT`: parses and delegates."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fp8slurm.checkpoint.converters.convert_hf import decisions, plan_fp8_to_hf, plan_hf_to_fp8
from fp8slurm.checkpoint.converters.convert_torch_dist import (
    plan_hf_to_torch_dist,
    plan_torch_dist_to_fp8,
    plan_torch_dist_to_hf,
)
from fp8slurm.checkpoint.converters.stream import ConvertOptions
from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.checkpoint.formats.sources import HfSource
from fp8slurm.core.errors import InputError
from fp8slurm.models.spec import listed_modules

CONVERTERS: dict[str, tuple[Callable[..., Any], str]] = {
    "hf-to-fp8": (plan_hf_to_fp8, "Hugging Face in BF16 -> block FP8, for the engine"),
    "fp8-to-hf": (plan_fp8_to_hf, "Hugging Face in block FP8 -> BF16"),
    "hf-to-torch-dist": (plan_hf_to_torch_dist, "Hugging Face in BF16 or block FP8 -> Megatron torch_dist"),
    "torch-dist-to-hf": (plan_torch_dist_to_hf, "Megatron torch_dist -> Hugging Face in the dtype it was saved in"),
    "torch-dist-to-fp8": (plan_torch_dist_to_fp8, "Megatron torch_dist -> block FP8, in one pass"),
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


LEAST_SHARD = 10**6
"""A smaller file holds one tensor: a number without its unit was meant as GB."""


def size(text: str) -> int:
    """Bytes: a number with or without KB, MB, GB, KiB, MiB, GiB."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; examples: 5GB, 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def shard_size(text: str) -> int:
    """`size` of at least LEAST_SHARD bytes."""
    found = size(text)
    if found < LEAST_SHARD:
        raise argparse.ArgumentTypeError(f"{text!r} is {found} bytes, at least 1MB is needed; examples: 5GB, 512MiB")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags that all converters have."""
    defaults = ConvertOptions()
    threads = f"threads (default: all {defaults.threads} cores, or as many as --max-memory has buffers for)"
    parser.add_argument("--jobs", type=int, metavar="N", help=threads)
    memory, buffers = defaults.memory_mib, "memory for buffers in MiB, on top of the imports (default: %(default)s)"
    parser.add_argument("--max-memory", type=int, default=memory, metavar="MIB", help=buffers)
    largest, shard = defaults.max_shard_bytes, "largest output file, e.g. 5GB (default: 2GiB)"
    parser.add_argument("--max-shard-size", type=shard_size, default=largest, metavar="SIZE", help=shard)
    parser.add_argument("--no-verify", action="store_true", help="do not read the output back and check it")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="print sizes and free space, write nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_fp8_options(parser: argparse.ArgumentParser) -> None:
    """The flags of converters that quantize."""
    kept = "modules to keep as they are, by full name, an ancestor's, or their last components"
    parser.add_argument("--modules-to-not-convert", nargs="+", default=[], metavar="MODULE", help=kept)
    parser.add_argument("--power-of-two", action="store_true", help="scales that are powers of two (ue8m0)")


def add_origin(parser: argparse.ArgumentParser) -> None:
    """The flag of converters out of torch_dist."""
    origin = "Hugging Face folder with the config and the tokenizer"
    parser.add_argument("--origin-hf-dir", required=True, metavar="HF", help=origin)


def convert(name: str, args: argparse.Namespace, command: str = "") -> int:
    """Run one converter with parsed flags; 0 done, 1 the disk failed, 2 bad input (nothing was written).

    command: the one that the user gave, where it is not `convert NAME`.
    """
    command = command or f"convert {name}"
    try:
        if getattr(args, "list", False):
            return list_decisions(args)
        if args.output is None:
            raise InputError("OUT is missing; only --list does without")
        options = ConvertOptions(
            jobs=args.jobs,
            memory_mib=args.max_memory,
            max_shard_bytes=args.max_shard_size,
            verify=not args.no_verify,
            overwrite=args.overwrite,
            progress=not args.quiet and sys.stderr.isatty(),
        )
        keys = ("origin_hf_dir", "modules_to_not_convert", "power_of_two", "texts")
        planned = CONVERTERS[name][0](
            args.input, args.output, options=options, **{k: getattr(args, k) for k in keys if hasattr(args, k)}
        )
        if args.dry_run:
            print(planned.describe())
            return 0
        print(f"{name}: {planned.run()}")
        return 0
    except (InputError, FileNotFoundError) as error:
        print(f"fp8slurm {command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of --list | head: the caller's to handle
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"fp8slurm {command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1


def list_decisions(args: argparse.Namespace) -> int:
    """Print for every tensor whether it is quantized, its dtype, shape and name, and why."""
    folder = open_hf(args.input)
    own = listed_modules(folder.config, str(folder.path / "config.json"))
    for info, decision in decisions(HfSource(folder).tensors.values(), own, args.modules_to_not_convert):
        dtype, shape = str(info.dtype).removeprefix("torch."), "x".join(map(str, info.shape))
        print(f"{'fp8 ' if decision.quantize else 'keep'}  {dtype:9} {shape:14} {info.name}  ({decision.reason})")
    return 0


def main(argv: Sequence[str] | None = None, checkpoint_of: Callable[[Path], Path | None] = lambda run: None) -> int:
    """Entry point of `fp8slurm convert`; returns the exit status.

    checkpoint_of: the checkpoint that is meant where IN is a run, None for any other folder.
    """
    parser = argparse.ArgumentParser(
        prog="fp8slurm convert",
        description="Convert checkpoints: streamed, verified, resumable. OUT appears complete or not at all; the same "
        "command again goes on where an interrupted one stopped.",
    )
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, help) in CONVERTERS.items():
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("input", metavar="IN", help="folder to read; it is never changed")
        command.add_argument("output", metavar="OUT", nargs="?", help="folder to make")
        if name.startswith("torch-dist"):
            add_origin(command)
        if name.endswith("to-fp8"):
            add_fp8_options(command)
        if name == "hf-to-fp8":
            command.add_argument("--list", action="store_true", help="print what would be quantized and why")
        add_options(command)
    args = parser.parse_args(argv)
    if args.name.startswith("torch-dist") and (newest := checkpoint_of(Path(args.input))) is not None:
        print(f"{args.input} is a run: {newest.name}, its newest complete checkpoint, is converted", file=sys.stderr)
        args.input = str(newest)
    return convert(args.name, args)


if __name__ == "__main__":
    sys.exit(main())
