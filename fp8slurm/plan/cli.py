"""`fp8slurm plan`: what a run will hold and move, before anything is started."""

from __future__ import annotations

import json

from fp8slurm.core.errors import InputError


def main(argv: list[str]) -> int:
    """`fp8slurm plan --recipe R [--section.key VALUE ...] [--gpu-memory GB ...] [--json]`; returns the exit status.

    0: printed; 2 (by InputError, in cli.main): the layout does not fit the model, or its shape is not known.
    """
    from fp8slurm.config import parse_command, recipe_parser

    parser = recipe_parser(
        "fp8slurm plan",
        "Memory of every rank, host memory, bytes of a weight update and block alignment; needs no GPU and, for "
        "a model whose shape is known (fp8slurm/models/known), no checkpoint.",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        action="append",
        metavar="GB",
        help="memory of a GPU in 10^9 bytes; may be given several times (default: 80 for an H100 and 141 for an H200)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables; bytes are integers")
    parser.add_argument("--row", metavar="LABEL", help="print a row of a Markdown table with that label, to compare")
    own, config = parse_command(parser, argv)
    if any(size <= 0 for size in own.gpu_memory or ()):
        raise InputError("--gpu-memory must be above 0, in 10^9 bytes")

    from fp8slurm.plan.plan import make_plan

    sizes = {f"{size:g} GB": int(size * 1e9) for size in own.gpu_memory} if own.gpu_memory else None
    plan = make_plan(config, sizes)
    if own.json:
        print(json.dumps(plan.to_json(), indent=1))
        return 0
    from fp8slurm.plan.report import row, show

    if own.row is not None:
        print(row(plan, own.row))
    else:
        show(plan)
    return 0
