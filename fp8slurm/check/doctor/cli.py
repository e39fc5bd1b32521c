"""`fp8slurm doctor`: look, print one line a finding, say what to do."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fp8slurm.check.doctor.finding import LEVELS, Check, Finding, worst
from fp8slurm.core.errors import InputError
from fp8slurm.observe.output import check_file

SLURM = Check("slurm")

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}


def main(argv: list[str]) -> int:
    """Exit status 0: ok or warnings; 1: errors; bad input is an InputError (2)."""
    from fp8slurm.config import parse, recipe_names

    parser = argparse.ArgumentParser(
        prog="fp8slurm doctor",
        allow_abbrev=False,
        description=(
            "Looks at this machine, or with --slurm at the nodes of a short job: versions, GPUs, memory, /dev/shm,"
            " limits, the shared file system, clocks, ports, all-reduce bandwidth, Slurm, and whether every node can"
            " read the recipes' checkpoints and data. Settings of a run (--section.key VALUE) change the recipes."
        ),
    )
    names = ", ".join(recipe_names())
    parser.add_argument(
        "--recipe", action="append", default=[], help=f"{names}, or a .toml file's path; may be repeated"
    )
    parser.add_argument(
        "--slurm",
        action="store_true",
        help="over the nodes of this allocation, or as a job with the first recipe's [slurm]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the all-reduce and the check of the memory plan"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--svg", metavar="FILE", help="also write the output as a picture")
    own, flags = parser.parse_known_args(argv)
    if flags and not own.recipe:
        raise InputError(f"{flags[0]}: settings change a recipe, and there is no --recipe; --help lists the others")
    configs = [parse(recipe, flags, "fp8slurm doctor") for recipe in own.recipe]
    if own.svg:
        check_file(Path(own.svg), "--svg")
    if own.slurm:
        configs = [c.model_copy(update={"slurm": c.slurm.model_copy(update={"executor": "slurm"})}) for c in configs]

    findings = _look(configs, own.slurm, own.quick)
    if own.json:
        print(json.dumps({"status": worst(findings), "findings": [f.to_json() for f in findings]}, indent=1))
    else:
        _show(findings, own.svg, ["fp8slurm", "doctor", *argv])
    return 1 if worst(findings) == "error" else 0


def _look(configs: list, over_slurm: bool, quick: bool) -> list[Finding]:
    from fp8slurm.check.doctor.scheduler import check_slurm

    if over_slurm:
        from fp8slurm.check.doctor.job import over_nodes
        from fp8slurm.scheduler.job import available

        if not available():
            raise InputError(
                "--slurm: there is no Slurm on this machine (sbatch, srun, squeue); run this on a login node"
            )
        controller = list(check_slurm(configs))
        if "SLURM_JOB_ID" not in os.environ and worst(controller) == "error":
            fix = "fix what is above; a job that Slurm would refuse, or never start, was not queued"
            return [*controller, SLURM.error("the nodes were not looked at", fix)]
        return over_nodes(configs, quick, lambda text: print(text, file=sys.stderr)) + controller
    from fp8slurm.check.doctor.files import check_paths
    from fp8slurm.check.doctor.network import check_ports
    from fp8slurm.check.doctor.quick import local

    tasks_here = [c for c in configs if c.slurm.executor != "slurm"]
    findings = local(configs, tasks_here=bool(tasks_here) or not configs, plans=not quick)
    findings += check_paths(configs)[0]
    findings += check_ports("127.0.0.1")
    if not quick:
        findings += _bandwidth_here()
    return findings + list(check_slurm(configs))


def _bandwidth_here() -> list[Finding]:
    import tempfile

    from fp8slurm.check.doctor.bandwidth import check_bandwidth
    from fp8slurm.check.doctor.gpu import visible

    gpus = len(visible())
    if gpus == 1:
        return []
    with tempfile.TemporaryDirectory() as folder:
        return check_bandwidth(0, 1, "127.0.0.1", Path(folder) / "store.json", gpus)


def _show(findings: list[Finding], svg: str | None, command: list[str]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    render(findings, console)
    if svg:
        picture = Console(record=True, width=150, highlight=False, file=open(os.devnull, "w"))
        render(findings, picture)
        # without rich's fonts, which a viewer would fetch from somewhere
        drawn = picture.export_svg(title=" ".join(command))
        text = re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", drawn, flags=re.S)
        with open(svg, "w") as file:
            file.write(text)


def render(findings: list[Finding], console: Console) -> None:
    """One row a finding, what to do below it, and a last line with the count."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for f in findings:
        text = Text(f"{f.node}: " if f.node else "", style="bold")
        text.append(f.text, style="" if f.level == "ok" else COLOURS[f.level].removeprefix("bold "))
        if f.fix:
            text.append(f"\n-> {f.fix}", style="dim")
        table.add_row(Text(f.level, style=COLOURS[f.level]), Text(f.check, style="dim"), text)
    console.print(table)
    counts = {level: sum(f.level == level for f in findings) for level in LEVELS}
    console.print(", ".join(f"{n} {level}{'s' if n != 1 and level != 'ok' else ''}" for level, n in counts.items()))
