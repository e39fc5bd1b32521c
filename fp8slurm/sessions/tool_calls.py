"""The calls in what a model said, read by SGLang's parsers; which one, the chat template tells."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fp8slurm.core.errors import InputError
from fp8slurm.cpu import sglang_stubs

log = logging.getLogger(__name__)

FORMS = {
    "<function=": ("qwen3_coder", "<tool_call>"),
    "<tool_call>": ("qwen25", "<tool_call>"),
    "ipython": ("llama3", "{"),
}
"""Of what stands in a chat template: SGLang's parser, and what an answer with calls has in it."""


@dataclass(frozen=True)
class Call:
    """One call of a function."""

    name: str
    arguments: str
    """JSON."""


def form_of(template: str | None) -> tuple[str, str]:
    """(SGLang's parser, what an answer with calls has in it). InputError: the template has no form for tools."""
    if template and "tools" in template:
        for sign, form in FORMS.items():
            if sign in template:
                return form
    raise InputError("the model's chat template has no form for tools that is known here (Qwen's and Llama 3's are)")


@cache
def _parser() -> tuple[Any, Any]:
    """SGLang's parser and its type of a tool. Its import takes seconds, and nothing but a model with tools needs it."""
    if not torch.cuda.is_available():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        sglang_stubs.install()
    from sglang.srt.entrypoints.openai.protocol import Tool
    from sglang.srt.function_call.function_call_parser import FunctionCallParser

    return FunctionCallParser, Tool


def parse_calls(text: str, tools: Sequence[dict[str, Any]], tokenizer: Any) -> tuple[str, list[Call]]:
    """(the text besides, the calls). What cannot be read as a call of one of the tools stays in the text, all of it.

    InputError: the model's template has no form for tools.
    """
    name, sign = form_of(tokenizer.chat_template)
    if sign not in text:
        return text, []
    parser, tool = _parser()
    try:
        besides, found = parser([tool(**t) for t in tools], name).parse_non_stream(text)
    except Exception as error:  # parsers raise what a model's JSON makes them raise
        log.debug("no calls in %r: %s", text[:200], error)
        return text, []
    if not found:
        return text, []
    return besides, [Call(one.name, one.parameters) for one in found]
