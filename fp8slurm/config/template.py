"""Arguments for the chat template on a command line: names and values, or a JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from fp8slurm.core.errors import InputError

FORMS = """allowed: enable_thinking False, or as JSON '{"enable_thinking": false}'"""


def check_values(values: Any) -> None:
    """InputError: no value for a recipe, or text that looks like a truth value, which a template takes for true."""
    if not isinstance(values, dict):
        raise InputError(f"{values!r} is not an object of names and values; {FORMS}")
    for key, value in values.items():
        if not isinstance(value, bool | int | float | str):
            raise InputError(f"{key} {value!r} is neither true, false, a number nor text; {FORMS}")
        if isinstance(value, str) and value.lower() in ("true", "false"):
            raise InputError(f"{key} {value!r} is text; allowed: True and False (in recipes and JSON: true and false)")


def from_words(words: Sequence[str]) -> dict[str, Any]:
    """['enable_thinking', 'False'] or ['{"enable_thinking": false}']. InputError: neither; values are not checked."""
    text = " ".join(words)
    if text.lstrip().startswith("{"):
        try:
            values: dict[str, Any] = json.loads(text)
            return values
        except json.JSONDecodeError as error:
            raise InputError(f"{text} is not JSON ({error}); {FORMS}") from None
    if len(words) % 2:
        raise InputError(f"{text} is no pair of a name and a value; {FORMS}")
    return {name: _value(word) for name, word in zip(words[::2], words[1::2])}


def _value(word: str) -> bool | int | float | str:
    if word in ("True", "False"):
        return word == "True"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


TemplateArguments = Annotated[
    dict[str, bool | int | float | str],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME VALUE ...]|JSON",
        instance_from_str=from_words,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [json.dumps(values)] if values else [],
    ),
]
