"""What can be found wrong with a job by asking Slurm, before it is queued."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from fp8slurm.check.dry_run import Refusal
from fp8slurm.config import RunConfig
from fp8slurm.core.deadlines import REQUEUE_S, SAFETY
from fp8slurm.core.errors import InputError
from fp8slurm.plan import make_plan
from fp8slurm.run.step_times import StepTimes
from fp8slurm.scheduler import job as slurm
from fp8slurm.scheduler.job import one_line
from fp8slurm.slurm.script import gpus_per_node, script

AWAY = re.compile(r"DOWN|DRAIN|FAIL|REBOOT|NOT_RESPONDING|\*")
"""In the state of a node that takes no job just now."""
NODES_NAMED = 8
"""Nodes that a message names."""
NO_SUCH_NODE = "node configuration is not available"
"""Of sbatch's refusal of what no node, or too few of them, could give."""
PARTITION = "SBATCH_PARTITION"
"""Decides where no setting does."""
DRY_RUN_TIMEOUT_S = 5.0
"""A dry run only asks in passing."""


def check_in_passing(config: RunConfig) -> list[str]:
    """`check_cluster` for a dry run: what it raises is a Refusal among them, and a machine without Slurm is none."""
    if not slurm.available():
        return []
    try:
        return check_cluster(config, DRY_RUN_TIMEOUT_S)
    except InputError as error:
        return [Refusal(error)]


def check_cluster(config: RunConfig, timeout_s: float = slurm.COMMAND_TIMEOUT_S) -> list[str]:
    """Refuse what this cluster would never start or finish; returns warnings. timeout_s: of each of Slurm's commands.

    Raises:
        InputError: no Slurm here, no such partition, too few nodes, a time limit out of range, or sbatch's own refusal.
    """
    if not slurm.available():
        raise InputError(
            "--slurm.executor slurm: there is no Slurm on this machine (sbatch, srun, scontrol, squeue); run this on a "
            "login node of the cluster, or on one machine with --slurm.executor local"
        )
    try:
        partitions = _partitions(timeout_s)
    except slurm.SlurmError as error:
        raise InputError(f"Slurm does not answer: {error}") from None
    chosen = _fitting(config, _chosen(config, partitions))
    memory = _memory(config, chosen, timeout_s)
    return _time(config) + _down(chosen) + _grace(config, chosen) + memory + _sbatch_agrees(config, chosen, timeout_s)


def requested_partition(config: RunConfig) -> tuple[str | None, str]:
    """(partitions that the job asks for, what says so); None: the default one."""
    if config.slurm.partition is not None:
        return config.slurm.partition, "--slurm.partition"
    return os.environ.get(PARTITION) or None, PARTITION


def _partitions(timeout_s: float) -> dict[str, dict[str, str]]:
    lines = slurm.ask("scontrol", "-o", "show", "partition", timeout_s=timeout_s).splitlines()
    return {p["PartitionName"]: p for p in map(slurm.fields, lines) if "PartitionName" in p}


