"""The doctor over two real Slurm nodes: well, then with faults made for real on one of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_model
from tiny_task import write_data

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

TIMEOUT_S = 600


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "data").mkdir()
    (folder / "runs").mkdir()
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    return folder


def command(folder: Path, *more: str) -> list[str]:
    data = folder / "data"
    return [
        sys.executable,
        "-m",
        "fp8slurm.cli",
        "doctor",
        "--recipe",
        "tiny-fp8",
        "--slurm",
        "--json",
        "--slurm.nodes=2",
        f"--run.root={folder / 'runs'}",
        f"--model.hf-checkpoint={folder / 'model'}",
        f"--data.train={data / 'train.jsonl'}",
        f"--data.eval={data / 'eval.jsonl'}",
        f"--sft.data={data / 'sft.jsonl'}",
        *more,
    ]


def doctor(lab, folder: Path, *more: str, **environment: str) -> tuple[int, list[dict]]:
    done = subprocess.run(
        command(folder, *more), env=lab.environment | environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert not [p.name for p in (folder / "runs").iterdir() if "doctor" in p.name], "the doctor left something"
    return done.returncode, answer["findings"]


def errors(findings: list[dict]) -> dict[tuple[str, str], str]:
    return {(f["check"], f["node"]): f["text"] for f in findings if f["level"] == "error"}


def inside(lab, *command: str) -> str:
    """Run a command in node 2's network and mount namespaces."""
    pid = (lab.state / "slurmd-node2.pid").read_text().strip()
    done = subprocess.run(["nsenter", f"--target={pid}", "--net", "--mount", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_well(lab, folder):
    status, findings = doctor(lab, folder)
    assert status == 0 and not errors(findings), errors(findings)
    text = "\n".join(f["text"] for f in findings if f["level"] == "ok")
    for what in (
        "version set cpu",
        "exclusive create",
        "nodes meet on eth0",
        "clocks agree",
        "across 2 nodes over gloo",
        "within the node over gloo",
        "SIGUSR2 of Slurm reaches",
        "may be requeued",
        "readable: ",
        "time limit",
    ):
        assert what in text, f"{what} is missing in\n{text}"


@pytest.fixture
def broken_node(lab, folder, tmp_path):
    """Node 2 with a full /dev/shm, few ports of which most are taken, a clock that is off and an older Megatron."""
    inside(lab, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm")
    ports = inside(lab, "cat", "/proc/sys/net/ipv4/ip_local_port_range").split()
    inside(
        lab,
        "sh",
        "-c",
        "echo 40000 40299 > /proc/sys/net/ipv4/ip_local_port_range; head -c 1040000 /dev/zero >"
        " /dev/shm/of_somebody_else",
    )
    address = inside(lab, "sh", "-c", "ip -4 -o addr show eth0 | sed -E 's/.* inet ([0-9.]+).*/\\1/'").strip()
    pid = (lab.state / "slurmd-node2.pid").read_text().strip()
    holder = subprocess.Popen(
        [
            "nsenter",
            f"--target={pid}",
            "--net",
            sys.executable,
            "-c",
            (
                "import socket, sys, time\nheld = [socket.create_server((sys.argv[1], 0)) for _ in range(200)]\n"
                "print('held', flush=True)\ntime.sleep(1000)"
            ),
            address,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    older = tmp_path / "older" / "megatron_core-0.18.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.18.0\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, sys, time\nreal = time.time\nif socket.gethostname() == 'node2':\n"
        f"    time.time = lambda: real() + 90\n    sys.path.insert(0, {str(older.parent)!r})\n"
    )
    yield tmp_path
    holder.kill()
    holder.communicate()
    inside(lab, "umount", "/dev/shm")
    inside(lab, "sh", "-c", f"echo {' '.join(ports)} > /proc/sys/net/ipv4/ip_local_port_range")


def test_the_faults_of_a_node_are_found_and_named(lab, folder, broken_node):
    status, findings = doctor(lab, folder, "--quick", PYTHONPATH=str(broken_node))
    assert status == 1
    errors_of_node2 = [
        (f["check"], f["text"]) for f in findings if f["level"] == "error" and f["node"] == "node2" and f["fix"]
    ]
    for check, text in (
        ("shm", "/dev/shm: 0 of 1 MiB free"),
        ("network", "could not be had: Address already in use (ports 40000 to 40299)"),
        ("network", "clock is 90 s ahead of node1's"),
        ("files", "clock is 90 s ahead of the file system's"),
        ("packages", "megatron-core 0.18.0 is installed; the set cpu has 0.19.2"),
    ):
        assert any(c == check and text in t for c, t in errors_of_node2), f"{text!r} is not among {errors_of_node2}"
    assert {f["node"] for f in findings if f["level"] == "error"} == {"node2"}


def test_a_read_only_run_folder_and_a_job_without_requeue(lab, folder):
    """Inside an allocation: a step over its nodes. Node 2 cannot write its findings down and says them all the same."""
    runs, out = folder / "runs", folder / "out.json"
    inside(lab, "sh", "-c", f"mount --bind {runs} {runs} && mount -o remount,ro,bind {runs}")
    try:
        script = folder / "job.sh"
        script.write_text(f"#!/bin/bash\n{' '.join(command(folder, '--quick'))} > {out}\necho $? > {out}.status\n")
        lab.ask(
            "sbatch",
            "--parsable",
            "--no-requeue",
            "-N2",
            "--ntasks-per-node=1",
            f"--output={folder}/job.log",
            str(script),
        )
        deadline = time.monotonic() + TIMEOUT_S
        while not Path(f"{out}.status").is_file() or not Path(f"{out}.status").read_text():
            assert time.monotonic() < deadline, (folder / "job.log").read_text()
            time.sleep(0.5)
    finally:
        inside(lab, "umount", str(runs))
    assert Path(f"{out}.status").read_text().strip() == "1"
    findings = errors(json.loads(out.read_text())["findings"])
    assert f"--run.root {runs}: cannot create a folder: Read-only file system" in findings["files", "node2"], findings
    assert "may not be requeued (Requeue=0)" in findings["slurm", "node1"], findings
    assert len(findings) == 2, findings
