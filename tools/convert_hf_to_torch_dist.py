#!/usr/bin/env python3
"""Hugging Face (BF16 or block FP8) -> Megatron torch_dist; `fp8slurm convert hf-to-torch-dist` is the same.

usage: tools/convert_hf_to_torch_dist.py --hf-checkpoint IN --save OUT
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fp8slurm.checkpoint.converters.cli import add_options, convert  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hf-checkpoint", dest="input", required=True, metavar="IN")
    parser.add_argument("--save", dest="output", required=True, metavar="OUT")
    add_options(parser)
    return convert("hf-to-torch-dist", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
