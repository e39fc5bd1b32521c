"""The checks that take no time: what `train` and `submit` look at before anything is queued."""

from __future__ import annotations

from fp8slurm.check.doctor.files import check_folder
from fp8slurm.check.doctor.finding import Finding
from fp8slurm.check.doctor.gpu import check_gpus
from fp8slurm.check.doctor.machine import check_machine
from fp8slurm.check.doctor.network import check_ports
from fp8slurm.check.doctor.versions import check_versions
from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError

ESSENTIAL = ("torch", "megatron-core", "sglang", "transformers")
"""First words of findings about packages without which nothing can run."""


def local(configs: list[RunConfig], tasks_here: bool, plans: bool) -> list[Finding]:
    """This machine without its network. tasks_here: the tasks would run here; plans: as in check_machine."""
    findings = [*check_versions(configs)]
    if tasks_here:
        findings += [*check_gpus(configs, tasks_here), *check_machine(configs, plans)]
    for root in dict.fromkeys(c.run.root for c in configs):
        findings += check_folder(root)
    return findings


def quick(config: RunConfig) -> list[str]:
    """Warnings about this machine and the folder of the runs, in a second or so; torch is not imported.

    Another version than the set's is a warning here: whoever tries one wants to know, not to be stopped.

    Raises:
        InputError: the run cannot work here, with what to do about it.
    """
    tasks_here = config.slurm.executor != "slurm"
    findings = local([config], tasks_here, plans=False)
    if tasks_here:
        findings += check_ports("127.0.0.1")
    lines = {f: f"{f.text}{f'; {f.fix}' if f.fix else ''}" for f in findings if f.level != "ok"}
    fatal = [line for f, line in lines.items() if f.level == "error" and _stops(f)]
    if fatal:
        raise InputError("\n".join(fatal) + "\n(fp8slurm doctor looks at everything)")
    expected = "no GPU is visible"  # a recipe that needs one has been refused above
    return [line for f, line in lines.items() if not f.text.startswith(expected)]


def _stops(finding: Finding) -> bool:
    if finding.check != "packages":
        return True
    return "is not installed" in finding.text and finding.text.split()[0] in ESSENTIAL
