"""Main of the engine's server process: `python -m fp8slurm.engine.child`, started by engine/server.py only.

One JSON line on stdin hands over what must not show in the process list: {"arguments": SGLang's command line,
"api_key", "exact": whether it computes the trainer's bits, "fp8_cache": whether its KV cache is in FP8, "listen_fd": a
bound and listening socket, "ready_fd": a pipe that gets one byte when the server is up}.
Stdin stays open after it; its end means that the rollout worker is gone, and takes this whole process group along.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from typing import Any

from fp8slurm.core.patches import applied, patch

PR_SET_PDEATHSIG = 1
PATCHED = "fp8slurm replaces (docs/patches.md): "
"""Begins the line of a scheduler's log that names all patches of its process."""


def main() -> None:
    """Take over the handover and serve until killed."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm's warning is for the ranks and the rollout worker
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    handover = json.loads(_read_line(0))
    threading.Thread(target=_die_with_the_worker, name="lifeline", daemon=True).start()
    _hide_in_logs(handover["api_key"])
    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    if on_cpu:
        from fp8slurm.cpu import sglang_stubs

        sglang_stubs.install()
    _serve(handover, on_cpu)


def _serve(handover: dict[str, Any], on_cpu: bool) -> None:
    import sglang.srt.managers.detokenizer_manager  # noqa: F401  (imported once, before the processes part)
    import uvicorn
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import prepare_server_args

    from fp8slurm.engine.inside import plugin

    plugin.apply()
    if on_cpu:
        # Without a CUDA context the server's processes can be forked: they are up 10 s earlier than spawned ones,
        # which import everything again. SGLang would set "spawn" by force.
        multiprocessing.set_start_method("fork", force=True)
        patch(multiprocessing, "set_start_method", lambda *args, **kwargs: None)
    listener = socket.socket(fileno=handover["listen_fd"])
    # the rollout worker bound the port: nobody can take it between choosing and listening
    serve = uvicorn.Server.run
    patch(uvicorn.Server, "run", lambda server, sockets=None: serve(server, sockets=[listener]))

    arguments = prepare_server_args([*handover["arguments"], f"--api-key={handover['api_key']}"])
    launch_server(
        arguments,
        run_scheduler_process_func=functools.partial(
            run_scheduler, exact=handover["exact"], fp8_cache=handover["fp8_cache"]
        ),
        launch_callback=lambda: os.write(handover["ready_fd"], b"1"),
    )


def run_scheduler(server_args: Any, *args: Any, exact: bool = False, fp8_cache: bool = False, **kwargs: Any) -> None:
    """Entry of a scheduler process (one a tensor-parallel rank): our plugin first, then SGLang's own main.

    exact: with what makes the engine compute the trainer's bits (model.exact); fp8_cache: with a KV cache in FP8, whose
    scales come with updates."""
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a forked process has the server's handler, which ends the family
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _hide_in_logs(server_args.api_key)
    from fp8slurm.engine.inside import kv_cache, plugin

    plugin.apply()
    on_cpu = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
    if fp8_cache:
        kv_cache.apply(on_gpu=not on_cpu)
    if on_cpu:
        from fp8slurm.cpu import sglang_plugin

        sglang_plugin.apply(exact, fp8_cache)
    elif exact:
        from fp8slurm.engine.inside.exact import apply as apply_exact

        apply_exact()
    print(PATCHED + " ".join(applied()), flush=True)
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(server_args, *args, **kwargs)


def _read_line(fd: int) -> bytes:
    """One line, byte by byte: nothing after it is consumed."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            sys.exit("the engine's child was started without a handover")
        line += byte
    return line


def _die_with_the_worker() -> None:
    """Wait for the end of stdin, then kill the process group.

    PDEATHSIG alone is not enough: it does not reach grandchildren. The pipe alone is not either: a process that the
    rollout worker forked may hold its other end.
    """
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _hide_in_logs(secret: str) -> None:
    """Mask `secret` in every log record of this process: SGLang logs its settings, the API key among them."""
    make = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        text = record.getMessage()
        if secret in text:
            record.msg, record.args = text.replace(secret, "***"), ()
        return record

    logging.setLogRecordFactory(factory)


if __name__ == "__main__":
    main()
