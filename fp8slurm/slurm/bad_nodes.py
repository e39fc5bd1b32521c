"""A node that brings attempt after attempt down is left out when the job is requeued.

    a task's error speaks of its node (core/node_faults.py)   -> its errors/task_I.json has "node" and "fault"
    srun lost a node, or a hang left one node alone speechless -> the job script finds out
    the job script's verdict names that node, two attempts in a row -> the requeued job gets it in its ExcNodeList

Slurm changes the ExcNodeList of pending jobs only: the job script does it between the requeue and its own end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import names_in, read_json
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.task_errors import VERDICT, left_out, task_errors

IN_A_ROW = 2
"""Attempts that one node has to bring down: a single fault may pass, as the errors of a shared file system do."""
LOST = re.compile(r"srun: error: Node failure on ([\w.-]+)")


def blamed(run: RunDirectory, log: list[str], host_of: dict[int, str]) -> tuple[str, str]:
    """(node, its fault) that brought the attempt down, ("", "") where no single node is known to have.

    log: lines of the job script; host_of: the nodes' names, by the number of the task.
    """
    if lost := next((m for line in log if (m := LOST.search(line))), None):
        return lost[1], "srun lost it"
    errors = task_errors(run.attempt_dir)
    faulty = sorted((e["time"], e["node"], e["fault"]) for e in errors if e.get("fault"))
    if faulty:
        return faulty[0][1], faulty[0][2]
    return _speechless(run.attempt_dir / "stacks", host_of)


def _speechless(stacks: Path, host_of: dict[int, str]) -> tuple[str, str]:
    """After a hang every task writes where it stands: where those of one node alone could not, its mounts hang."""
    if not (stacks / "hung").exists():
        return "", ""
    speaking = {int(m[1]) for name in names_in(stacks) if (m := re.fullmatch(r"task_(\d+)\.txt", name))}
    silent = set(host_of.values()) - {host for task, host in host_of.items() if task in speaking}
    if len(silent) != 1 or len(set(host_of.values())) == 1:
        return "", ""
    return silent.pop(), "in a hang none of its tasks could write where it stands (a mount that hangs?)"


def hosts_of(config: RunConfig, nodes: list[str]) -> dict[int, str]:
    """The nodes' names by the number of the task, dealt in blocks as the placement does."""
    tasks = place(config).tasks
    return {t.index: nodes[t.node] for t in tasks} if nodes and len(nodes) > tasks[-1].node else {}


def to_leave_out(config: RunConfig, run: RunDirectory) -> dict[str, Any] | None:
    """What stopped.json says of a node that the next start is not to have: node, why. None: of none.

    At most slurm.max_bad_nodes of a run: where more seem bad, it is hardly the nodes.
    """
    assert run.attempt is not None
    verdicts = [_read(run.attempts / str(n) / "errors" / VERDICT) for n in range(run.attempt, -1, -1)][:IN_A_ROW]
    nodes = {v.get("node") for v in verdicts}
    node = next(iter(nodes))
    if len(verdicts) < IN_A_ROW or len(nodes) != 1 or not node:
        return None
    already = {r["node"] for r in left_out(run.attempts)}
    if node in already or len(already) >= config.slurm.max_bad_nodes:
        return None
    attempts = f"attempts {run.attempt - IN_A_ROW + 1} to {run.attempt}"
    return {"node": node, "why": f"{attempts}: {verdicts[0].get('fault') or 'no reason'}"}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError, TransientInputError):
        return {}
