"""`fp8slurm chain`: queue the jobs of a chain, write RUN/chain.json, show them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8slurm.chain.links import TRAIN, Link, dependency, links, log_file, parse_sbatch, script, script_file
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import write_atomic
from fp8slurm.run.chain_record import CHAIN, read_chain
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.status import Facts, size_damage
from fp8slurm.scheduler.job import SlurmError, ask, environment_for_a_job, one_line, sbatch
from fp8slurm.scheduler.queue import jobs, jobs_of_scripts
from fp8slurm.slurm.attempt import finished, refuse_vain_changes, same_path

LATE_S = 5.0
"""A controller that did not answer in time may take a job as much later than it answers again."""
LOOK_S = 1.0


@dataclass(frozen=True)
class Planned:
    """A link, its number from 1, and why it needs no job ("" where it needs one)."""

    link: Link
    number: int
    done: str


def main(argv: list[str]) -> int:
    """Exit status 0: queued, or nothing left to do; 1: Slurm failed; bad input is an InputError."""
    from fp8slurm.check.preflight import preflight
    from fp8slurm.config import parse_command, recipe_parser
    from fp8slurm.config.derived import under_slurm

    parser = recipe_parser(
        "fp8slurm chain",
        "Hugging Face -> torch_dist and FP8 -> train -> Hugging Face -> FP8 -> evaluation, as Slurm jobs that wait for "
        "each other. The same command again leaves out what is done.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the scripts, queue nothing")
    for name, what in (("convert", "conversion jobs"), ("eval", "evaluation job")):
        help = f'a flag of sbatch for the {what}, such as --{name}-sbatch="--partition=cpu"; may be repeated'
        parser.add_argument(f"--{name}-sbatch", action="append", default=[], metavar="--NAME=VALUE", help=help)
    own, config = parse_command(parser, argv)
    config = under_slurm(config)
    found = preflight(config, dry_run=own.dry_run)
    run = (config.run.root / config.run.name).resolve()
    planned = plan(config, run, own.convert_sbatch, own.eval_sbatch)
    if own.dry_run:
        from fp8slurm.check.cluster import check_in_passing
        from fp8slurm.check.dry_run import end_dry_run

        found += check_in_passing(config)
        return end_dry_run("chain", found, lambda: print(describe(planned, config, run), end=""))
    for warning in found:
        print(f"fp8slurm chain: warning: {warning}", file=sys.stderr)
    if all(p.done for p in planned):
        print(f"{run}: every job of the chain is done; the evaluation is {planned[-1].link.output}")
        refuse_vain_changes(config, RunDirectory(run))
        return 0
    from fp8slurm.check.cluster import check_cluster
    from fp8slurm.check.doctor.quick import quick

    for warning in [*quick(config), *check_cluster(config), *check_scripts(planned, config, run)]:
        print(f"fp8slurm chain: warning: {warning}", file=sys.stderr)
    refuse_second(run)
    try:
        record = submit(planned, config, run, argv)
    except SlurmError as error:
        print(f"fp8slurm chain: {error}", file=sys.stderr)
        return 1
    show(record, run)
    return 0


def plan(config: RunConfig, run: Path, convert_sbatch: list[str], eval_sbatch: list[str]) -> list[Planned]:
    """Every link, and why it needs no job.

    Raises:
        InputError: the run directory belongs to another model, or has an export of a checkpoint that it has not.
    """
    before = read_chain(run / CHAIN).get("hf_checkpoint")
    if before is not None and not same_path(before, str(config.model.hf_checkpoint)):
        raise InputError(
            f"{run} holds a chain that began with {before}, not with --model.hf-checkpoint "
            f"{config.model.hf_checkpoint}: choose another name with --run.name"
        )
    planned: list[Planned] = []
    trained = False
    for number, link in enumerate(links(config, run, convert_sbatch, eval_sbatch), 1):
        if link.name == TRAIN:
            damage = size_damage(link.output)
            trained = damage is None
            if not trained and finished(config, RunDirectory(run)):
                raise InputError(
                    f"{link.output}, the run's last checkpoint, is damaged ({damage}): move it away, the run remakes it"
                )
            done = f"{link.output} is there" if trained else ""
        else:
            done = f"{link.output} is there" if link.output.exists() else ""
            if done and not trained and TRAIN in [p.link.name for p in planned]:
                raise InputError(
                    f"{done}, but the checkpoint that it comes from is not: move it away, or choose another name with "
                    f"--run.name"
                )
        planned.append(Planned(link, number, done))
    return planned


def describe(planned: list[Planned], config: RunConfig, run: Path) -> str:
    """The scripts, as --dry-run prints them."""
    from fp8slurm.slurm.script import script as train_script

    parts = []
    waiting = [p.link.name for p in planned if not p.done]
    for p in planned:
        head = f"# ---- {p.number} {p.link.name}: "
        flags = dependency([f"<{name}>" for name in p.link.after if name in waiting])
        if p.done:
            parts.append(f"{head}nothing to do, {p.done}\n")
        elif p.link.name == TRAIN:
            parts.append(f"{head}as fp8slurm submit\n{train_script(with_sbatch(config, flags), run)}\n")
        else:
            parts.append(f"{head}sbatch {' '.join(flags)}".rstrip() + f"\n{script(p.link, p.number, config, run)}")
    return "\n".join(parts) + "\n# nothing was queued (--dry-run)\n"


def with_sbatch(config: RunConfig, flags: Sequence[str]) -> RunConfig:
    """The configuration whose training job has further flags of sbatch."""
    sbatch = config.slurm.sbatch | parse_sbatch("--slurm.sbatch", flags)
    return config.model_copy(update={"slurm": config.slurm.model_copy(update={"sbatch": sbatch})})


def refuse_second(run: Path) -> None:
    """Raises InputError where a job or a process of this run is alive already, or Slurm cannot say."""
    facts = Facts(run, time.time())
    known, problem = jobs(facts.job_ids)
    if problem:
        raise InputError(f"Slurm cannot say whether jobs of {run} are queued: {problem}")
    active = [job.id for job in known.values() if not job.over]
    if active:
        raise InputError(
            f"{run}: jobs {', '.join(active)} of it wait or run, or are being ended; fp8slurm status {run} shows "
            f"them, scancel {' '.join(active)} ends them, --run.name starts another run"
        )
    if facts.held() == "running":
        raise InputError(f"{run} is held by a process of this machine: wait for it, or choose another --run.name")


FLAGS = {"eval": "--eval-sbatch"}
"""Where what a job asks for comes from, besides [slurm]."""


def check_scripts(planned: list[Planned], config: RunConfig, run: Path) -> list[str]:
    """Ask sbatch about every other script than the training job's before the first is queued; returns warnings.

    Raises:
        InputError: sbatch would refuse one.
    """
    from fp8slurm.check.cluster import NO_SUCH_NODE, away_of, nodes_of, test_only

    warnings, checked = [], []
    for p in planned:
        # The conversions all ask for the same.
        if p.done or p.link.name == TRAIN or p.link.directives in checked:
            continue
        checked.append(p.link.directives)
        refusal = test_only(script(p.link, p.number, config, run))
        partition = p.link.directives.get("partition") or os.environ.get("SBATCH_PARTITION", "")
        away = away_of(nodes_of(set(filter(None, partition.split(","))))) if NO_SUCH_NODE in refusal else ""
        if away:
            warnings.append(
                f"job {p.link.name} will wait: Slurm could not start it on the nodes that are there now; away: {away}"
            )
        elif refusal:
            flag = FLAGS.get(p.link.name, "--convert-sbatch")
            requested = " ".join(f"--{k}={v}" if v else f"--{k}" for k, v in p.link.directives.items())
            raise InputError(
                f"Slurm would refuse the job {p.link.name}: {refusal}; it asks for {requested} ({flag} changes that)"
            )
    return warnings


def submit(planned: list[Planned], config: RunConfig, run: Path, arguments: list[str]) -> dict[str, Any]:
    """Queue the links that need a job; returns what chain.json says.

    Raises:
        SlurmError: Slurm refused one, or did not answer; those queued before it were cancelled.
    """
    (run / "chain").mkdir(parents=True, exist_ok=True, mode=0o700)
    os.chmod(run, 0o700)
    record: dict[str, Any] = {
        "command": ["fp8slurm", "chain", *arguments],
        "time": time.time(),
        "hf_checkpoint": str(config.model.hf_checkpoint),
        "links": [],
    }
    ids: dict[str, str] = {}
    try:
        for p in planned:
            entry: dict[str, Any] = {"name": p.link.name, "job_id": None, "done": p.done, "after": [], "log": ""}
            if not p.done:
                after = [ids[name] for name in p.link.after if name in ids]
                ids[p.link.name], log = queue(p, after, config, run)
                entry |= {"job_id": ids[p.link.name], "after": after, "log": log}
            record["links"].append(entry)
            write_atomic(run / CHAIN, json.dumps(record, indent=1))
    except BaseException as error:
        refused = isinstance(error, SlurmError) and "no answer" not in str(error)
        left = withdraw(run, list(ids.values()), 0 if refused else LATE_S)
        if isinstance(error, SlurmError):
            raise SlurmError(f"{error}; {left}") from None
        raise
    return record


def queue(planned: Planned, after: list[str], config: RunConfig, run: Path) -> tuple[str, str]:
    """Queue one link to start after the jobs `after`; returns its job id and the path of its log. Raises SlurmError."""
    link, flags = planned.link, dependency(after)
    if link.name == TRAIN:
        from fp8slurm.run.directory import SLURM_FOLDER
        from fp8slurm.slurm.submit import RefusedError
        from fp8slurm.slurm.submit import submit as submit_training

        try:
            job_id = submit_training(with_sbatch(config, flags))
        except RefusedError as error:
            raise SlurmError(f"the training job: {error}") from None
        assert job_id is not None, "a finished run is left out of the chain"
        return job_id, str(run / SLURM_FOLDER / f"{job_id}_0_log.err")
    file = script_file(run, planned.number, link.name)
    text = script(link, planned.number, config, run)
    write_atomic(file, text)
    try:
        job_id = sbatch(*flags, str(file), environment=environment_for_a_job(dict(os.environ), text))
    except SlurmError as error:
        raise SlurmError(f"sbatch refused {file}: {one_line(str(error))}") from None
    return job_id, str(log_file(run, planned.number, link.name))


def withdraw(run: Path, ids: list[str], patience_s: float) -> str:
    """Cancel the chain's jobs; returns what is left of them in the queue, in words.

    They are those with the numbers `ids`, and those whose scripts are the run's: a job whose sbatch was given up may be
    queued all the same, and `patience_s` later than that.
    """
    from fp8slurm.run.directory import SLURM_FOLDER

    cancel(ids)
    begun = time.monotonic()
    while True:
        left, problem = jobs_of_scripts([run / "chain", run / SLURM_FOLDER])
        waited = time.monotonic() - begun
        if problem:
            return f"Slurm cannot say what is left of the chain in the queue ({problem}): see squeue, scancel ends it"
        if not left and waited >= patience_s:
            return "nothing of the chain is left in the queue"
        if left and waited >= patience_s + LATE_S:
            return f"jobs {', '.join(left)} of the chain are left in the queue: scancel {' '.join(left)} ends them"
        cancel(left)
        time.sleep(LOOK_S)


def cancel(ids: list[str]) -> None:
    """scancel, whatever it says."""
    if ids:
        try:
            ask("scancel", *ids)
        except SlurmError as error:
            print(f"fp8slurm chain: {error}; cancel {' '.join(ids)} yourself", file=sys.stderr)


def show(record: dict[str, Any], run: Path) -> None:
    """The table of the chain's jobs."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("chain", "job", "after", ""):
        table.add_column(title, no_wrap=bool(title))
    where = os.path.relpath(run)
    for link in record["links"]:
        note = link["done"] or link["log"]
        note = note.replace(str(run), where)
        table.add_row(
            link["name"], link["job_id"] or Text("done", style="cyan"), " ".join(link["after"]), Text(note, style="dim")
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    ids = " ".join(link["job_id"] for link in record["links"] if link["job_id"])
    print(f"fp8slurm status {where}  shows how far it is; scancel {ids}  ends it")
    print("the same command again goes on where it stopped")
