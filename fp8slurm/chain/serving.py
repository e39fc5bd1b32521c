"""What a folder needs so that a model is asked as in its run by people who serve it without any flag."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json

TEMPLATE, TOKENIZER, OLD_TEMPLATE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
"""Where chat templates lie: transformers reads the first in place of the others."""
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "pad_token_id", "eos_token_id")
QUESTION = [{"role": "system", "content": "a rule"}, {"role": "user", "content": "a question"}]


def serving_files(origin: Path, config: RunConfig) -> dict[str, bytes]:
    """Files by name that take the place of those of the run's Hugging Face folder.

    The chat template has data.chat_template_kwargs as its defaults, and generation_config.json names every token with
    which the run's engines ended a response. A file that says so already is left out.

    Raises:
        InputError: no tokenizer or end token there, or the template cannot be given the run's arguments.
    """
    from fp8slurm.data.prompts import end_token_ids, load_tokenizer

    tokenizer = load_tokenizer(origin)
    texts: dict[str, bytes] = {}
    if config.data.chat_template_kwargs and tokenizer.chat_template:
        _check(tokenizer, config.data.chat_template_kwargs)
        texts |= _templates(origin, config.data.chat_template_kwargs)
    ends: list[int] = sorted({*end_token_ids(origin, tokenizer), *config.rollout.stop_token_ids})
    if (origin / GENERATION).is_file():
        generation = read_json(origin / GENERATION)
    else:  # then servers take these from config.json
        model = read_json(origin / "config.json")
        generation = {key: model[key] for key in SPECIAL if key in model}
    said = generation.get("eos_token_id")
    if ends != (sorted(said) if isinstance(said, list) else [said]):
        texts[GENERATION] = _json(generation | {"eos_token_id": ends[0] if len(ends) == 1 else ends})
    return texts


def with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    """A Jinja template that takes `arguments` where it is not given others. Values: truth values, numbers, text."""
    # Python's notation of these values is Jinja's too. What is no name cannot be used in a template.
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}"
        for name, value in arguments.items()
        if name.isidentifier()
    ]
    # chat templates are rendered with trim_blocks: a line break behind a block is dropped
    return "".join(lines) + ("\n" if lines and template.startswith("\n") else "") + template


def _check(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """InputError: the template with defaults does not give what the template gives with the arguments."""
    template = tokenizer.get_chat_template()
    rendered = []
    for messages in (QUESTION, QUESTION[1:]):
        for how in (dict(arguments), {"chat_template": with_defaults(template, arguments)}):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)
            except Exception as error:  # templates raise what they like, some refuse a system message
                text = f"{type(error).__name__}: {error}"
            rendered.append(text)
    if rendered[::2] != rendered[1::2]:
        raise InputError(
            f"data.chat_template_kwargs {json.dumps(dict(arguments))} cannot be made the defaults of the chat "
            f"template: with them it gives {rendered[2]!r:.200}, with these defaults {rendered[3]!r:.200}"
        )


def _templates(folder: Path, arguments: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file of a folder that holds a chat template, with the arguments as its defaults."""
    texts = {}
    if (folder / TEMPLATE).is_file():
        texts[TEMPLATE] = with_defaults((folder / TEMPLATE).read_bytes().decode(), arguments).encode()
    for name in (TOKENIZER, OLD_TEMPLATE):
        values = read_json(folder / name) if (folder / name).is_file() else {}
        held = values.get("chat_template")
        if isinstance(held, str):
            values["chat_template"] = with_defaults(held, arguments)
        elif isinstance(held, list):  # several, by name
            values["chat_template"] = [x | {"template": with_defaults(x["template"], arguments)} for x in held]
        else:
            continue
        texts[name] = _json(values)
    return texts


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
