"""`fp8slurm doctor --slurm`: a short job with one task a node, and what the nodes found."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fp8slurm.check.doctor.finding import Check, Finding, merge
from fp8slurm.check.doctor.machine import DOCTORS_JOB
from fp8slurm.check.doctor.node import MARK, compare_paths
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import python_path
from fp8slurm.core.signals import ended_is_interrupted
from fp8slurm.scheduler import job as slurm
from fp8slurm.slurm.script import gpus_per_node

SLURM = Check("slurm")

MINUTES = 10
POLL_S = 1.0
HOPELESS = ("PartitionNodeLimit", "PartitionTimeLimit", "PartitionConfig", "BadConstraints")
"""Why a job waits that never starts as it is."""
LOG = "job.log"


def over_nodes(configs: list[RunConfig], quick: bool, say: Callable[[str], None]) -> list[Finding]:
    """What every node of the allocation found, or of a job of its own with the first recipe's [slurm].

    Raises:
        InputError: no recipe, or Slurm refuses the job.
    """
    if not configs:
        raise InputError("--slurm needs --recipe: its [slurm] says how many nodes, and which; its paths, what for")
    root = configs[0].run.root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=root))
    try:
        inside = os.environ.get("SLURM_JOB_ID")
        nodes = _allocated(inside) if inside else []
        request = {"configs": [c.model_dump_json() for c in configs], "quick": quick}
        (folder / "request.json").write_text(json.dumps(request))
        if inside:
            _step(configs[0], folder, nodes)
        else:
            nodes = _job(configs[0], folder, say)
        return collect(folder, nodes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def collect(folder: Path, nodes: list[str]) -> list[Finding]:
    """Findings of all nodes, merged; a node that said nothing is an error."""
    reports = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json") if p.stem in nodes}
    log = (folder / LOG).read_text(errors="replace") if (folder / LOG).is_file() else ""
    for line in log.splitlines():
        _, mark, text = line.partition(MARK)
        if mark:
            one = json.loads(text)
            reports.setdefault(one.pop("node"), one)
    findings = [Finding.from_json(f) for node in nodes if node in reports for f in reports[node]["findings"]]
    merged = merge(findings, len(nodes))
    merged += compare_paths({node: one["digests"] for node, one in reports.items()})
    silent = [n for n in nodes if n not in reports]
    if silent:
        last = [line for line in log.splitlines() if line.strip()][-3:]
        fix = "the same Python and paths must be there on every node; srun -w NODE python --version"
        merged.append(
            SLURM.error(f"no word from {', '.join(silent)}: {' | '.join(last) or 'empty log'}", fix, ",".join(silent))
        )
    return merged


def _allocated(job_id: str) -> list[str]:
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    return slurm.ask("scontrol", "show", "hostnames", listed).split() if listed else []


def _srun(config: RunConfig, folder: Path, nodes: int) -> list[str]:
    from fp8slurm.slurm.script import task_python

    s = config.slurm
    container = {"container-image": s.container_image, "container-mounts": ",".join(s.container_mounts) or None}
    more = [f"--{k}={v}" for k, v in container.items() if v is not None]
    srun = f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --overlap --kill-on-bad-exit=0".split()
    command = [*shlex.split(task_python(config)), *"-u -m fp8slurm.check.doctor.node".split(), str(folder)]
    return [*srun, *more, *s.srun, *command]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": python_path(), "PYTHONSAFEPATH": "1"}


def _step(config: RunConfig, folder: Path, nodes: list[str]) -> None:
    """Inside an allocation: a job step over all its nodes."""
    environment = {
        k: v for k, v in _environment().items() if not k.startswith(("SLURM_NTASKS", "SLURM_CPU_BIND", "SLURM_NPROCS"))
    }
    with (folder / LOG).open("w") as log:
        subprocess.run(_srun(config, folder, len(nodes)), env=environment, stdout=log, stderr=subprocess.STDOUT)


def script(config: RunConfig, folder: Path) -> str:
    """The job script: the recipe's nodes, GPUs and site, MINUTES of them."""
    s = config.slurm
    directives = {
        "job-name": DOCTORS_JOB,
        "nodes": s.nodes,
        "ntasks-per-node": 1,
        "time": MINUTES,
        "output": str(folder / LOG).replace("%", "%%"),  # Slurm replaces %j and the like
        "gpus-per-node": gpus_per_node(config),
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "reservation": s.reservation,
        "constraint": s.constraint,
        "exclude": s.exclude,
        "mem": s.memory,
        **{k.replace("_", "-"): v for k, v in s.sbatch.items()},
    }
    lines = [
        f"#SBATCH --{k}" + ("" if v is True else f"={shlex.quote(str(v))}")
        for k, v in directives.items()
        if v is not None and v is not False
    ]
    lines += ["#SBATCH --requeue"] if s.requeue else []
    return "\n".join(["#!/bin/bash", *lines, *s.setup, f"exec {shlex.join(_srun(config, folder, s.nodes))}"]) + "\n"


def _job(config: RunConfig, folder: Path, say: Callable[[str], None]) -> list[str]:
    """Queue the job, wait for its end; the names of its nodes. Interrupted or ended, the job is ended too.

    Raises:
        InputError: Slurm refuses it, never starts it, or gave it no nodes.
    """
    path = folder / "job.sh"
    text = script(config, folder)
    path.write_text(text)
    try:
        job_id = slurm.sbatch(str(path), environment=slurm.environment_for_a_job(_environment(), text))
    except slurm.SlurmError as error:
        raise InputError(f"Slurm refuses the doctor's job: {error}") from None
    state, job = "", dict[str, str]()
    try:
        with ended_is_interrupted():
            while True:
                job = slurm.show_job(job_id) or job
                reason = job.get("Reason", "None")
                now = f"{job.get('JobState')} ({reason})" if reason != "None" else f"{job.get('JobState')}"
                if now != state:
                    say(f"job {job_id} on {config.slurm.nodes} nodes: {now}")
                    state = now
                if job.get("JobState") == "PENDING" and reason in HOPELESS:
                    raise InputError(
                        f"job {job_id} would never start: {now}; {config.slurm.nodes} node(s) for {MINUTES} minutes "
                        f"(--slurm.nodes, --slurm.partition, --slurm.constraint); it was cancelled"
                    )
                if job.get("JobState") not in (*slurm.ACTIVE, "COMPLETING"):
                    break
                time.sleep(POLL_S)
    except BaseException:
        subprocess.run(["scancel", job_id])
        raise
    listed = job.get("NodeList", "")
    if listed in ("", "(null)"):
        raise InputError(f"job {job_id} ended without nodes: {state}")
    return slurm.ask("scontrol", "show", "hostnames", listed).split()
