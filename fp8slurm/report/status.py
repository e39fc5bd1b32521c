"""`fp8slurm status [RUN] [--watch] [--follow]`: parses, asks run/status.py, and draws tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fp8slurm.core.errors import InputError
from fp8slurm.observe.console import clock, format_duration, stamp
from fp8slurm.report.live import follow
from fp8slurm.report.safe import gist
from fp8slurm.run.gpu_use import NodeGpus
from fp8slurm.run.status import RunStatus, find_run, find_runs, statuses
from fp8slurm.scheduler.job import parse_time
from fp8slurm.scheduler.queue import SlurmJob

WIDTH = 140
"""Columns where the output is no terminal."""
ERROR_LINES = 15
"""Last lines of an error that the page of one run shows."""
WATCH_S, LEAST_WATCH_S = 10.0, 2.0
_COLOURED = {
    "green": "running",
    "cyan": "finished done completed",
    "yellow": "pending requeued unknown",
    "red": "failed node_fail timeout out_of_memory",
    "magenta": "cancelled stopped",
}
COLOURS = {state: colour for colour, states in _COLOURED.items() for state in states.split()}
OVER = ("finished", "failed", "stopped", "unknown", "cancelled", "timeout", "node_fail", "out_of_memory")
FIRST_TO_GO = ("attempt", "checkpoint", "held-out", "job", "reward", "s/step")
"""Columns that a narrow terminal does without, in this order."""
LEAST_REMARKS = 36


def main(argv: list[str]) -> int:
    """Exit status 0; with --follow 1 where the run ends before its last step. InputError: a run that does not exist."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm status",
        description="Where runs stand: from their directories, and from Slurm where there is one.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's directory or name (left out: every run in ROOT)")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="folder of the run directories (%(default)s)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--json", action="store_true", help="one JSON object for RUN, a list of them without; all keys, null: not known"
    )
    how.add_argument(
        "--watch", type=float, nargs="?", const=WATCH_S, metavar="SECONDS",
        help=f"look again every SECONDS ({WATCH_S:g}), until Ctrl-C",
    )  # fmt: skip
    how.add_argument(
        "--follow", action="store_true", help="show RUN's steps as train does, until it is over; Ctrl-C leaves it alone"
    )
    args = parser.parse_args(argv)
    path = find_run(args.run, args.root) if args.run else None
    console = Console()
    if args.watch is not None:
        if not args.watch >= LEAST_WATCH_S:
            raise InputError(f"--watch {args.watch:g}: at least {LEAST_WATCH_S:g} seconds: each look asks Slurm")
        if not console.is_terminal:
            raise InputError("--watch draws on a terminal; without one: fp8slurm status --json, again and again")
        return watch(lambda: _statuses(path, args.root), path is not None, args.root, console, args.watch)
    if args.follow:
        if path is None:
            raise InputError("--follow: which run? fp8slurm status RUN --follow")
        return _follow(path, console)
    runs, problem = _statuses(path, args.root)
    if args.json:
        print(json.dumps(asdict(runs[0]) if args.run else [asdict(s) for s in runs], indent=1))
    else:
        if not console.is_terminal:
            console = Console(width=WIDTH)
        for part in page(runs[0]) if path is not None else overview(runs, args.root, console):
            console.print(part, soft_wrap=isinstance(part, Text))
    if problem:
        print(f"fp8slurm status: {_unasked(problem)}", file=sys.stderr)
    return 0


def _statuses(path: Path | None, root: Path) -> tuple[list[RunStatus], str]:
    return statuses([path] if path is not None else find_runs(root))


def _unasked(problem: str) -> str:
    return f"Slurm could not be asked: {problem}"


