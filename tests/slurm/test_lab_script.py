"""What the lab's script says, with stand-ins for Slurm's commands; what a task has where it deals a machine's GPUs."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

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


def nvidia_smi(folder: Path, gpus: int) -> dict[str, str]:
    """An environment in which nvidia-smi -L names so many GPUs."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {i}: NVIDIA H200'\n" for i in range(gpus)))
    (folder / "nvidia-smi").chmod(0o755)
    foreign = ("SLURM", "SRUN", "SBATCH", "LAB_", "NCCL_", "CUDA_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return environment | {"PATH": f"{folder}:{os.environ['PATH']}", "LAB_DEAL": "1", "LAB_GPUS": "4"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "LAB_DEAL=1 with LAB_NODES=2 x LAB_GPUS=4: this machine has 7 GPUs"),
        ({"LAB_DEAL": "yes"}, "LAB_DEAL=yes LAB_NET=namespaces; allowed:"),
        ({"LAB_NET": "bridge"}, "LAB_DEAL=1 LAB_NET=bridge; allowed:"),
    ],
)
def test_gpus_that_are_not_there_are_not_dealt(given, says, tmp_path):
    environment = nvidia_smi(tmp_path, 7) | {"LAB_STATE": str(tmp_path / "lab")[-60:]} | given
    done = subprocess.run([LAB, "up"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not (tmp_path / "lab").exists()


JOB = """#!/bin/bash
names="^(NCCL_|NVSHMEM_|TORCH_SYMM|CUDA_VIS)"
show="echo \\$SLURM_PROCID@\\$SLURMD_NODENAME \\$(env | /usr/bin/grep -E '$names' | /usr/bin/sort)"
eval "$show"
srun /bin/bash -c "$show"
"""


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.parametrize("net", ["namespaces", "ports"])
def test_every_task_has_its_nodes_gpus_and_no_multicast(net, start_lab, tmp_path):
    """On a real Slurm, from a job whose environment sbatch has cut to nothing."""
    start_lab("linuxproc")  # or why there is none
    folder = Path(tempfile.mkdtemp(prefix="fp8slurm-"))
    (tmp_path / "job.sh").write_text(JOB)
    environment = nvidia_smi(tmp_path, 8) | {"LAB_STATE": str(folder / "lab"), "LAB_NET": net, "LAB_FIRST_JOB": "701"}
    try:
        subprocess.run([LAB, "up"], env=environment, check=True, timeout=60)
        queued = subprocess.run(
            ["sbatch", "--wait", "--parsable", "--export=NIL", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4",
             f"--output={tmp_path / 'out'}", tmp_path / "job.sh"],
            env=environment | {"SLURM_CONF": str(folder / "lab" / "slurm.conf")}, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert queued.returncode == 0 and queued.stdout.strip() == "701", queued.stdout + queued.stderr
    finally:
        subprocess.run([LAB, "down"], env=environment, check=True, timeout=60)
        shutil.rmtree(folder)
    off = "NCCL_NVLS_ENABLE=0 NVSHMEM_DISABLE_NVLS=1 TORCH_SYMM_MEM_DISABLE_MULTICAST=1"
    script, *tasks = (tmp_path / "out").read_text().splitlines()
    assert script == f"0@node1 CUDA_VISIBLE_DEVICES=0,1,2,3 NCCL_HOSTID=node1 {off}"
    assert sorted(tasks) == [
        f"0@node1 CUDA_VISIBLE_DEVICES=0,1,2,3 NCCL_HOSTID=node1 {off}",
        f"1@node2 CUDA_VISIBLE_DEVICES=4,5,6,7 NCCL_HOSTID=node2 {off}",
    ]
