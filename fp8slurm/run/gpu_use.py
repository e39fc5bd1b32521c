"""How busy a node's GPUs are, as nvidia-smi says it: attempts/N/gpus/NODE.json, written by the node's rollout worker.

`status` runs on a login node, which sees no GPU of the job.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from fp8slurm.core.files import write_atomic
from fp8slurm.core.numbers import number
from fp8slurm.run.read_json import read_json

EVERY_S = 30.0
TIMEOUT_S = 20.0
QUERY = "index,utilization.gpu,memory.used,memory.total"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeGpus:
    """A node's GPUs at one moment."""

    host: str
    age_s: float
    use: tuple[float, ...]
    """Of each GPU, percent of the time in which a kernel ran (nvidia-smi's utilization.gpu)."""
    used_gib: tuple[float, ...]
    total_gib: tuple[float, ...]


def watch_gpus(attempt_dir: Path, node: int, every_s: float = EVERY_S) -> threading.Thread:
    """Begin to write what the node's GPUs do, until this process ends, or nvidia-smi does not answer."""
    thread = threading.Thread(target=_watch, args=(attempt_dir, node, every_s), name="gpu-use", daemon=True)
    thread.start()
    return thread


def _watch(attempt_dir: Path, node: int, every_s: float) -> None:
    file = attempt_dir / "gpus" / f"{node}.json"
    while True:
        try:
            gpus = ask_nvidia_smi()
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, json.dumps({"time": time.time(), "host": socket.gethostname(), "gpus": gpus}))
        except FileNotFoundError:  # no nvidia-smi here, or the run's folder is gone
            return
        except (OSError, ValueError, subprocess.SubprocessError) as error:  # a busy driver, a full disk
            log.debug("GPU use is not known: %s", error)
        time.sleep(every_s)


def ask_nvidia_smi() -> list[dict[str, float]]:
    """use (percent), used and total (MiB) of the GPUs of this job.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: there is no nvidia-smi, or it does not say.
    """
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    if given := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={given}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    rows = [[float(value) for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [{"use": use, "used": used, "total": total} for _, use, used, total in rows]


def read_gpus(attempt_dir: Path, now: float) -> tuple[NodeGpus, ...]:
    """What the nodes have written last, node by node; torn files are left out."""
    try:
        paths = sorted((attempt_dir / "gpus").glob("[0-9]*.json"), key=lambda p: (len(p.name), p.name))
    except OSError:
        return ()
    out = []
    for path in paths:
        said = read_json(path, [])
        at, gpus = number(said.get("time")), said.get("gpus")
        if at is None or not isinstance(gpus, list) or not gpus:
            continue
        values = [
            [number(g.get(key)) if isinstance(g, dict) else None for key in ("use", "used", "total")] for g in gpus
        ]
        if any(v is None for row in values for v in row):
            continue
        use, used, total = zip(*[[v or 0.0 for v in row] for row in values])
        gib = [tuple(v / 1024 for v in memory) for memory in (used, total)]
        out.append(NodeGpus(str(said.get("host")), max(0.0, now - at), use, gib[0], gib[1]))
    return tuple(out)
