"""`fp8slurm status [RUN]`: parses, asks status.py, and draws tables."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8slurm.observe.console import format_duration
from fp8slurm.report.safe import gist
from fp8slurm.run.status import RunStatus, find_run, find_runs, statuses

WIDTH = 140
"""Columns where the output is no terminal."""
ERROR_LINES = 15
"""Last lines of an error that the page of one run shows."""
_COLOURED = {
    "green": "running",
    "cyan": "finished done completed",
    "yellow": "pending requeued unknown",
    "red": "failed node_fail timeout out_of_memory",
    "magenta": "cancelled stopped",
}
COLOURS = {state: colour for colour, states in _COLOURED.items() for state in states.split()}
OVER = ("finished", "failed", "stopped", "unknown", "cancelled", "timeout", "node_fail", "out_of_memory")


def main(argv: list[str]) -> int:
    """Exit status 0; a run that does not exist is an InputError that names it."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm status",
        description="Where runs stand: from their directories, and from Slurm where there is one.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's directory or name (left out: every run in ROOT)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run directories (%(default)s)")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object for RUN, a list of them without; all keys, null: not known"
    )
    args = parser.parse_args(argv)
    paths = [find_run(args.run, args.root)] if args.run else find_runs(args.root)
    runs, problem = statuses(paths)
    if args.json:
        print(json.dumps(asdict(runs[0]) if args.run else [asdict(s) for s in runs], indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        if args.run:
            show_one(runs[0], console)
        elif runs:
            show_all(runs, console)
        else:
            print(f"no runs in {args.root} (--root names another folder)")
    if problem:
        print(f"fp8slurm status: Slurm could not be asked: {problem}", file=sys.stderr)
    return 0


def show_all(runs: list[RunStatus], console: Console) -> None:
    """One line a run."""
    rest = console.measure(runs_table(runs, 0)).maximum
    console.print(runs_table(runs, max(20, console.width - rest - 2)))
    damaged = [s.name for s in runs if s.notes]
    if damaged:
        console.print(f"damaged files in {', '.join(damaged)}: fp8slurm status RUN names them", markup=False)


def runs_table(runs: list[RunStatus], error_width: int) -> Table:
    """The table of all runs; errors are cut to `error_width` columns (0: left out)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    left = ("run", "state", "checkpoint", "last error")
    figures = ("job", "attempt", "step", "reward", "held-out", "s/step", "left")
    for title in ("run", "state", *figures, "checkpoint", "last error")[: None if error_width else -1]:
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True, overflow="ellipsis")
    for s in runs:
        earlier = s.error_attempt != s.attempt
        error = Text(("earlier: " if earlier and s.error else "") + gist(s.error or ""), "dim" if earlier else "red")
        error.truncate(error_width, overflow="ellipsis")
        cells = (
            Text(s.name),
            state_text(s.state),
            s.job_id or "",
            "" if s.attempt is None else str(s.attempt),
            steps(s),
            number(s.reward, ".3f"),
            number(s.accuracy, ".3f"),
            number(s.step_seconds, ".1f"),
            "" if s.remaining_s is None or s.state in OVER else format_duration(s.remaining_s),
            checkpoint(s),
            error,
        )
        table.add_row(*cells[: len(table.columns)])
    return table


def show_one(s: RunStatus, console: Console) -> None:
    """A page about one run."""
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("run", Text(s.path))
    facts.add_row("state", state_text(s.state))
    if s.job_id:
        job = f"{s.job_id}"
        if s.job is not None:
            reason, nodes = (f"({s.job.reason})" if s.job.reason else ""), (f"on {s.job.nodes}" if s.job.nodes else "")
            time = f"{s.job.elapsed} of {s.job.limit}" if s.job.elapsed and s.job.limit else s.job.elapsed
            waits = f"start expected {s.job.start}" if s.job.state == "PENDING" and s.job.start else time
            job = " ".join(w for w in (job, s.job.state, reason, nodes, waits) if w)
        else:
            job += " (Slurm could not be asked)" if s.problem else " (Slurm does not know it any more)"
        facts.add_row("Slurm job", Text(job))
    facts.add_row("attempt", "none yet" if s.attempt is None else f"{s.attempt}  ({s.path}/attempts/{s.attempt})")
    age = "" if s.record_age_s is None else f", {format_duration(s.record_age_s)} ago"
    facts.add_row("step", f"{steps(s)}{age}" if s.phase else "none yet")
    if s.reward is not None or s.accuracy is not None:
        facts.add_row("reward", f"{number(s.reward, '.4f')}  held-out {number(s.accuracy, '.4f') or 'not measured'}")
    if s.step_seconds is not None:
        tokens = "" if s.tokens_per_s is None else f", {s.tokens_per_s:,.0f} tokens/s"
        left = "" if s.remaining_s is None or not s.remaining_s else f", about {format_duration(s.remaining_s)} left"
        facts.add_row("speed", f"{s.step_seconds:.1f} s a step{tokens}{left}")
    facts.add_row("checkpoint", checkpoint(s) or "none yet")
    if s.stop:
        facts.add_row("stopped", Text(s.stop))
    for node in s.left_out:
        facts.add_row("left out", Text(node))
    for note in s.notes:
        facts.add_row("damaged", Text(note, style="yellow"))
    console.print(facts)
    if s.links:
        console.print()
        console.print(links_table(s))
    if s.error:
        console.print()
        newest = s.error_attempt == s.attempt
        title = "last error" if newest else f"earlier error, the run went on in attempt {s.attempt}"
        console.print(Text(f"{title} (attempt {s.error_attempt})", style="bold red" if newest else "dim"))
        for line in s.error.splitlines()[-ERROR_LINES:]:
            console.print(Text(line, style="" if newest else "dim"), soft_wrap=True)


def links_table(s: RunStatus) -> Table:
    """The jobs of the run's chain."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("chain", "job", "state", "log"):
        table.add_column(title, no_wrap=title != "log")
    for link in s.links:
        log = link.log.replace(str(Path(s.path).resolve()), s.path)
        table.add_row(link.name, link.job_id or "", state_text(link.state), Text(log))
    return table


def state_text(state: str) -> Text:
    return Text(state, style=COLOURS.get(state, ""))


def steps(s: RunStatus) -> str:
    """rl 12/60."""
    return f"{s.phase} {s.step}/{'?' if s.total is None else s.total}" if s.phase else ""


def checkpoint(s: RunStatus) -> str:
    """step_000020 (4:10 ago)."""
    if s.checkpoint is None:
        return ""
    return s.checkpoint + ("" if s.checkpoint_age_s is None else f" ({format_duration(s.checkpoint_age_s)} ago)")


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
