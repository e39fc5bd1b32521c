"""chain.json of a run: the jobs that were queued as one chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAIN = "chain.json"


def read_chain(path: Path) -> dict[str, Any]:
    """chain.json, empty if there is none. ValueError: it cannot be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): move it away") from None
