"""Convert, train, export and evaluate as one chain of Slurm jobs: what each job is, and its script.

    hf-to-torch-dist   HF folder        -> RUN/torch_dist              (Megatron's format, for other Megatron programs)
    hf-to-fp8          HF folder        -> RUN/engine_model            (what the engines load)
    train              RUN/checkpoints/step_N, after hf-to-fp8
    export-hf          that checkpoint  -> RUN/export/step_N-hf        (as fp8slurm export)
    export-fp8         that checkpoint  -> RUN/export/step_N-fp8
    eval               that FP8 folder  -> RUN/eval/step_N-fp8

Every job starts with `afterok` on those whose results it reads and `--kill-on-invalid-dep=yes`: where one fails, Slurm
cancels what waits for it, and what waits for that.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import PACKAGE_ROOT
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.evaluations import served_name
from fp8slurm.slurm.attempt import WAITING, last_checkpoint
from fp8slurm.slurm.script import SAFE_PATH, gpus_per_node, task_python

TRAIN = "train"
CONVERT_CPUS = 4
CONVERT_MEMORY = "8G"
"""The converters stream: 0.3 GB for Qwen3-4B, and page cache."""
CONVERT_MINUTES = 120
EVAL_CPUS_PER_GPU = 4
"""Where slurm.cpus_per_task does not say: an engine is four processes (server, scheduler, detokenizer, grading)."""
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
"""sbatch's ways of asking for memory; it takes one of them."""
SITE = ("partition", "account", "qos", "reservation", "constraint", "exclude")
"""Keys of [slurm] that every job of the chain gets."""


@dataclass(frozen=True)
class Link:
    """One job of a chain."""

    name: str
    command: tuple[str, ...]
    """What `fp8slurm` is called with; empty for the training job, whose script is `fp8slurm submit`'s."""
    output: Path
    """What the job makes; complete or not there at all, so its being there means that the job is done."""
    after: tuple[str, ...]
    directives: Mapping[str, str]
    """sbatch parameters by long name."""


def links(
    config: RunConfig, run: Path, convert_sbatch: Sequence[str] = (), eval_sbatch: Sequence[str] = ()
) -> tuple[Link, ...]:
    """The chain of a configuration, in order. `run`: the run directory; the others: sbatch flags, --name=value.

    Raises:
        InputError: a flag of sbatch that is not --name or --name=value; a dependency of the training job.
    """
    for key in config.slurm.sbatch:
        if key.replace("_", "-") in WAITING:
            raise InputError(
                f"--slurm.sbatch {key} {config.slurm.sbatch[key]}: in a chain the jobs before decide it; leave it "
                f"out, or queue the training job alone (fp8slurm submit)"
            )
    assert config.model.hf_checkpoint is not None
    hf, rollout = config.model.hf_checkpoint, config.model.rollout_checkpoint
    last = last_checkpoint(config, RunDirectory(run))
    checkpoint, exported = run / "checkpoints" / last, run / "export"
    on_cpu = _site(config) | {
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": str(CONVERT_CPUS),
        "mem": CONVERT_MEMORY,
        "time": str(CONVERT_MINUTES),
    }
    on_cpu = _with(on_cpu, parse_sbatch("--convert-sbatch", convert_sbatch))
    on_gpu = _with(_eval_directives(config), parse_sbatch("--eval-sbatch", eval_sbatch))

    def conversion(name: str, out: Path) -> Link:
        return Link(name, ("convert", name, str(hf), str(out)), out, (), on_cpu)

    def export(name: str, form: str, *flags: str) -> Link:
        out = exported / f"{last}-{form}"
        return Link(name, ("export", str(run), str(out), f"--checkpoint={last}", *flags), out, (TRAIN,), on_cpu)

    # The rollout workers look for the engine's checkpoint there, and would make it themselves.
    engine_model = [conversion("hf-to-fp8", run / "engine_model")] if rollout is None else []
    as_fp8 = export("export-fp8", "fp8", "--fp8")
    chain = [
        conversion("hf-to-torch-dist", run / "torch_dist"),
        *engine_model,
        Link(TRAIN, (), checkpoint, tuple(x.name for x in engine_model), {}),
        export("export-hf", "hf"),
        as_fp8,
        Link(
            "eval",
            ("eval", f"--run={run}", f"--checkpoint={last}", f"--fp8-checkpoint={as_fp8.output}"),
            run / "eval" / f"{last}-{served_name('fp8', config.engine.kv_cache)}" / "summary.json",
            (as_fp8.name,),
            on_gpu,
        ),
    ]
    return tuple(chain)


