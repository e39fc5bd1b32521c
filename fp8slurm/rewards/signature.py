"""What a reward function of the user's asks for by the names of its parameters, and what it may return.

def f(response, label)                          the plain form; these two may have any names
def f(response, row, finish_reason)             any of SINGLE, by name
def f(responses, label)                         one call for all samples of a prompt: any of GROUP, by name
async def f(...)                                any of these, many calls at a time in one process
"""

from __future__ import annotations

import inspect
import math
import numbers
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OF_PROMPT = ("label", "prompt", "row", "prompt_ids", "source")
OF_SAMPLE = {"response": "responses", "response_ids": "responses_ids", "finish_reason": "finish_reasons"}
"""What there is of each sample, and of all samples of a prompt."""
SINGLE = (*OF_SAMPLE, *OF_PROMPT)
GROUP = (*OF_SAMPLE.values(), *OF_PROMPT)
PLAIN = ("response", "label")
PART_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Form:
    """How a function is called."""

    names: tuple[str, ...] = PLAIN
    """What it is handed."""
    positional: int = len(PLAIN)
    """How many of them by position; the others by name."""
    asynchronous: bool = False

    @property
    def group(self) -> bool:
        """One call for all samples of a prompt."""
        return any(name in OF_SAMPLE.values() for name in self.names)


MATH = Form()


def form_of(function: Callable[..., Any]) -> Form:
    """How to call it. TypeError: it has a parameter that there is nothing for, or mixes one sample with all of them."""
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # written in C
        return Form(asynchronous=asynchronous)
    parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = tuple(p.name for p in parameters if p.name in (*SINGLE, *GROUP) and p.kind is not p.POSITIONAL_ONLY)
    strange = [p.name for p in parameters if p.default is p.empty and p.name not in known]
    if not strange:
        one, every = ([name for name in known if name in names] for names in (OF_SAMPLE, OF_SAMPLE.values()))
        if one and every:
            raise TypeError(f"it asks for {one[0]!r} of one sample and for {every[0]!r} of all samples of a prompt")
        return Form(known, 0, asynchronous)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters[:2]):
        return Form(asynchronous=asynchronous)
    first = [p.name for p in parameters[:2] if p.kind is not p.KEYWORD_ONLY]
    fits = len(first) == 2 and all(name in strange or name == own for name, own in zip(first, PLAIN))
    rest = tuple(name for name in known if name not in first)
    wrong = [name for name in strange if not (fits and name in first)] + [name for name in rest if name not in SINGLE]
    if wrong:
        raise TypeError(
            f"there is nothing for its parameter {wrong[0]!r}; allowed: {', '.join(SINGLE)}; for all samples of a "
            f"prompt in one call: {', '.join(GROUP)}; or any two names for response and label, first"
        )
    return Form((*PLAIN, *rest), 2, asynchronous)


def assess(value: object) -> dict[str, Any]:
    """{"reward": a float, "parts": {name: float} and "loss_mask": [bool] where there are any}, or {"error": what is
    wrong with the value}.

    value: a number, (number, {name of a part: number}), or (number, parts, which response tokens are trained on).
    """
    parts: object = {}
    mask: object = None
    if isinstance(value, tuple) and len(value) in (2, 3):
        value, parts, mask = (*value, None)[:3]
    if not isinstance(value, numbers.Real):
        return {"error": f"returned {value!r:.80} ({type(value).__name__}), not a number"}
    if not _finite(value):
        return {"error": f"returned {value!r:.80}"}
    if not isinstance(parts, dict):
        return {"error": f"returned parts {parts!r:.80}, which are no dict of names and numbers"}
    for name, part in parts.items():
        if not isinstance(name, str) or not PART_NAME.fullmatch(name):
            return {"error": f"returned a part named {name!r:.80}; allowed: letters, digits, '_', '.' and '-'"}
        if not _finite(part):
            return {"error": f"returned {part!r:.80} as its part {name!r}, not a finite number"}
    if mask is not None and not (isinstance(mask, (list, tuple)) and all(m in (0, 1) for m in mask)):
        return {"error": f"returned the loss mask {mask!r:.80}; allowed: a list of True and False, one a token"}
    scored: dict[str, Any] = {"reward": float(value)}
    if parts:
        scored["parts"] = {n: float(p) for n, p in parts.items()}
    if mask is not None:
        scored["loss_mask"] = [bool(m) for m in mask]
    return scored


def _finite(value: object) -> bool:
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def assess_group(values: object, samples: int) -> dict[str, Any]:
    """{"samples": what `assess` says of each}, or {"error"}: no list, or another number of them."""
    if isinstance(values, (str, dict)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        return {"error": f"returned {values!r:.80} ({type(values).__name__}), not a list of {samples} rewards"}
    if len(values) != samples:
        return {"error": f"returned {len(values)} rewards for {samples} samples"}
    return {"samples": [assess(values[i]) for i in range(samples)]}


def is_answer(said: object) -> bool:
    """Whether this is what `assess` or `assess_group` gives: a function can write anything into its process's answers.

    Text as an error, or a finite reward, with parts that are finite and a mask of True and False where there are any.
    """
    if not isinstance(said, dict):
        return False
    if "samples" in said:
        return isinstance(said["samples"], list) and all(is_answer(s) and "samples" not in s for s in said["samples"])
    if "error" in said:
        return isinstance(said["error"], str) and said["error"] != ""
    parts, mask = said.get("parts", {}), said.get("loss_mask", [])
    found = [said.get("reward"), *(parts.values() if isinstance(parts, dict) else [None])]
    return all(type(n) is float and math.isfinite(n) for n in found) and (
        isinstance(mask, list) and all(type(m) is bool for m in mask)
    )
