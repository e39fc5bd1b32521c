"""chain.json of a run: the jobs that were queued as one chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8slurm.core.errors import InputError, TransientInputError
from fp8slurm.core.files import read_json

CHAIN = "chain.json"


def read_chain(path: Path) -> dict[str, Any]:
    """chain.json, empty if there is none. InputError: it cannot be read."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except InputError as error:
        raise TransientInputError(f"{path} cannot be read ({error}): move it away") from None
