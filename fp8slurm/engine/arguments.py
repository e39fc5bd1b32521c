"""Arguments for SGLang's server, shown to its own parser before a server is started.

`python -m fp8slurm.engine.arguments` is the process that asks it: importing SGLang takes seconds and changes the
process that does it. Arguments come in as one JSON list, and an object goes out: {"error": the parser's} or {"set": the
names that they set, as attributes of SGLang's ServerArgs}.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import python_path

FLAG = "--engine.extra-args"
OURS = {
    "model_path": "--model.rollout-checkpoint",
    "host": "leave it out, engines listen on 127.0.0.1 only",
    "port": "leave it out, every engine takes a free port",
    "api_key": "leave it out, every start makes a key",
    "dtype": "--engine.dtype",
    "quantization": "--fp8.engine",
    "kv_cache_dtype": "--engine.kv-cache",
    "tp_size": "--engine.tensor-parallel-size",
    "ep_size": "--engine.expert-parallel-size",
    "dp_size": "--engine.per-node",
    "pp_size": "--engine.tensor-parallel-size",
    "nnodes": "leave it out, an engine stays within its node",
    "device": "--slurm.gpus-per-node",
    "max_running_requests": "--engine.max-running-requests",
    "max_total_tokens": "--engine.max-total-tokens",
    "mem_fraction_static": "--engine.mem-fraction",
    "context_length": "--engine.context-length",
    "random_seed": "--run.seed",
    "config": "the arguments themselves",
}
"""Arguments that engine/server.py gives or the run depends on, and what sets them instead. Where the same argument
stands twice SGLang takes the last, so that the run would be another than its settings say."""
PATIENCE_S = 120.0


def check_extra_arguments(arguments: Sequence[str]) -> str:
    """Ask SGLang's parser, which takes about 4 s (without arguments nothing is asked); a warning where it cannot be.

    Raises:
        InputError: it refuses them, or they set what a setting of the run sets.
    """
    if not arguments or importlib.util.find_spec("sglang") is None:
        return ""
    environment = os.environ | {"PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
    said = f"{FLAG} {' '.join(arguments)}"
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "fp8slurm.engine.arguments"],
            input=json.dumps(list(arguments)), capture_output=True, text=True, env=environment, timeout=PATIENCE_S,
        )  # fmt: skip
        answer = json.loads(asked.stdout.rpartition("\n")[2])
    except (subprocess.TimeoutExpired, ValueError):
        return f"{said}: not checked, SGLang's own parser gave no answer here"
    if error := answer.get("error"):
        raise InputError(f"{said}: SGLang's server refuses it: {error}")
    for name in answer["set"]:
        if name in OURS:
            raise InputError(f"{said}: {name} is not for SGLang's own arguments; allowed: {OURS[name]}")
    return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise InputError("it would print its help or its version and end")


def ask(arguments: list[str]) -> dict[str, Any]:
    """What SGLang's parser makes of these arguments; imports SGLang."""
    from sglang.srt.server_args import ServerArgs

    parser = _Parser()
    ServerArgs.add_cli_args(parser)
    for action in parser._actions:  # what is set can be told from what is left out
        action.default, action.required = argparse.SUPPRESS, False
    try:
        found, unknown = parser.parse_known_args(arguments)
    except InputError as error:
        return {"error": str(error)}
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        return {"error": f"no argument {unknown[0]}{f', did you mean {near[0]}?' if near else ''}"}
    return {"set": sorted(vars(found))}


def main() -> None:
    """Answer on standard output, in its last line."""
    arguments = json.load(sys.stdin)
    import torch

    if not torch.cuda.is_available():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        from fp8slurm.cpu import sglang_stubs

        sglang_stubs.install()
    answer = ask(arguments)
    sys.stdout.write("\n" + json.dumps(answer))


if __name__ == "__main__":
    main()
