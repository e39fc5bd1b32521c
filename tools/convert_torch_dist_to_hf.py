#!/usr/bin/env python3
"""Megatron torch_dist -> Hugging Face; `fp8slurm convert torch-dist-to-hf` is the same.

usage: tools/convert_torch_dist_to_hf.py --input-dir IN --output-dir OUT --origin-hf-dir HF
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fp8slurm.checkpoint.converters.cli import add_options, add_origin, convert  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--input-dir", dest="input", required=True, metavar="IN")
    parser.add_argument("--output-dir", dest="output", required=True, metavar="OUT")
    add_origin(parser)
    add_options(parser)
    return convert("torch-dist-to-hf", parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
