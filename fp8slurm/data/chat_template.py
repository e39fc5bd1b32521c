"""What a tokenizer's chat template asks for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

GIVEN = frozenset(
    "messages tools documents add_generation_prompt continue_final_message bos_token eos_token pad_token unk_token "
    "raise_exception strftime_now".split()
)
"""What transformers gives every template, or this package does not: nothing that data.chat_template_kwargs can set."""
_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
"""A tag of transformers' own, around what the assistant says."""


def unused_arguments(tokenizer: Any, arguments: Iterable[str]) -> str:
    """Why some of these arguments cannot change what the chat template writes; "" where it asks for all of them.

    A template that cannot be parsed asks for anything: rendering it says what is wrong.
    """
    names = sorted(arguments)
    if not names:
        return ""
    folder = tokenizer.name_or_path
    if not tokenizer.chat_template:
        return f"{', '.join(names)}: the tokenizer of {folder} has no chat template; allowed: leave them out"
    asked = variables_of(tokenizer.get_chat_template())
    unused = [name for name in names if name not in asked] if asked is not None else []
    if not unused:
        return ""
    allowed = ", ".join(sorted((asked or set()) - GIVEN)) or "none, this one has no such arguments"
    return f"{', '.join(unused)}: the chat template of {folder} never asks for it; allowed: {allowed}"


@lru_cache
def variables_of(template: str) -> frozenset[str] | None:
    """The names that a Jinja template looks up and does not set itself; None: it cannot be parsed."""
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template))))
    except TemplateError:
        return None
