"""Files of a run that somebody may have torn: what cannot be read is noted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a note, where it cannot be read, and without one where there is no file."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "not JSON (torn?)"
        notes.append(f"{'/'.join(path.parts[-3:])} cannot be read: {why}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{'/'.join(path.parts[-3:])} is no JSON object")
        return {}
    return value
