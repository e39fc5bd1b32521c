"""What the lab's script says, with stand-ins for Slurm's commands: nothing of a cluster is started."""

import os
import subprocess
from pathlib import Path

LAB = Path(__file__).parents[2] / "tools" / "slurm_lab.sh"


def test_status_lists_each_node_once(tmp_path):
    """Every node is in three partitions, and sinfo names it once for each that is asked for."""
    each = 'for p in main low graced; do case " $* " in *" -p "*" $p "*) echo node1;; *" -p "*) ;; *) echo node1;; esac; done'
    for name, line in (("sinfo", each.replace('*" -p "*" $p "*', '*" -p $p "*')), ("squeue", "echo no jobs")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"LAB_STATE": "/tmp/no-such-lab", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([LAB, "status"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["node1", "no jobs"]