def script(link: Link, number: int, config: RunConfig, run: Path) -> str:
    """The sbatch script of a link that is not the training job."""
    directives = {
        "job-name": f"{config.run.name}-{link.name}",
        "output": str(log_file(run, number, link.name)),
        "open-mode": "append",
        "requeue": "",
    } | dict(link.directives)
    if not config.slurm.requeue:
        directives = {("no-requeue" if k == "requeue" else k): v for k, v in directives.items()}
    tasks = ["--ntasks-per-node=1", "--kill-on-bad-exit=1"] if "ntasks-per-node" in directives else ["--ntasks=1"]
    srun = ["srun", *tasks, f"--cpus-per-task={directives.get('cpus-per-task', '1')}"]
    if config.slurm.container_image:
        srun.append(f"--container-image={config.slurm.container_image}")
    if config.slurm.container_mounts:
        srun.append(f"--container-mounts={','.join(config.slurm.container_mounts)}")
    srun += config.slurm.srun
    command = f"{shlex.join(srun)} {task_python(config)} -m fp8slurm.cli {shlex.join(link.command)}"
    done = shlex.quote(str(link.output))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH --{k}={shlex.quote(v)}" if v else f"#SBATCH --{k}" for k, v in sorted(directives.items())),
            "",
            "unset SLURM_EXPORT_ENV",  # as in the training job's script
            *config.slurm.setup,
            SAFE_PATH,
            f"export PYTHONPATH={shlex.quote(PACKAGE_ROOT)}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"if [ -e {done} ]; then",
            f"    echo {done} is there already",
            "    exit 0",
            "fi",
            f"exec {command}",
            "",
        ]
    )


def script_file(run: Path, number: int, name: str) -> Path:
    """Where the script of link `number` (from 1) lies."""
    return run / "chain" / f"{number}-{name}.sbatch"


def log_file(run: Path, number: int, name: str) -> Path:
    """Where the output of link `number` goes."""
    return run / "chain" / f"{number}-{name}.log"


def parse_sbatch(flag: str, arguments: Sequence[str]) -> dict[str, str]:
    """sbatch flags as long name -> value ("" for a flag without one). InputError: something else."""
    flags = {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            example = f'{flag}="--partition=cpu"'
            raise InputError(f"{flag} {argument}: sbatch flags are written --name=value, as in {example}")
        flags[name] = value
    return flags


def _with(directives: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    """`more` over `directives`; sbatch takes one way of asking for memory, so a given one takes the others' place."""
    if any(key in more for key in MEMORY):
        directives = {key: value for key, value in directives.items() if key not in MEMORY}
    return directives | more


def _site(config: RunConfig) -> dict[str, str]:
    return {key: value for key in SITE if (value := getattr(config.slurm, key))}


def _eval_directives(config: RunConfig) -> dict[str, str]:
    """One node as the training job has it, or more (--eval-sbatch=--nodes=N): all GPUs serve, one task a node drives
    them."""
    s = config.slurm
    cores = (s.ranks_per_node + 1) * (s.cpus_per_task or 1)
    if s.cpus_per_task is None and s.gpus_per_node:
        cores = EVAL_CPUS_PER_GPU * s.gpus_per_node
    directives = _site(config) | {"nodes": "1", "ntasks-per-node": "1", "cpus-per-task": str(cores), "time": s.time}
    if gpus := gpus_per_node(config):
        directives["gpus-per-node"] = gpus
    memory = {key.replace("_", "-"): value for key, value in s.sbatch.items()} | ({"mem": s.memory} if s.memory else {})
    return directives | {key: str(memory[key]) for key in MEMORY if key in memory}


def dependency(job_ids: Sequence[str]) -> list[str]:
    """sbatch's flags for a job that starts after all of `job_ids` ended well."""
    return [f"--dependency=afterok:{':'.join(job_ids)}", "--kill-on-invalid-dep=yes"] if job_ids else []
