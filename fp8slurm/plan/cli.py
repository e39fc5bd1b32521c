"""`fp8slurm plan`: what a run will hold and move, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fp8slurm.core.errors import InputError

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig


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
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument(
        "--from-run", type=Path, metavar="RUN",
        help="print instead which placement balances engines and trainer on this recipe's GPUs, by that run's rates",
    )  # fmt: skip
    rates.add_argument(
        "--rates", type=float, nargs=3, metavar=("GENERATE", "TRAIN", "TOKENS"),
        help="the same by these: tokens/s that a GPU of an engine generates, tokens/s that a GPU of the trainer takes "
        "(log-probabilities and updates together), tokens of a step",
    )  # fmt: skip
    parser.add_argument(
        "--longest", type=float, default=0.0, metavar="SECONDS",
        help="with --from-run or --rates: what the longest sample takes on any number of GPUs (default: %(default)g)",
    )  # fmt: skip
    own, config = parse_command(parser, argv)
    if own.longest and own.from_run is None and own.rates is None or not 0 <= own.longest < float("inf"):
        raise InputError(f"--longest {own.longest:g}: seconds, at least 0, and only with --from-run or --rates")
    if own.from_run is not None or own.rates is not None:
        return _balance(config, own.from_run, own.rates, own.longest, own.json)
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


def _balance(config: RunConfig, run: Path | None, given: list[float] | None, longest_s: float, as_json: bool) -> int:
    from dataclasses import replace

    from rich.console import Console

    from fp8slurm.plan import balance

    if given is not None and not all(0 < value < float("inf") for value in given):
        raise InputError(f"--rates {' '.join(f'{v:g}' for v in given)}: all three must be above 0")
    if run is not None:
        rates = balance.rates_of(run)
    else:
        assert given is not None
        rates = balance.Rates(given[0], given[1], given[2], given[2])
    rates = replace(rates, longest_s=longest_s)
    found = balance.layouts(config, rates)
    if as_json:
        print(json.dumps(balance.to_json(found, rates, config), indent=1))
        return 0
    console = Console(highlight=False)
    console.print(balance.table(found))
    console.print(f"\nfastest: {balance.flags(found[0], config)}", soft_wrap=True)
    console.print("Whether it fits the GPUs' memory: fp8slurm plan with these flags.", style="dim")
    return 0
