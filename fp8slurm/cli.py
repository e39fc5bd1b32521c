"""The `fp8slurm` command: parses and delegates."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import MAY_PASS, patiently

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig


PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""A path that cannot be used as it was meant: somebody else's, read-only, too long."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `fp8slurm` command; returns its exit status.

    0: done; 1: a job failed; 2: bad input, nothing was started; 3: eval and compare with --fail-if-worse: worse;
    130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fp8slurm",
        description="Reinforcement learning in FP8, with Megatron-core and SGLang.",
        epilog="fp8slurm COMMAND --help lists a command's flags.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, (_, what) in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    if argv[:1] == ["--version"]:
        from fp8slurm import __version__

        print(f"fp8slurm {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        return 0 if argv else 2
    command = parser.parse_args(argv[:1]).command
    try:
        status = COMMANDS[command][0](argv[1:])
        sys.stdout.flush()  # here, not when the interpreter ends: the reader of a pipe may be gone
        return status
    except InputError as error:
        print(f"fp8slurm {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fp8slurm {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough; what is left in the buffer must not be tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None or error.errno not in (*PATH_ERRORS, *MAY_PASS):
            raise
        print(f"fp8slurm {command}: {os.fsdecode(error.filename)}: {error.strerror}", file=sys.stderr)
        return 2 if error.errno in PATH_ERRORS else 1


def train(argv: list[str]) -> int:
    """`fp8slurm train --recipe R [--dry-run] [--section.key VALUE ...]`."""
    from fp8slurm.config import parse_command, recipe_parser

    parser = recipe_parser(
        "fp8slurm train",
        "Run a recipe, here or (--slurm.executor slurm) as a Slurm job that is followed. The same command again goes "
        "on where the run stopped.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    own, config = parse_command(parser, argv)
    if own.dry_run:
        return _dry_run(config, "train")
    _check(config, "train")
    if config.slurm.executor == "slurm":
        return _train_under_slurm(config)
    return _train_here(config)


def _check(config: RunConfig, command: str) -> None:
    """Preflight and the quick part of the doctor, with warnings. InputError: the run cannot work here."""
    from fp8slurm.check.doctor.quick import quick
    from fp8slurm.check.preflight import preflight

    _tell("checking settings, model and data")
    _warn(command, patiently(lambda: preflight(config)))
    _tell("checking this machine")
    _warn(command, quick(config))


def _dry_run(config: RunConfig, command: str) -> int:
    """Print what would run; exit status 2: a start would be refused. InputError: it could not work anywhere."""
    from fp8slurm.check.cluster import check_in_passing
    from fp8slurm.check.describe import describe
    from fp8slurm.check.dry_run import end_dry_run
    from fp8slurm.check.preflight import preflight
    from fp8slurm.config import to_toml

    found = patiently(lambda: preflight(config, dry_run=True))
    if config.slurm.executor == "slurm":
        found += check_in_passing(config)
    return end_dry_run(command, found, lambda: print(to_toml(config), describe(config), sep="\n"))


def _tell(text: str) -> None:
    """What is done now, on stderr with the time: a command that is silent for a minute looks stuck."""
    from fp8slurm.observe.console import stamp

    print(f"{stamp()}  {text}", file=sys.stderr, flush=True)


def _warn(command: str, warnings: list[str]) -> None:
    for warning in warnings:
        print(f"fp8slurm {command}: warning: {warning}", file=sys.stderr)


def _train_here(config: RunConfig) -> int:
    from contextlib import nullcontext

    from fp8slurm.report.live import LiveRun
    from fp8slurm.run.directory import RunDirectory
    from fp8slurm.slurm.attempt import check_configuration, finished, holder
    from fp8slurm.slurm.launch import RunFailed, open_run, run_here

    run = RunDirectory(config.run.root / config.run.name)
    patiently(lambda: run.check_free(holder))
    patiently(lambda: check_configuration(config, run))
    if patiently(lambda: finished(config, run, verify=True)):  # what it was made with stays in its config.json
        return _is_finished(config)
    run = open_run(config)
    try:
        foreground = config.slurm.executor == "debug"  # the terminal is the tasks'
        live = patiently(lambda: LiveRun(run.path))
        _tell(f"attempt {run.attempt} of {run.path} begins; its logs are in {run.attempt_dir / 'logs'}")
        with nullcontext() if foreground else live:
            run_here(config, run, (lambda: None) if foreground else live.update)
    except RunFailed as error:
        print(f"fp8slurm train: the run failed: {error}\nlogs: {run.attempt_dir}", file=sys.stderr)
        return 1
    finally:
        run.release()
    return _draw(config)


def _train_under_slurm(config: RunConfig) -> int:
    """Submit, and follow the job until it is over; an interrupt leaves it running."""
    from fp8slurm.report.live import follow

    job_id = _submit(config, "train")
    if job_id is None:
        return _is_finished(config)
    path = config.run.root / config.run.name
    try:
        status = follow(path, _tell)
    except KeyboardInterrupt:
        print(
            f"\njob {job_id} goes on without this terminal; fp8slurm status {path} --follow shows it again, "
            f"scancel {job_id} ends it"
        )
        return 130
    if status.state != "finished":
        told = status.error or status.stop or "the reason is in its log"
        state = status.job.state if status.job is not None else status.state
        print(f"fp8slurm train: the run failed: job {status.job_id} is {state}: {told}", file=sys.stderr)
        return 1
    return _draw(config)


def _is_finished(config: RunConfig) -> int:
    """Say that there is nothing to do; 0. InputError: the settings ask for something else than was made."""
    from fp8slurm.run.directory import RunDirectory, rl_step
    from fp8slurm.slurm.attempt import refuse_vain_changes

    run = RunDirectory(config.run.root / config.run.name)
    steps = rl_step(run.newest_checkpoint())
    print(f"{run.path} is finished: {steps} steps (--run.steps more of them to go on, --run.name for another run)")
    patiently(lambda: refuse_vain_changes(config, run))
    return 0


def _draw(config: RunConfig) -> int:
    if config.observe.plot:
        from fp8slurm.observe.plot import plot

        try:
            print(f"plot: {plot(config.run.root / config.run.name)}")
        except (OSError, TransientInputError) as error:  # the run is whole all the same
            print(f"fp8slurm train: not drawn ({error}); fp8slurm plot draws it again", file=sys.stderr)
    return 0


def _submit(config: RunConfig, command: str) -> str | None:
    """The id of the new job; None where the run is finished already."""
    from fp8slurm.check.cluster import check_cluster
    from fp8slurm.run.directory import SLURM_FOLDER
    from fp8slurm.slurm.submit import submit

    _tell("asking Slurm whether it would take the job")
    _warn(command, check_cluster(config))
    _tell("queueing the job")
    job_id = submit(config)
    if job_id is not None:
        folder = config.run.root / config.run.name
        print(
            f"job {job_id}: {config.run.name}, in {folder}; its log is {folder / SLURM_FOLDER / f'{job_id}_0_log.err'}"
        )
    return job_id


def submit(argv: list[str]) -> int:
    """`fp8slurm submit --recipe R [--dry-run] [--section.key VALUE ...]`: train as a Slurm job; does not wait."""
    from fp8slurm.config import parse_command, recipe_parser
    from fp8slurm.config.derived import under_slurm

    parser = recipe_parser(
        "fp8slurm submit", "Queue a recipe as a Slurm job, without waiting for it; fp8slurm status shows how far it is."
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, queue nothing")
    own, config = parse_command(parser, argv)
    config = under_slurm(config)
    if own.dry_run:
        return _dry_run(config, "submit")
    _check(config, "submit")
    return _is_finished(config) if _submit(config, "submit") is None else 0


def worker(argv: list[str]) -> int:
    """`fp8slurm worker --recipe R`: what srun starts in a hand-written job script."""
    from fp8slurm.slurm.worker import main as worker_main

    return worker_main(argv)


def after(argv: list[str]) -> int:
    """`fp8slurm after STATUS --recipe R`: the last line of a hand-written job script."""
    from fp8slurm.slurm.epilogue import main as after_main

    return after_main(argv)


def convert(argv: list[str]) -> int:
    """`fp8slurm convert NAME IN OUT`."""
    from fp8slurm.checkpoint.converters.cli import main as convert_main
    from fp8slurm.eval.checkpoints import pick_checkpoint
    from fp8slurm.run.directory import RunDirectory, is_run

    return convert_main(argv, lambda path: pick_checkpoint(RunDirectory(path), None)[0] if is_run(path) else None)


def export(argv: list[str]) -> int:
    """`fp8slurm export RUN [OUT] [--fp8]`."""
    from fp8slurm.chain.export import main as export_main

    return export_main(argv)


def evaluate(argv: list[str]) -> int:
    """`fp8slurm eval --run RUN | --checkpoint SLURM_FOLDER`."""
    from fp8slurm.eval.cli import main as eval_main

    return eval_main(argv)


def compare(argv: list[str]) -> int:
    """`fp8slurm compare A B`."""
    from fp8slurm.eval.cli import compare_main

    return compare_main(argv)


def plot(argv: list[str]) -> int:
    """`fp8slurm plot RUN [RUN ...]`."""
    from fp8slurm.observe.plot import main as plot_main

    return plot_main(argv)


def report(argv: list[str]) -> int:
    """`fp8slurm report RUN [--compare RUN2 ...] [--out FILE] [--text]`."""
    from fp8slurm.report.cli import main as report_main

    return report_main(argv)


def plan(argv: list[str]) -> int:
    """`fp8slurm plan --recipe R [--section.key VALUE ...] [--json]`."""
    from fp8slurm.plan.cli import main as plan_main

    return plan_main(argv)


def status(argv: list[str]) -> int:
    """`fp8slurm status [RUN]`."""
    from fp8slurm.report.status import main as status_main

    return status_main(argv)


def trace(argv: list[str]) -> int:
    """`fp8slurm trace RUN [--rank N ...]`."""
    from fp8slurm.run.trace import main as trace_main

    return trace_main(argv)


def chain(argv: list[str]) -> int:
    """`fp8slurm chain --recipe R [--dry-run] [--section.key VALUE ...]`."""
    from fp8slurm.chain.submit import main as chain_main

    return chain_main(argv)


def doctor(argv: list[str]) -> int:
    """`fp8slurm doctor [--recipe R ...] [--slurm] [--json]`."""
    from fp8slurm.check.doctor.cli import main as doctor_main

    return doctor_main(argv)


COMMANDS = {
    "train": (train, "run a recipe, here or as a Slurm job that is followed"),
    "submit": (submit, "run a recipe as a Slurm job, without waiting for it"),
    "chain": (chain, "convert, train, export and evaluate as one chain of Slurm jobs"),
    "plan": (plan, "memory and bytes of a recipe, without a GPU"),
    "doctor": (doctor, "look for what is wrong with this machine or cluster, and say what to do"),
    "status": (status, "where runs stand, from their directories and from Slurm"),
    "trace": (trace, "have a running run write a profile of its next step"),
    "plot": (plot, "draw the curves of one or several runs"),
    "report": (report, "a run as one HTML file, or as Markdown"),
    "eval": (evaluate, "accuracy of a checkpoint in FP8, BF16 or both"),
    "compare": (compare, "two evaluations of the same questions"),
    "export": (export, "a run's checkpoint as a folder that transformers, vLLM and SGLang serve"),
    "convert": (convert, "checkpoints between Hugging Face, FP8 Hugging Face and torch_dist"),
    "worker": (worker, "in a job script of your own (sbatch/): one task, started by srun"),
    "after": (after, "in a job script of your own: its last line, requeues the job if its tasks died"),
}

if __name__ == "__main__":
    sys.exit(main())
