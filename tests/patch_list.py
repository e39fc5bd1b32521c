"""The tables of docs/patches.md."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/patches.md"


def rows(section: str) -> list[tuple[list[str], str]]:
    """(names, second cell) of every row of a section's table."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [(re.findall(r"`([^`]+)`", first), second) for first, second, *_ in cells]


def check_replaced(section: str, applied: list[str], device: str = "CPU") -> None:
    """What a process on this device replaced is what the section lists for it, no more and no less; of rows that hold only
    somewhere ("where ...") it may be none."""
    always = {n for names, where in rows(section) for n in names if device in where and "where" not in where}
    listed = {n for names, where in rows(section) for n in names if device in where}
    assert set(applied) - listed == set(), "replaced, and not listed"
    assert always - set(applied) == set(), "listed, and not replaced"


def missing(names: list[str]) -> list[str]:
    """Those of the full names that the installed versions do not have."""
    return [name for name in names if not _is_there(name)]


def _is_there(name: str) -> bool:
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
