"""`fp8slurm report RUN [--compare RUN2 ...] [--out FILE] [--text]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fp8slurm.core.errors import InputError
from fp8slurm.core.files import write_atomic
from fp8slurm.observe.output import check_file
from fp8slurm.report.samples import LIMIT, read_samples
from fp8slurm.run.reader import read_run


def main(argv: list[str]) -> int:
    """Exit status 0; bad input is an InputError that names it."""
    parser = argparse.ArgumentParser(
        prog="fp8slurm report",
        description="A run as one HTML file that needs nothing else, or as Markdown (--text). docs/report.md.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/tiny-fp8; finished or not")
    parser.add_argument(
        "--compare", nargs="+", type=Path, default=[], metavar="RUN2", help="further runs to lay beside it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write (default: report.html in RUN; --text: the terminal)"
    )
    parser.add_argument("--text", action="store_true", help="Markdown instead of HTML")
    parser.add_argument(
        "--samples",
        type=int,
        default=LIMIT,
        metavar="N",
        help=f"saved samples to embed at most ({LIMIT}; --text shows 3)",
    )
    args = parser.parse_args(argv)
    if args.samples < 0:
        raise InputError(f"--samples {args.samples} is below 0")
    if args.out is not None:
        check_file(args.out, "--out")
        written = ("Markdown", (".md", ".txt")) if args.text else ("HTML", (".html", ".htm"))
        if args.out.suffix.lower() in (".pdf", ".png", ".docx", ".md", ".html", ".htm", ".json") and (
            args.out.suffix.lower() not in written[1]
        ):
            raise InputError(f"--out {args.out}: what is written is {written[0]}; allowed: {' or '.join(written[1])}")
    paths = [args.run, *args.compare]
    runs = [read_run(p) for p in paths]
    names = [r.name for r in runs]
    if len(set(names)) < len(names):
        names = [str(p) for p in paths]
    if len(set(names)) < len(names):
        raise InputError(f"--compare: a run is named twice ({', '.join(names)})")
    samples = read_samples(runs[0], min(args.samples, 3) if args.text else args.samples)
    if args.text:
        from fp8slurm.report.text import markdown as render
    else:
        from fp8slurm.report.page import page as render
    document = render(runs[0], samples, runs[1:], names)
    if args.text and args.out is None:
        sys.stdout.write(document)
        return 0
    out = args.out or args.run / "report.html"
    try:
        write_atomic(out, document)
    except OSError as error:
        raise InputError(f"{error.filename or out} cannot be written: {error.strerror}") from None
    print(f"{out}  ({out.stat().st_size / 1e6:.1f} MB)")
    return 0
