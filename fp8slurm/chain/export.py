"""`fp8slurm export RUN [OUT] [--fp8]`: a run's checkpoint as a folder that transformers, vLLM and SGLang serve.

The converters write the folder; what they cannot know of a run comes with it: a chat template and end tokens with which
the model is asked as it was in training, and a model card.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fp8slurm.chain.card import model_card
from fp8slurm.chain.serving import serving_files
from fp8slurm.checkpoint.converters.cli import add_fp8_options, add_options, convert
from fp8slurm.core.errors import InputError
from fp8slurm.eval.checkpoints import recognize
from fp8slurm.run.reader import read_run


def main(argv: list[str]) -> int:
    """Exit status 0: done; 1: the disk failed; bad input is an InputError."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm export",
        description="A checkpoint of a run as a Hugging Face folder that transformers, vLLM and SGLang serve without "
        "further flags: weights, tokenizer, a chat template with the run's arguments, end tokens, a model card. The "
        "folder appears complete or not at all.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, such as runs/tiny-fp8; it may be running")
    parser.add_argument("output", nargs="?", metavar="OUT", help="folder (default: RUN/export/CHECKPOINT-hf or -fp8)")
    parser.add_argument("--checkpoint", metavar="NAME", help="such as step_000040 (default: the newest complete one)")
    parser.add_argument("--fp8", action="store_true", help="weights in block FP8 (default: BF16, as they were saved)")
    moved = "config and tokenizer (default: the run's model.hf_checkpoint)"
    parser.add_argument("--origin-hf-dir", type=Path, metavar="HF", help=moved)
    add_fp8_options(parser)
    add_options(parser)
    args = parser.parse_args(argv)
    if not args.fp8 and (args.modules_to_not_convert or args.power_of_two):
        flag = "--modules-to-not-convert" if args.modules_to_not_convert else "--power-of-two"
        raise InputError(f"{flag} needs --fp8: weights in BF16 are not quantized")
    run = read_run(args.run)
    checkpoint = recognize(None, args.run, args.checkpoint, None, None)
    assert checkpoint.config is not None and checkpoint.origin is not None
    args.input = str(checkpoint.path)
    args.origin_hf_dir = origin = args.origin_hf_dir or checkpoint.origin
    if not (origin / "config.json").is_file():
        raise InputError(
            f"{origin}: no Hugging Face folder there; --origin-hf-dir names the base model's where it is now"
        )
    args.output = args.output or str(args.run / "export" / f"{checkpoint.name}-{'fp8' if args.fp8 else 'hf'}")
    args.modules_to_not_convert = list(dict.fromkeys([*checkpoint.keep, *args.modules_to_not_convert]))
    args.texts = serving_files(origin, checkpoint.config)
    args.texts["README.md"] = model_card(run, checkpoint, origin, args.fp8, args.texts).encode()
    if not args.fp8:
        del args.modules_to_not_convert, args.power_of_two
    status = convert("torch-dist-to-fp8" if args.fp8 else "torch-dist-to-hf", args, "export")
    if status == 0 and not args.dry_run:
        print(f"{args.output}: {checkpoint.name} of {args.run}; README.md there says how it is served")
    return status
