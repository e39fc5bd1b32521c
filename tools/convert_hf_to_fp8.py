#!/usr/bin/env python3
"""Hugging Face in BF16 -> block FP8, with the flags that people know; `fp8slurm convert hf-to-fp8` is the same.

usage: tools/convert_hf_to_fp8.py --model-dir IN --save-dir OUT [--strategy block --block-size 128 128]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fp8slurm.checkpoint.converters.cli import add_fp8_options, add_options, convert  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-dir", dest="input", required=True, metavar="IN")
    parser.add_argument("--save-dir", dest="output", required=True, metavar="OUT")
    parser.add_argument("--strategy", choices=["block"], default="block", help="blocks are the only strategy")
    parser.add_argument(
        "--block-size", type=int, nargs=2, default=[128, 128], metavar=("ROWS", "COLUMNS"), help="128 128"
    )
    parser.add_argument("--list", action="store_true", help="print what would be quantized and why, write nothing")
    add_fp8_options(parser)
    add_options(parser)
    args = parser.parse_args()
    if args.block_size != [128, 128]:
        parser.error(f"--block-size {args.block_size[0]} {args.block_size[1]}: trainer and engine use 128 128")
    return convert("hf-to-fp8", args)


if __name__ == "__main__":
    sys.exit(main())