def watch(
    look: Callable[[], tuple[list[RunStatus], str]], one: bool, root: Path, console: Console, every_s: float
) -> int:
    """The page of one run, or the table of all, drawn anew every `every_s` seconds until Ctrl-C."""
    try:
        with Live(console=console, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
            while True:
                runs, problem = look()
                head = f"{stamp()}  every {every_s:g} s, Ctrl-C ends"
                told = [Text(_unasked(problem), style="yellow")] if problem else []
                parts = page(runs[0]) if one else overview(runs, root, console)
                live.update(Group(Text(head, style="dim"), *told, *parts), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


def _follow(path: Path, console: Console) -> int:
    """0: it is finished, 1: it has ended before that, 130: interrupted, the run goes on."""
    try:
        s = follow(path, lambda text: print(f"{stamp()}  {text}", file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print(f"\n{path} goes on without this terminal; fp8slurm status {path} --follow shows it again")
        return 130
    if s.error and s.error_attempt == s.attempt:
        console.print(Text(s.error), soft_wrap=True)
    return 0 if s.state == "finished" else 1


def overview(runs: list[RunStatus], root: Path, console: Console) -> list[RenderableType]:
    """One line a run."""
    if not runs:
        return [Text(f"no runs in {root} (--root names another folder)")]
    parts: list[RenderableType] = [runs_table(runs, console)]
    damaged = [s.name for s in runs if s.notes]
    if damaged:
        parts.append(Text(f"damaged files in {', '.join(damaged)}: fp8slurm status RUN names them"))
    return parts


def runs_table(runs: list[RunStatus], console: Console) -> Table:
    """The table of all runs; on a narrow terminal with fewer columns. Remarks are cut where the line ends."""
    empty = [title for title, known in (("job", [s.job_id for s in runs]), ("held-out", [s.accuracy for s in runs]))
             if not any(v is not None for v in known)]  # fmt: skip
    order = [*empty, *(title for title in FIRST_TO_GO if title not in empty)]
    for gone in range(len(order) + 1):
        rest = console.measure(_table(runs, order[:gone], 0), options=console.options.update(width=1000)).maximum
        if rest + 2 + LEAST_REMARKS <= console.width:
            break
    return _table(runs, order[:gone], max(16, console.width - rest - 2))


def _table(runs: list[RunStatus], left_out: list[str], remarks: int) -> Table:
    """remarks: columns that they may have; 0: left out."""
    left = ("run", "state", "checkpoint", "remarks")
    rows: list[dict[str, str | Text]] = [{
        "run": Text(s.name), "state": state_text(s.state), "job": s.job_id or "",
        "attempt": "" if s.attempt is None else str(s.attempt), "step": steps(s), "reward": number(s.reward, ".3f"),
        "held-out": number(s.accuracy, ".3f"), "s/step": number(s.step_seconds, ".1f"),
        "left": "" if s.remaining_s is None or s.state in OVER or s.doing else format_duration(s.remaining_s),
        "checkpoint": checkpoint(s),
    } for s in runs]  # fmt: skip
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    titles = [title for title in rows[0] if title not in left_out]
    for title in (*titles, *(("remarks",) if remarks else ())):
        table.add_column(title, justify="left" if title in left else "right", no_wrap=True, overflow="ellipsis")
    for s, row in zip(runs, rows):
        told = remark(s)
        told.truncate(remarks, overflow="ellipsis")
        table.add_row(*(row[title] for title in titles), *([told] if remarks else []))
    return table


def remark(s: RunStatus) -> Text:
    """What has to be known of a run, most pressing first, on one line."""
    parts = []
    if s.error and s.error_attempt == s.attempt:
        parts.append(Text(gist(s.error), style="red"))
    if s.doing:
        parts.append(Text(s.doing, style="cyan"))
    if s.job is not None and s.job.state == "PENDING":
        parts.append(Text(f"waits ({s.job.reason or 'no reason given'}){_start(s.job)}", style="yellow"))
    parts += [Text(alert, style="yellow") for alert in s.alerts if s.state not in OVER]
    if s.error and s.error_attempt != s.attempt:
        parts.append(Text(f"earlier: {gist(s.error)}", style="dim"))
    return Text("; ").join(parts)


def _start(job: SlurmJob) -> str:
    """When Slurm expects a waiting job to start."""
    at = parse_time(job.start)
    return "" if at is None else f", start expected {clock(at)}"


def page(s: RunStatus) -> list[RenderableType]:
    """About one run: facts, the jobs of its chain, the end of its last error."""
    parts: list[RenderableType] = [facts(s)]
    if s.links:
        parts += [Text(""), links_table(s)]
    if s.error:
        newest = s.error_attempt == s.attempt
        title = "last error" if newest else f"earlier error, the run went on in attempt {s.attempt}"
        parts += [Text(""), Text(f"{title} (attempt {s.error_attempt})", style="bold red" if newest else "dim")]
        parts += [Text(line, style="" if newest else "dim") for line in s.error.splitlines()[-ERROR_LINES:]]
    return parts


def facts(s: RunStatus) -> Table:
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("run", Text(s.path))
    facts.add_row("state", state_text(s.state))
    if s.doing:
        facts.add_row("now", Text(s.doing, style="cyan"))
    if s.job_id:
        facts.add_row("Slurm job", Text(_job(s)))
    facts.add_row("attempt", "none yet" if s.attempt is None else f"{s.attempt}  ({s.path}/attempts/{s.attempt})")
    age = "" if s.record_age_s is None else f", {format_duration(s.record_age_s)} ago"
    facts.add_row("step", f"{steps(s)}{age}" if s.phase else "none yet")
    if s.reward is not None or s.accuracy is not None:
        facts.add_row("reward", f"{number(s.reward, '.4f')}  held-out {number(s.accuracy, '.4f') or 'not measured'}")
    if s.step_seconds is not None:
        tokens = "" if s.tokens_per_s is None else f", {s.tokens_per_s:,.0f} tokens/s"
        left = ""
        if s.remaining_s and s.state not in OVER and not s.doing:
            left = f", about {format_duration(s.remaining_s)} left"
            if s.phase == "sft":
                left += " of sft"
            elif s.state in ("running", "held"):  # of a job that waits nobody knows
                left += f", done {clock(time.time() + s.remaining_s)}"
        facts.add_row("speed", f"{s.step_seconds:.1f} s a step{tokens}{left}")
    if s.waits:
        facts.add_row("step time", Text(", ".join(f"{name} {share:.0%}" for name, share in s.waits.items())))
    for node in s.gpus:
        facts.add_row("GPUs", Text(gpus(node)))
    if s.who_waits:
        facts.add_row("waits", s.who_waits)
    facts.add_row("checkpoint", checkpoint(s) or "none yet")
    if s.stop:
        facts.add_row("stopped", Text(s.stop))
    for node_left_out in s.left_out:
        facts.add_row("left out", Text(node_left_out))
    for alert in s.alerts:
        facts.add_row("alert", Text(alert, style="yellow"))
    for note in s.notes:
        facts.add_row("damaged", Text(note, style="yellow"))
    return facts


def _job(s: RunStatus) -> str:
    if s.job is None:
        return f"{s.job_id}" + (" (Slurm could not be asked)" if s.problem else " (Slurm does not know it any more)")
    reason, nodes = (f"({s.job.reason})" if s.job.reason else ""), (f"on {s.job.nodes}" if s.job.nodes else "")
    told = f"{s.job.elapsed} of {s.job.limit}" if s.job.elapsed and s.job.limit else s.job.elapsed
    if s.job.state == "PENDING" and s.job.start:
        told = _start(s.job).removeprefix(", ")
    return " ".join(w for w in (s.job_id, s.job.state, reason, nodes, told) if w)


def gpus(node: NodeGpus) -> str:
    """node1: 8, busy 62 to 97%, memory at most 61 of 80 GiB (0:12 ago)."""
    fullest = max(range(len(node.use)), key=lambda i: node.used_gib[i])
    low, high = min(node.use), max(node.use)
    busy = f"{low:.0f}%" if low == high else f"{low:.0f} to {high:.0f}%"
    most = "at most " if len(node.use) > 1 else ""
    memory = f"{most}{node.used_gib[fullest]:.0f} of {node.total_gib[fullest]:.0f} GiB"
    return f"{node.host}: {len(node.use)}, busy {busy}, memory {memory} ({format_duration(node.age_s)} ago)"


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
