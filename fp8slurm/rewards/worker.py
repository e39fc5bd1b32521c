"""The child process that calls one reward function: JSON lines in on stdin, JSON lines out on what was stdout.

Started by rewards.RewardPool, as `python -m fp8slurm.rewards.worker KIND MEMORY_MIB`. It imports only what the
function needs.

    {"ready": true, "form": {...}}                                      once, or {"error", "refused"}
    {"number", "arguments": {...}, "limit_s", "samples"}                in: one call
    {"number", "reward", "parts"} or {"number", "samples": [...]} or {"number", "error", "spent"}      out

Calls of a plain function are made one after the other; an async one gets as many at a time as are sent.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from fp8slurm.core.processes import limit_memory
from fp8slurm.rewards.signature import MATH, Form, assess, assess_group, form_of

Answer = Callable[[dict[str, Any]], None]


def load_function(kind: str) -> tuple[Callable[..., Any], Form]:
    """`math`, or the user's module:function; a module is searched in the working folder first."""
    if kind == "math":
        from fp8slurm.rewards.math_grader import grade  # here, where no answer's time limit runs

        return grade, MATH
    module, _, name = kind.partition(":")
    sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} of {module} cannot be called")
    return function, form_of(function)


class _Caller:
    """Calls the function and answers."""

    def __init__(self, function: Callable[..., Any], form: Form, memory_mib: int, answer: Answer) -> None:
        self.function, self.form, self.memory_mib, self._answer = function, form, memory_mib, answer

    def call(self, request: dict[str, Any]) -> Any:
        arguments: dict[str, Any] = request["arguments"]
        first = [arguments.pop(name) for name in self.form.names[: self.form.positional]]
        return self.function(*first, **arguments)

    def answer(self, request: dict[str, Any], value: object) -> None:
        said = assess_group(value, request["samples"]) if self.form.group else assess(value)
        self._answer({"number": request["number"], **said})

    def fail(self, request: dict[str, Any], error: BaseException) -> None:
        self._answer({"number": request["number"], "error": f"{type(error).__name__}: {error!s:.500}"})

    def out_of_memory(self, request: dict[str, Any]) -> None:
        said = {"error": f"out of memory ({self.memory_mib} MiB)", "spent": True}
        self._answer({"number": request["number"], **said})

    def serve(self, lines: Iterator[str]) -> None:
        """One call after the other, until there are no more lines."""
        for line in lines:
            request = json.loads(line)
            try:
                self.answer(request, self.call(request))
            except MemoryError:
                request.pop("arguments")
                self.out_of_memory(request)
            except BaseException as error:
                self.fail(request, error)

    async def serve_async(self, lines: asyncio.Queue[str]) -> None:
        """A task for each call; for ever."""
        running: set[asyncio.Task[None]] = set()
        while True:
            task = asyncio.create_task(self._one(json.loads(await lines.get())))
            running.add(task)
            task.add_done_callback(running.discard)

    async def _one(self, request: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(request["limit_s"]) as limit:
                value = await self.call(request)
        except MemoryError:
            self.out_of_memory(request)
        except BaseException as error:
            if limit.expired():
                self._answer({"number": request["number"], "error": no_answer(request["limit_s"])})
            else:
                self.fail(request, error)
        else:
            self.answer(request, value)


def no_answer(limit_s: float) -> str:
    """Why a call that ran out of time failed."""
    return f"no answer within {limit_s:g} s (reward.timeout_s)"


def main(kind: str, memory_mib: int) -> None:
    """Answer calls until stdin ends.

    An error with "spent" says that memory ran out: this process is to be replaced. memory_mib: limit of the address
    space, 0 for none.
    """
    limit_memory(memory_mib)
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what the function prints must not get into the answers

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    def read(put: Callable[[str], object]) -> None:
        for line in sys.stdin:
            put(line)
        os._exit(0)  # the parent is gone: end although the function may hang

    try:
        function, form = load_function(kind)
    except BaseException as error:
        answer({"error": f"{type(error).__name__}: {error}", "refused": not isinstance(error, OSError)})
        return
    answer({"ready": True, "form": asdict(form)})
    caller = _Caller(function, form, memory_mib, answer)
    if form.asynchronous:

        async def serve() -> None:
            lines: asyncio.Queue[str] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            put = lambda line: loop.call_soon_threadsafe(lines.put_nowait, line)  # noqa: E731
            threading.Thread(target=read, args=(put,), daemon=True).start()
            await caller.serve_async(lines)

        asyncio.run(serve())
    else:
        requests: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=read, args=(requests.put,), daemon=True).start()
        caller.serve(iter(requests.get, None))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
