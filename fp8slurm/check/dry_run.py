"""How a dry run ends: what a start would be refused for comes last, and makes the exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Refusal(str):
    """Among a dry run's warnings: what a start would be refused for."""

    def __new__(cls, error: Exception) -> Refusal:
        return super().__new__(cls, f"a start would be refused here: {error}")


def end_dry_run(command: str, found: list[str], show: Callable[[], None]) -> int:
    """Say the warnings, `show()` what would run, and say the refusals; the exit status."""
    refusals = [f for f in found if isinstance(f, Refusal)]
    for warning in found:
        if warning not in refusals:
            print(f"fp8slurm {command}: warning: {warning}", file=sys.stderr)
    show()
    sys.stdout.flush()  # in a pipe or a file, too, the refusals stay last
    for refusal in refusals:
        print(f"fp8slurm {command}: {refusal}", file=sys.stderr)
    return 2 if refusals else 0
