"""The child process that calls one reward function: JSON lines in on stdin, JSON lines out on what was stdout.

Started by rewards.RewardPool, as `python -m fp8slurm.rewards.worker KIND MEMORY_MIB`. It imports only what the
function needs.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
import queue
import re
import resource
import sys
import threading
from collections.abc import Callable
from fractions import Fraction

from fp8slurm.rewards.graders import last_boxed, last_number

RewardFunction = Callable[[str, str], float]
MATH_TAIL = 4000
"""Characters at the end of a response without a box that are searched for its answer."""
SMALL = Fraction(1, 1000)
"""Numbers below it are compared by their relative difference, which may be as large."""
_UNITS = re.compile(
    r"(\d)(?:\s|\\[,; ]|~)*(?:\\(?:text|mathrm|textrm|mbox)\s*\{\s*)?"
    r"(?:(?:mm|cm|dm|km|in|ft|yd|mi|m)(?:\s*\^\s*\{?[23]\}?)?|(?:km|mi|m|cm|ft)\s*/\s*(?:h|hr|s|min)|mph|mg|kg|g|ms|min|ml|mL|L)(?:\s*\})?"
    r"(?:\s*\^\s*\{?[23]\}?)?$"
)
_BASE = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
_PLAIN_NUMBER = re.compile(r"[-+]?[\d.,]+(?:\s*\\times\s*10\s*\^\s*\{?[-+]?\d{1,3}\}?)?|10\s*\^\s*\{?[-+]?\d{1,3}\}?")


def load_function(kind: str) -> RewardFunction:
    """`math`, or the user's module:function; a module is searched in the working folder first."""
    if kind == "math":
        import math_verify  # noqa: F401  (here, where no answer's time limit runs)

        return _math
    module, _, name = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} of {module} cannot be called")
    return function


def _math(response: str, label: str) -> float:
    """1 if math-verify finds the last box of the response, or else its last answer, equal to the label, else 0.

    The label is LaTeX or plain. Only the end of a response without a box is looked at.
    """
    from math_verify import parse, verify

    box, label = last_boxed(response), _plain(label)
    if box is not None and (verdict := _by_ourselves(_plain(box), label)) is not None:
        return float(verdict)
    answer = response[-MATH_TAIL:] if box is None else f"\\boxed{{{_plain(box)}}}"
    gold = parse(label if "\\boxed" in label or "$" in label else f"${label}$", parsing_timeout=None)
    if not gold:
        raise ValueError(f"math-verify cannot read the label {label!r:.80}")
    return float(verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None))


def _plain(latex: str) -> str:
    """In a form that math-verify reads: without dollar signs that mean money, a full stop at the end, white space
    between a number's digits and known units behind it; 1.5e3 as 1.5 \\times 10^{3}; lines of an answer apart by
    commas."""
    latex = latex.replace("\\$", "").strip()
    latex = re.sub(r"(?<=[\w)}\]])\s*\.$", "", latex)
    latex = re.sub(r"(?<=\d)(?:\\[,;! ]|~)(?=\d{3}(?!\d))", "", latex)
    words = re.fullmatch(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", latex)
    if words and re.fullmatch(r"\s*[-+]?[\d.,]+(?:\s+[A-Za-z ]+)?", words[1]):
        latex = re.sub(r"[A-Za-z ]+$", "", words[1]).strip()
    latex = _UNITS.sub(r"\1", latex)
    if "\\begin" not in latex:
        latex = latex.replace("\\\\", ",")
    return re.sub(r"(\d)[eE]([+-]?\d{1,3})(?!\w)", r"\1 \\times 10^{\2}", latex)


def _by_ourselves(answer: str, label: str) -> bool | None:
    """The verdict where math-verify's would be wrong; None elsewhere. It does not look at the base of 2220_5, and it
    rounds to six decimals, which leaves nothing of 1.6 \\times 10^{-19}."""
    answer, label = answer.strip("$ "), label.strip("$ ")
    given, expected = _BASE.fullmatch(answer), _BASE.fullmatch(label)
    if given and expected:
        return given.groups() == expected.groups()
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(label):
        number, right = last_number(answer), last_number(label)
        if number is not None and right is not None and 0 < abs(right) < SMALL:
            return abs(number - right) <= abs(right) * SMALL
    return None


def assess(value: object) -> dict:
    """{"reward": value as a float}, or {"error": what is wrong with it}."""
    if not isinstance(value, numbers.Real):
        return {"error": f"returned {value!r:.80} ({type(value).__name__}), not a number"}
    if not math.isfinite(value):
        return {"error": f"returned {float(value)}"}
    return {"reward": float(value)}


def main(kind: str, memory_mib: int) -> None:
    """Answer {"response", "label"} with {"reward"} or {"error"}, until stdin ends.

    An error with "spent" says that memory ran out: this process is to be replaced. memory_mib: limit of the address
    space, 0 for none.
    """
    if memory_mib:
        resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what the function prints must not get into the answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)  # the parent is gone: end although the function may hang

    def answer(message: dict) -> None:
        channel.write(json.dumps(message) + "\n")

    try:
        function = load_function(kind)
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": True})
    threading.Thread(target=read, daemon=True).start()
    while True:
        request = json.loads(requests.get())
        try:
            answer(assess(function(request["response"], request["label"])))
        except MemoryError:
            request = None
            answer({"error": f"out of memory ({memory_mib} MiB)", "spent": True})
        except BaseException as error:
            answer({"error": f"{type(error).__name__}: {error!s:.500}"})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
