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
import resource
import sys
import threading
from collections.abc import Callable

RewardFunction = Callable[[str, str], float]


def load_function(kind: str) -> RewardFunction:
    """`math`, or the user's module:function; a module is searched in the working folder first."""
    if kind == "math":
        from fp8slurm.rewards.math_grader import grade  # here, where no answer's time limit runs

        return grade
    module, _, name = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} of {module} cannot be called")
    return function


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
        answer({"error": f"{type(error).__name__}: {error}", "refused": not isinstance(error, OSError)})
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
