"""What can be found wrong with a job by asking Slurm, before it is queued."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.rl.pace import Pace
from fp8slurm.slurm import job as slurm
from fp8slurm.slurm.life import REQUEUE_S, SAFETY
from fp8slurm.slurm.submit import script

AWAY = re.compile(r"DOWN|DRAIN|FAIL|REBOOT|NOT_RESPONDING|\*")
"""In the state of a node that takes no job just now."""
NODES_NAMED = 8
"""Nodes that a message names."""


def check_cluster(config: RunConfig) -> list[str]:
    """Refuse what this cluster would never start or finish; returns warnings.

    Raises:
        ValueError: no Slurm here, no such partition, too few nodes, a time limit out of range, or sbatch's own refusal.
    """
    if not slurm.available():
        raise ValueError(
            "--slurm.executor slurm: there is no Slurm on this machine (sbatch, srun, scontrol and squeue); run this on a "
            "login node of the cluster, or on one machine with --slurm.executor local"
        )
    try:
        partitions = _partitions()
    except slurm.SlurmError as error:
        raise ValueError(f"Slurm does not answer: {error}") from None
    chosen = _fitting(config, _chosen(config, partitions))
    return _time(config) + _grace(config, chosen) + _sbatch_agrees(config, chosen)


def _partitions() -> dict[str, dict[str, str]]:
    lines = slurm.ask("scontrol", "-o", "show", "partition").splitlines()
    return {p["PartitionName"]: p for p in map(slurm.fields, lines) if "PartitionName" in p}


def _chosen(config: RunConfig, partitions: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    wanted = config.slurm.partition
    if wanted is None:
        return [p for p in partitions.values() if p.get("Default") == "YES"]
    missing = [name for name in wanted.split(",") if name not in partitions]
    if missing:
        raise ValueError(
            f"--slurm.partition {wanted}: there is no partition {', '.join(missing)}; there are {', '.join(sorted(partitions))}"
        )
    return [partitions[name] for name in wanted.split(",")]


def _fitting(config: RunConfig, chosen: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the partitions that can take the job: of a list, Slurm takes one that can. Raises ValueError where none can."""
    refusals = {p["PartitionName"]: _refusal(config, p) for p in chosen}
    if chosen and all(refusals.values()):
        raise ValueError("; ".join(refusals.values()))
    return [p for p in chosen if not refusals[p["PartitionName"]]]


def _refusal(config: RunConfig, p: dict[str, str]) -> str:
    """Why a partition cannot take the job, "" where it can."""
    s, name = config.slurm, p["PartitionName"]
    allowed = min(int(n) for n in (p.get("TotalNodes", "0"), p.get("MaxNodes", "UNLIMITED")) if n.isdigit())
    if s.nodes > allowed:
        return f"--slurm.nodes {s.nodes}: partition {name} gives a job at most {allowed} nodes"
    longest = p.get("MaxTime", "UNLIMITED")
    if longest != "UNLIMITED" and slurm.minutes(s.time) > slurm.minutes(longest):
        return f"--slurm.time {s.time}: partition {name} allows at most {longest}"
    return ""


def _time(config: RunConfig) -> list[str]:
    """The time limit and the notice against what steps and saves of this run took, where that is known."""
    s, pace = config.slurm, Pace.read(config.run.root / config.run.name)
    limit = 60 * slurm.minutes(s.time)
    needed = 1.2 * pace.step_s + SAFETY * pace.save_s + REQUEUE_S
    if limit <= needed:
        raise ValueError(
            f"--slurm.time {s.time} ({limit} s) is shorter than one step and one save of this run, which took "
            f"{pace.step_s:.0f} s and {pace.save_s:.0f} s: {needed:.0f} s with a margin"
        )
    if pace.save_s and s.signal_delay_s < needed:
        return [
            f"slurm.signal_delay_s {s.signal_delay_s}: a step and a save of this run may take {needed:.0f} s; the job's own "
            f"clock then stops it earlier than the notice"
        ]
    return []


def _grace(config: RunConfig, chosen: list[dict[str, str]]) -> list[str]:
    """The notice that the partition's preemption gives, against the time of a save."""
    warnings, pace = [], Pace.read(config.run.root / config.run.name)
    for p in chosen:
        mode, grace = p.get("PreemptMode", "OFF"), int(p.get("GraceTime", "0"))
        if mode == "OFF":
            continue
        if grace < SAFETY * pace.save_s + REQUEUE_S:
            save = f"a save takes {pace.save_s:.0f} s" if pace.save_s else "there is no time to save"
            warnings.append(
                f"partition {p['PartitionName']} is preemptible with {grace} s of notice, {save}: after a preemption the run "
                f"goes on from its newest checkpoint (checkpoint.every {config.checkpoint.every} steps)"
            )
    return warnings


def _sbatch_agrees(config: RunConfig, chosen: list[dict[str, str]]) -> list[str]:
    """sbatch's own check of the script: account, QOS, features, GPUs. Returns warnings; ValueError: it would refuse the job."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        text = script(config, Path(folder))
        path.write_text(text)
        try:
            slurm.ask("sbatch", "--test-only", str(path), environment=slurm.environment_for_a_job(dict(os.environ), text))
        except slurm.SlurmError as error:
            # The check reckons without nodes that are away just now; a queued job waits for them.
            away = _away(chosen) if "node configuration is not available" in str(error) else ""
            if not away:
                raise ValueError(f"Slurm would refuse this job: {error}") from None
            return [f"the job will wait: Slurm could not start it on the nodes that are there now; away: {away}"]
    return []


def _away(chosen: list[dict[str, str]]) -> str:
    """Nodes of the partitions (of all, where none is named) that are down or drained, with their states; "" where all are there."""
    names = {p["PartitionName"] for p in chosen}
    try:
        nodes = [slurm.fields(line) for line in slurm.ask("scontrol", "-o", "show", "node").splitlines()]
    except slurm.SlurmError:
        return ""
    found = [n for n in nodes if not names or names & set(n.get("Partitions", "").split(","))]
    away = [f"{n['NodeName']} ({n['State']})" for n in found if AWAY.search(n.get("State", ""))]
    return ", ".join(away[:NODES_NAMED] + ["..."] * (len(away) > NODES_NAMED))
