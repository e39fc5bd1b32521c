"""The child process that calls one reward function: JSON lines in on stdin, JSON lines out on what was stdout.

Started by rewards.RewardPool, as `python -m fp8slurm.rl.reward_worker KIND`. It imports only what the function needs.
"""

from __future__ import annotations

import importlib
import json
import math
import numbers
import os
import queue
import sys
import threading
from typing import Callable

RewardFunction = Callable[[str, str], float]


def load_function(kind: str) -> RewardFunction:
    """`math`, or the user's module:function; a module is searched in the working folder first."""
    if kind == "math":
        return _math
    module, _, name = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} of {module} cannot be called")
    return function


def _math(response: str, label: str) -> float:
    """1 if math-verify finds the last answer of the response equal to the label (LaTeX or plain), else 0."""
    from math_verify import parse, verify

    gold = parse(label if "\\" in label or "$" in label else f"${label}$", parsing_timeout=None)
    return float(bool(gold) and verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def assess(value: object) -> dict:
    """{"reward": value as a float}, or {"error": what is wrong with it}."""
    if not isinstance(value, numbers.Real):
        return {"error": f"returned {value!r:.80} ({type(value).__name__}), not a number"}
    if not math.isfinite(value):
        return {"error": f"returned {float(value)}"}
    return {"reward": float(value)}


def main(kind: str) -> None:
    """Answer {"response", "label"} with {"reward"} or {"error"}, until stdin ends."""
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
        except BaseException as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[1])
