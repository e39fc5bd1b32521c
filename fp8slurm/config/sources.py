"""data.sources on a command line: one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fp8slurm.core.errors import InputError

FORM = """allowed: a JSON object such as '{"gsm8k": {"file": "data/gsm8k.jsonl", "weight": 2}}'"""


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """The object; what is in it is the settings' to check. InputError: it is none."""
    text = " ".join(words) or "{}"
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"--data.sources {text} is not JSON ({error}); {FORM}") from None
    if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
        raise InputError(f"--data.sources {text} is no object of objects; {FORM}")
    return values


def to_words(values: dict[str, Any]) -> list[str]:
    """What from_words reads."""
    plain = {name: source.model_dump(mode="json", exclude_none=True) for name, source in values.items()}
    return [json.dumps(plain)] if plain else []
