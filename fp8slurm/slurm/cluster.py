"""What can be found wrong with a job by asking Slurm, before it is queued."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.rl.pace import Pace
from fp8slurm.slurm import job as slurm
from fp8slurm.slurm.life import REQUEUE_S, SAFETY
from fp8slurm.slurm.submit import script


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
    chosen = _chosen(config, partitions)
    _fits(config, chosen)
    warnings = _time(config) + _grace(config, chosen)
    _sbatch_agrees(config)
    return warnings


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


def _fits(config: RunConfig, chosen: list[dict[str, str]]) -> None:
    s = config.slurm
    for p in chosen:
        name = p["PartitionName"]
        allowed = min(int(n) for n in (p.get("TotalNodes", "0"), p.get("MaxNodes", "UNLIMITED")) if n.isdigit())
        if s.nodes > allowed:
            raise ValueError(f"--slurm.nodes {s.nodes}: partition {name} gives a job at most {allowed} nodes")
        longest = p.get("MaxTime", "UNLIMITED")
        if longest != "UNLIMITED" and slurm.minutes(s.time) > slurm.minutes(longest):
            raise ValueError(f"--slurm.time {s.time}: partition {name} allows at most {longest}")


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


def _sbatch_agrees(config: RunConfig) -> None:
    """sbatch's own check of the script: account, QOS, features, GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sh"
        path.write_text(script(config, Path(folder)))
        try:
            slurm.ask("sbatch", "--test-only", str(path))
        except slurm.SlurmError as error:
            raise ValueError(f"Slurm would refuse this job: {error}") from None