def _chosen(config: RunConfig, partitions: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    requested, source = requested_partition(config)
    if requested is None:
        return [p for p in partitions.values() if p.get("Default") == "YES"]
    missing = [name for name in requested.split(",") if name not in partitions]
    if missing:
        raise InputError(
            f"{source} {requested}: there is no partition {', '.join(missing)}; there are "
            f"{', '.join(sorted(partitions))}"
            f"{' (--slurm.partition wins over the variable)' if source == PARTITION else ''}"
        )
    return [partitions[name] for name in requested.split(",")]


def _fitting(config: RunConfig, chosen: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the partitions that can take the job (of a list, Slurm takes one that can). InputError: none can."""
    refusals = {p["PartitionName"]: _refusal(config, p) for p in chosen}
    if chosen and all(refusals.values()):
        raise InputError("; ".join(refusals.values()))
    return [p for p in chosen if not refusals[p["PartitionName"]]]


def _refusal(config: RunConfig, p: dict[str, str]) -> str:
    """Why a partition cannot take the job, "" where it can."""
    s, name = config.slurm, p["PartitionName"]
    requested, source = requested_partition(config)
    if requested and source == PARTITION:
        name = f"{name} ({PARTITION})"
    allowed = min(int(n) for n in (p.get("TotalNodes", "0"), p.get("MaxNodes", "UNLIMITED")) if n.isdigit())
    if s.nodes > allowed:
        return f"--slurm.nodes {s.nodes}: partition {name} gives a job at most {allowed} nodes"
    longest = p.get("MaxTime", "UNLIMITED")
    if longest != "UNLIMITED" and slurm.minutes(s.time) > slurm.minutes(longest):
        return f"--slurm.time {s.time}: partition {name} allows at most {longest}"
    return ""


def _time(config: RunConfig) -> list[str]:
    """The time limit and the notice against what steps and saves of this run took, where that is known."""
    s, step_times = config.slurm, StepTimes.read(config.run.root / config.run.name)
    limit = 60 * slurm.minutes(s.time)
    needed = 1.2 * step_times.step_s + SAFETY * step_times.save_s + REQUEUE_S
    if limit <= needed:
        raise InputError(
            f"--slurm.time {s.time} ({limit} s) is shorter than one step and one save of this run, which took "
            f"{step_times.step_s:.0f} s and {step_times.save_s:.0f} s: {needed:.0f} s with a margin"
        )
    if step_times.save_s and s.signal_delay_s < needed:
        return [
            f"slurm.signal_delay_s {s.signal_delay_s}: a step and a save of this run may take {needed:.0f} s; the "
            f"job's own clock then stops it earlier than the notice"
        ]
    return []


def _down(chosen: list[dict[str, str]]) -> list[str]:
    """sbatch queues for a partition that is DOWN, and starts nothing in it."""
    down = [p["PartitionName"] for p in chosen if p.get("State") == "DOWN"]
    return (
        [f"partition {', '.join(down)} is DOWN: the job waits until it is UP"]
        if down and len(down) == len(chosen)
        else []
    )


def _grace(config: RunConfig, chosen: list[dict[str, str]]) -> list[str]:
    """The notice that the partition's preemption gives, against the time of a save."""
    warnings, step_times = [], StepTimes.read(config.run.root / config.run.name)
    for p in chosen:
        mode, grace = p.get("PreemptMode", "OFF"), int(p.get("GraceTime", "0"))
        if mode == "OFF":
            continue
        if grace < SAFETY * step_times.save_s + REQUEUE_S:
            save = f"a save takes {step_times.save_s:.0f} s" if step_times.save_s else "there is no time to save"
            warnings.append(
                f"partition {p['PartitionName']} is preemptible with {grace} s of notice, {save}: then the "
                f"run goes on from its newest checkpoint (checkpoint.every {config.checkpoint.every} steps)"
            )
    return warnings


def _memory(config: RunConfig, chosen: list[dict[str, str]], timeout_s: float) -> list[str]:
    """Host memory that the job asks for, or gets unasked, against the plan's: a cgroup ends the task that takes more,
    pinned memory and /dev/shm counted in."""
    if not config.slurm.gpus_per_node or any(name.startswith("SBATCH_MEM") for name in os.environ):
        return []
    try:
        needed = sum(item.bytes for item in make_plan(config).host)
        controller = slurm.settings(timeout_s)
    except (InputError, slurm.SlurmError):  # said elsewhere
        return []
    warnings = []
    for p in chosen:
        given, who = _given_memory(config, p, controller)
        if given is not None and given < needed:
            warnings.append(
                f"a node's tasks get {given / 1e9:.0f} GB of host memory ({who}), and need {needed / 1e9:.0f} GB by "
                f"fp8slurm plan: give --slurm.memory (0: all of a node), or a task is ended when it takes more"
            )
    return warnings


def _given_memory(config: RunConfig, p: dict[str, str], controller: dict[str, str]) -> tuple[int | None, str]:
    """(bytes for the job on a node, what says so); None: all of the node, or what cannot be known here."""
    s = config.slurm
    cores, tasks = s.cpus_per_task or 1, s.ranks_per_node + 1
    times = {"Node": 1, "CPU": cores * tasks, "GPU": s.gpus_per_node}
    shown = {"Node": "node", "CPU": f"core of {cores * tasks}", "GPU": f"GPU of {s.gpus_per_node}"}
    asked = {k.replace("_", "-"): str(v) for k, v in s.sbatch.items()}
    for flag, kind in (("mem", "Node"), ("mem-per-cpu", "CPU"), ("mem-per-gpu", "GPU")):
        text, name = asked.get(flag), f"--slurm.sbatch {flag}"
        if flag == "mem" and s.memory:
            text, name = s.memory, "--slurm.memory"
        if text:
            size = _mebibytes(text)
            return (size * times[kind] * 2**20 if size else None), f"{name} {text}"
    for where, fields in ((f"partition {p['PartitionName']}", p), ("this Slurm", controller)):
        for kind in ("GPU", "CPU", "Node"):
            per_gpu = re.search(r"DefMemPerGPU=(\d+)", fields.get("JobDefaults", ""))
            text = fields.get(f"DefMemPer{kind}", per_gpu[1] if per_gpu and kind == "GPU" else "")
            if text.isdigit() and int(text):
                return int(text) * times[kind] * 2**20, f"{where} gives {text} MiB for each {shown[kind]} unasked"
    return None, ""


def _mebibytes(text: str) -> int:
    """sbatch's --mem; 0: all of the node, or no size that sbatch would take."""
    size = re.fullmatch(r"(\d+)([KMGT]?)B?", text.strip(), re.I)
    return 0 if size is None else int(size[1]) * 1024 ** "KMGT".index(size[2].upper() or "M") // 1024


def _sbatch_agrees(config: RunConfig, chosen: list[dict[str, str]], timeout_s: float) -> list[str]:
    """sbatch's own check of the script: account, QOS, features, GPUs. Warnings; InputError: it would refuse the job."""
    with tempfile.TemporaryDirectory() as folder:
        refusal = test_only(script(config, Path(folder)), timeout_s)
    if not refusal:
        return []
    if NO_SUCH_NODE not in refusal:
        raise InputError(f"Slurm would refuse this job: {refusal}")
    names = {p["PartitionName"] for p in chosen}
    nodes = nodes_of(names, timeout_s)
    # The check reckons without nodes that are away just now; a queued job waits for them.
    if away := away_of(nodes):
        return [f"the job will wait: Slurm could not start it on the nodes that are there now; away: {away}"]
    where = f" of {', '.join(sorted(names))}" if names else ""
    there = f"; nodes{where}: {_offer(nodes)}" if nodes else ""
    raise InputError(f"Slurm would refuse this job: {refusal}. Asked for: {_request(config)}{there}")


def test_only(text: str, timeout_s: float = slurm.COMMAND_TIMEOUT_S) -> str:
    """Why sbatch would not queue a script, in one line; "" where it would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(text)
        environment = slurm.environment_for_a_job(dict(os.environ), text)
        try:
            slurm.ask("sbatch", "--test-only", str(path), environment=environment, timeout_s=timeout_s)
        except slurm.SlurmError as error:
            return one_line(str(error))
    return ""


def _request(config: RunConfig) -> str:
    """What the job asks of its nodes, with the flags that say so."""
    s = config.slurm
    tasks, cores = s.ranks_per_node + 1, s.cpus_per_task or 1
    gpus = "--slurm.gpus-per-node" + (f", --slurm.gpu-type {s.gpu_type}" if s.gpu_type else "")
    parts = [
        f"{s.nodes} node(s) (--slurm.nodes)",
        f"each with {gpus_per_node(config)} GPUs ({gpus})" if s.gpus_per_node else "",
        f"{tasks * cores} cores ({tasks} tasks, --slurm.ranks-per-node + 1, of {cores}, --slurm.cpus-per-task)",
        f"{s.memory} memory (--slurm.memory)" if s.memory else "",
        f"without {s.exclude} (--slurm.exclude)" if s.exclude else "",
        f"features {s.constraint} (--slurm.constraint)" if s.constraint else "",
        *(f"{k} {v} (--slurm.sbatch)" for k, v in s.sbatch.items()),
    ]
    return ", ".join(p for p in parts if p)


def _offer(nodes: list[dict[str, str]]) -> str:
    """How many nodes there are of each kind."""
    kinds: dict[str, list[str]] = {}
    for n in nodes:
        gpus = "no GPU" if n.get("Gres", "(null)") == "(null)" else n["Gres"]
        kind = f"{gpus}, {n.get('CPUTot', '?')} cores, {n.get('RealMemory', '?')} MB"
        kinds.setdefault(kind, []).append(n.get("NodeName", "?"))
    return "; ".join(f"{len(names)} x {kind}" for kind, names in kinds.items())


def nodes_of(partitions: set[str], timeout_s: float = slurm.COMMAND_TIMEOUT_S) -> list[dict[str, str]]:
    """`scontrol show node` of the partitions' nodes (all, where none is named); empty where Slurm does not answer."""
    try:
        lines = slurm.ask("scontrol", "-o", "show", "node", timeout_s=timeout_s).splitlines()
    except slurm.SlurmError:
        return []
    nodes = [slurm.fields(line) for line in lines]
    return [n for n in nodes if not partitions or partitions & set(n.get("Partitions", "").split(","))]


def away_of(nodes: list[dict[str, str]]) -> str:
    """Those that are down or drained, with their states; "" where all are there."""
    away = [f"{n['NodeName']} ({n['State']})" for n in nodes if AWAY.search(n.get("State", ""))]
    return ", ".join(away[:NODES_NAMED] + ["..."] * (len(away) > NODES_NAMED))
