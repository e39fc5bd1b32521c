"""fp8slurm train | convert | eval | plot: parses and delegates."""

from __future__ import annotations

import argparse
import sys
from typing import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `fp8slurm` command; returns its exit status.

    0: done; 1: a job failed; 2: bad input, nothing was started; 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fp8slurm", description="Reinforcement learning in FP8, with Megatron-core and SGLang."
    )
    parser.add_argument(
        "command", choices=sorted(COMMANDS), help="; ".join(f"{n}: {h}" for n, (_, h) in sorted(COMMANDS.items()))
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    command = parser.parse_args(argv[:1]).command
    try:
        return COMMANDS[command][0](argv[1:])
    except ValueError as error:
        print(f"fp8slurm {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fp8slurm {command}: interrupted", file=sys.stderr)
        return 130


def train(argv: list[str]) -> int:
    """`fp8slurm train --recipe R [--dry-run] [--section.key VALUE ...]`."""
    from fp8slurm.config import parse, recipe_names, to_toml

    parser = argparse.ArgumentParser(prog="fp8slurm train", add_help=False)
    parser.add_argument("--recipe", help=f"{', '.join(recipe_names())}, or the path of a .toml file")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    own, flags = parser.parse_known_args(argv)
    if "-h" in flags or "--help" in flags:
        parser.print_help()
    config = parse(own.recipe, flags)

    from fp8slurm.slurm.preflight import preflight

    warnings = preflight(config)
    for warning in warnings:
        print(f"fp8slurm train: warning: {warning}", file=sys.stderr)
    if own.dry_run:
        from fp8slurm.slurm.describe import describe

        print(to_toml(config))
        print(describe(config))
        return 0

    from fp8slurm.observe.console import Display
    from fp8slurm.observe.metrics import MetricsTail
    from fp8slurm.slurm.launch import RunFailed, finished, open_run, run_local

    run = open_run(config)
    try:
        if finished(config, run):
            print(
                f"{run.path} is finished: {config.run.steps} steps (--run.steps more of them to go on, --run.name for another run)"
            )
            return 0
        totals = {"sft": config.sft.max_steps, "rl": config.run.steps}
        with Display(config.run.name, {k: v for k, v in totals.items() if v}) as display:
            tail = MetricsTail(run.path / "metrics.jsonl")
            run_local(config, run, lambda: [display.update(record) for record in tail.poll()])
    except RunFailed as error:
        print(f"fp8slurm train: the run failed: {error}\nlogs: {run.attempt_dir}", file=sys.stderr)
        return 1
    finally:
        run.release()
    if config.observe.plot:
        from fp8slurm.observe.plot import plot

        print(f"plot: {plot(run.path)}")
    return 0


def convert(argv: list[str]) -> int:
    """`fp8slurm convert NAME IN OUT`."""
    from fp8slurm.checkpoint.cli import main as convert_main

    return convert_main(argv)


def evaluate(argv: list[str]) -> int:
    """`fp8slurm eval --run RUN`."""
    from fp8slurm.eval.cli import main as eval_main

    return eval_main(argv)


def plot(argv: list[str]) -> int:
    """`fp8slurm plot RUN [RUN ...]`."""
    from fp8slurm.observe.plot import main as plot_main

    return plot_main(argv)


COMMANDS = {
    "train": (train, "run a recipe"),
    "convert": (convert, "checkpoints between HF, FP8 HF and torch_dist"),
    "eval": (evaluate, "accuracy of a run's checkpoint in FP8"),
    "plot": (plot, "draw the curves of one or several runs"),
}

if __name__ == "__main__":
    sys.exit(main())
