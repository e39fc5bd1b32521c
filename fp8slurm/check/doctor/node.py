"""One node's part of `fp8slurm doctor --slurm`: srun starts it once a node.

    python -m fp8slurm.check.doctor.node FOLDER

FOLDER, on the shared file system, holds request.json: {"configs", "quick"}; NODE.json is what this node found. A node
that cannot write there says it on standard output instead, in one line that begins with MARK.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fp8slurm.check.doctor import network, quick, scheduler
from fp8slurm.check.doctor.bandwidth import check_bandwidth
from fp8slurm.check.doctor.files import check_paths
from fp8slurm.check.doctor.finding import Check, Finding
from fp8slurm.check.doctor.gpu import visible
from fp8slurm.config import RunConfig

PATHS = Check("paths")

MARK = "fp8slurm-doctor: "


def main(folder: Path) -> None:
    """Look at everything, then write it down."""
    notice = scheduler.Signal()
    request = json.loads((folder / "request.json").read_text())
    configs = [RunConfig.model_validate_json(text) for text in request["configs"]]
    node, nodes = int(os.environ["SLURM_NODEID"]), int(os.environ["SLURM_NNODES"])
    name = os.environ.get("SLURMD_NODENAME") or f"node {node}"
    findings = quick.local(configs, tasks_here=True, plans=not request["quick"])
    readable, digests = check_paths(configs)
    findings += readable
    address, lines = network.check_interface()
    findings += lines
    findings += network.check_ports(address)
    if nodes > 1:
        where = folder / "clock.json"
        findings += network.serve_clock(name, address, nodes - 1, where) if node == 0 else network.compare_clock(where)
    broken = any(f.level == "error" and f.check == "network" for f in findings)
    if not request["quick"] and not broken:
        findings += check_bandwidth(node, nodes, address, folder / "store.json", len(visible()))
    findings += notice.check(first=node == 0)
    if node == 0:
        findings += scheduler.check_job(os.environ["SLURM_JOB_ID"])
    report(folder, name, {"findings": [replace(f, node=name).to_json() for f in findings], "digests": digests})


def report(folder: Path, name: str, values: dict[str, Any]) -> None:
    text = json.dumps(values)
    try:
        partial = folder / f".{name}.tmp"
        partial.write_text(text)
        os.replace(partial, folder / f"{name}.json")
    except OSError:
        print(f"\n{MARK}{json.dumps({'node': name, **values})}", flush=True)


def compare_paths(digests: dict[str, dict[str, str]]) -> list[Finding]:
    """Findings for paths under which nodes see different files; digests: {node: {path: digest}}."""
    out = []
    for path in dict.fromkeys(p for seen in digests.values() for p in seen):
        seen = {node: d[path] for node, d in digests.items() if path in d}
        if len(set(seen.values())) > 1:
            out.append(
                PATHS.error(
                    f"{path}: the nodes see different files (names or sizes)",
                    "it is on a local disk, or a copy is unfinished: put it on the shared file system",
                    ",".join(sorted(seen)),
                )
            )
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]))
