"""The job that this process runs in, as Slurm's environment describes it, and what Slurm's commands say about a job."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fp8slurm.core.errors import InputError

COMMAND_TIMEOUT_S = 30.0


class SlurmError(RuntimeError):
    """A Slurm command failed or did not answer; the message is its own."""


@dataclass(frozen=True)
class Job:
    """A start of a Slurm job: a requeued job keeps its id and counts its restarts."""

    id: str
    restart: int
    step: str | None
    """Number of the job step; None in the job script itself."""

    @classmethod
    def here(cls) -> Job | None:
        """The job of this process, None outside Slurm."""
        id, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID", "")
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(id, restart, step if step.isdigit() and int(step) < FIRST_SPECIAL_STEP else None) if id else None


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers the job script's own step from the top."""


def ask(
    *command: str,
    timeout_s: float = COMMAND_TIMEOUT_S,
    environment: dict[str, str] | None = None,
    cwd: str | None = None,
) -> str:
    """Standard output of a Slurm command. Raises SlurmError with what it said."""
    if environment is None:  # a format of the user's own would be no time to us
        environment = dict(os.environ) | {"SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment, cwd=cwd)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: there is no such command on this machine") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer within {timeout_s:g} s") from None
    if done.returncode:
        raise SlurmError((done.stderr or done.stdout).strip() or f"{' '.join(command)}: exit status {done.returncode}")
    return done.stdout


def sbatch(*arguments: str, environment: dict[str, str], cwd: str | None = None) -> str:
    """Queue a job; its number. Raises SlurmError: Slurm refuses it."""
    output = ask("sbatch", "--parsable", *arguments, environment=environment, cwd=cwd)
    return output.strip().split(";")[0]  # NUMBER;CLUSTER


OTHER_NAMES = {
    "array-inx": "array", "timelimit": "time", "no-requeue": "requeue", "mem-per-node": "mem", "mem-per-cpu": "mem",
    "mem-per-gpu": "mem", "gpus": "gpus-per-node", "gpus-per-socket": "gpus-per-node", "gpus-per-task": "gpus-per-node",
}  # fmt: skip
"""Options of sbatch, as its variables SBATCH_... or as flags name them, that say again (or contradict) another."""
NEVER = {"array", "export", "wait", "gpu-bind", "tres-bind"}
"""Options that no variable may set: a run is one job with its submitter's environment whose tasks see all GPUs of their
node, and sbatch returns at once."""
OURS = {"gpus-per-node"}
"""Options that a script of ours says by leaving them out, too: a job without GPUs, a conversion."""


def environment_for_a_job(environment: dict[str, str], script: str = "") -> dict[str, str]:
    """What sbatch and a new job may inherit: nothing that describes another job, and no SBATCH_... variable for what
    `script` asks for, since sbatch lets them win over #SBATCH lines."""

    def option(name: str) -> str:
        name = name.lower().replace("_", "-")
        return OTHER_NAMES.get(name, name)

    named = (
        NEVER
        | (OURS if script else set())
        | {option(name) for name in re.findall(r"^#SBATCH --([\w-]+)", script, re.M)}
    )
    foreign = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
    kept = {k: v for k, v in environment.items() if k == "SLURM_CONF" or not k.startswith(foreign)}
    return {
        k: v for k, v in kept.items() if not (k.startswith("SBATCH_") and option(k.removeprefix("SBATCH_")) in named)
    }


def available() -> bool:
    """Whether Slurm's commands are installed here."""
    return all(shutil.which(c) for c in ("sbatch", "srun", "scontrol", "squeue"))


def settings(timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, str]:
    """`scontrol show config`. Raises SlurmError."""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config", timeout_s=timeout_s).splitlines())
    return {key.strip(): value.strip() for key, separator, value in pairs if separator}


def fields(line: str) -> dict[str, str]:
    """`scontrol -o show ...`'s KEY=VALUE pairs; of a key that comes twice, the first."""
    out: dict[str, str] = {}
    for key, value in re.findall(r"(\S+?)=(\S*)", line):
        out.setdefault(key, value)
    return out


def number_of(job_id: str) -> str:
    """The number by which scontrol knows a job alone: the number of an array's task may mean all of them."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task and job_id == os.environ.get("SLURM_JOB_ID") else job_id


def show_job(job_id: str) -> dict[str, str] | None:
    """What the controller knows about a job, None if it knows none of that number (any more). Raises SlurmError."""
    try:
        lines = ask("scontrol", "-o", "show", "job", number_of(job_id)).splitlines()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    # An array's number is also that of one of its tasks, and is answered with all of them.
    return fields(next((line for line in lines if line.startswith(f"JobId={job_id} ")), lines[0] if lines else ""))


ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "STOPPED")
"""States of a job that writes, or will. What is COMPLETING is being killed; should it still write, it is fenced off."""


ENDING = "COMPLETING"
"""State of a job whose processes are being ended: it is over soon, or (requeued) waits again."""


def cancelled(job: dict[str, str]) -> bool:
    """Whether scancel ended this job (show_job's answer). While its processes are being ended Slurm shows no more of it
    than an end that has passed without a reason (a time limit has one; the end of a requeued job lies ahead), and would
    still take a requeue."""
    end = parse_time(job.get("EndTime", ""))
    ended = (job.get("JobState"), job.get("Reason")) == (ENDING, "None") and end is not None and end <= time.time()
    return ended or job.get("JobState") == "CANCELLED"


def is_active(job_id: str) -> bool:
    """Whether a job waits or runs. Raises SlurmError."""
    job = show_job(job_id)
    return job is not None and job["JobState"] in ACTIVE


def unfinished(job_id: str) -> str:
    """State of a job that waits, runs or is being ended, "" where it is over. Raises SlurmError."""
    state = (show_job(job_id) or {}).get("JobState", "")
    return state if state in (*ACTIVE, ENDING) else ""


def parse_time(text: str) -> float | None:
    """A time as scontrol prints it (2026-11-23T20:34:11), in Unix seconds; None for Unknown."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def end_time(job_id: str) -> float | None:
    """When Slurm will end the running job: its time limit, or a preemption's end of grace; None: never, unknown, or it
    was cancelled."""
    try:
        job = show_job(job_id)
    except SlurmError:
        job = None
    if job is not None and cancelled(job):
        return None
    if job is not None and job.get("TimeLimit") != "UNLIMITED" and parse_time(job.get("EndTime", "")):
        return parse_time(job["EndTime"])
    seconds = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(seconds) if seconds.isdigit() else None


def minutes(text: str) -> int:
    """A time limit in minutes, rounded up: MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        InputError: it is none of these.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise InputError(f"{text!r} is no time: allowed are minutes, HH:MM:SS and D-HH:MM:SS")
    days, *clock = match.groups()
    parts = [int(part) for part in clock if part is not None]
    units = (3600, 60, 1) if days is not None or len(parts) == 3 else (60, 1)
    seconds = 86400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units))
    if seconds <= 0:
        raise InputError(f"{text!r} is no time limit: it must be above 0")
    return -(-seconds // 60)


def address() -> str:
    """This node's address on the network that joins the job's nodes: that of the route to where srun was started.

    Raises:
        SlurmError: there is no IPv4 route to where srun was started; or Slurm names no address, and the node's own
            name has none, or a loopback one.
    """
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # nothing is sent: only the route is looked up
            try:
                s.connect((launcher, 9))
            except OSError as error:
                raise SlurmError(
                    f"no IPv4 route to {launcher}, where srun was started (SLURM_LAUNCH_NODE_IPADDR): {error}; "
                    f"nodes are joined over IPv4, other addresses are not supported"
                ) from error
            return s.getsockname()[0]
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        ip = socket.gethostbyname(name)
    except OSError as error:
        raise SlurmError(
            f"this node's name {name} has no IPv4 address ({error}): it must resolve to one that the other nodes "
            f"reach (/etc/hosts, DNS)"
        ) from error
    if ip.startswith("127."):
        raise SlurmError(f"this node's name {name} resolves to {ip}, which other nodes cannot reach")
    return ip


def interface_of(address: str) -> str:
    """Name of the network interface that has this IPv4 address. Raises SlurmError."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return name
    raise SlurmError(f"no network interface of this node has the address {address}")


def no_such_interface(chosen: str) -> str:
    """Why NCCL would find no interface by NCCL_SOCKET_IFNAME (NCCL's manual: names that interfaces begin with, by
    commas; "=": whole names; "^": all but these), "" where it would."""
    import psutil

    listed = chosen.lstrip("^=")
    names = [name.split(":")[0] for name in listed.split(",") if name]
    there = sorted(psutil.net_if_addrs())

    def meant(interface: str) -> bool:
        return any(interface == n if "=" in chosen[:2] else interface.startswith(n) for n in names)

    if not chosen or any(meant(interface) != chosen.startswith("^") for interface in there):
        return ""
    return (
        f"NCCL_SOCKET_IFNAME={chosen}: no network interface of this node is meant by it; there are {', '.join(there)}"
    )


BINDING = ("SLURM_GPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK")
"""Variables by which srun and sbatch say that each task of a node has GPUs of its own."""
UNBOUND = {"none", "0"}


def gpu_binding(environment: Mapping[str, str]) -> str:
    """The variable, with its value, that gives each task GPUs of its own; "" where all tasks of a node see all."""
    for name in BINDING:
        value = environment.get(name, "")
        if value and value not in UNBOUND and ("gpu" in value or name != "SLURM_TRES_PER_TASK"):
            return f"{name}={value}"
    return ""


def gpu_list() -> list[str]:
    """The GPUs that Slurm gave this job on this node, as CUDA names them; empty if it gave none."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        value = os.environ.get(name)
        if value and value != "NoDevFiles":
            return value.split(",")
    return []


def script_arguments(job_id: str) -> list[str]:
    """What the job's script was started with behind its name; empty where the script does not run on this node.

    Slurm's own record (Command in `scontrol show job`) does not tell spaces within an argument from those between.
    """
    mine = f"SLURM_JOB_ID={job_id}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")[:-1]
            names = [part.rpartition(b"/")[2] for part in command[:3]]
            if b"slurm_script" in names and mine in (process / "environ").read_bytes().split(b"\0"):
                return [os.fsdecode(part) for part in command[names.index(b"slurm_script") + 1 :]]
        except OSError:  # it has ended, or belongs to somebody else
            continue
    return []


def flags_of(shown: dict[str, str], environment: Mapping[str, str]) -> list[str]:
    """Flags of sbatch that ask for what a job was given, wherever it had asked for it: its script says only a part.

    shown: `show_job` of the job; environment: of one of its processes.
    """
    flags = {
        "partition": shown.get("Partition"), "account": shown.get("Account"), "qos": shown.get("QOS"),
        "reservation": shown.get("Reservation"), "constraint": shown.get("Features"),
        "exclude": shown.get("ExcNodeList"), "time": shown.get("TimeLimit"), "nodes": shown.get("NumNodes"),
        "job-name": environment.get("SLURM_JOB_NAME"),
        "ntasks-per-node": environment.get("SLURM_NTASKS_PER_NODE"), "mem": environment.get("SLURM_MEM_PER_NODE"),
        "mem-per-cpu": environment.get("SLURM_MEM_PER_CPU"), "cpus-per-task": environment.get("SLURM_CPUS_PER_TASK"),
        "gpus-per-node": environment.get("SLURM_GPUS_PER_NODE"), "array": environment.get("SLURM_ARRAY_TASK_ID"),
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in flags.items() if value not in (None, "", "(null)", "N/A")]
    return [*given, "--no-requeue"] if shown.get("Requeue") == "0" else given


def requeue(job_id: str, patience_s: float = 20.0) -> None:
    """Put the running job back into the queue; Slurm then ends this start. Tries again while the controller is away.

    Raises:
        SlurmError: Slurm refuses (requeueing is disabled), or does not answer.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            ask("scontrol", "requeue", number_of(job_id))
            return
        except SlurmError as error:
            if time.monotonic() > deadline or not re.search("contact|connect|answer", str(error), re.I):
                raise
            time.sleep(1)


def leave_out(job_id: str, node: str) -> str:
    """What ExcNodeList becomes so that a job does not get a node: its present one and the node. Raises SlurmError."""
    present = (show_job(job_id) or {}).get("ExcNodeList", "(null)")
    return node if present in ("", "(null)") else f"{present},{node}"


def node_names(node_list: str) -> list[str]:
    """The nodes of a list such as node[1-3], in its order. Raises SlurmError."""
    return ask("scontrol", "show", "hostnames", node_list).split() if node_list not in ("", "(null)") else []


def nodes_of_partition(name: str) -> int | None:
    """How many nodes a partition has, None where Slurm does not say."""
    try:
        total = fields(ask("scontrol", "-o", "show", "partition", name)).get("TotalNodes", "")
    except SlurmError:
        return None
    return int(total) if total.isdigit() else None


def one_line(output: str) -> str:
    """What sbatch printed, without its own name in front of every line."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in output.splitlines()]
    return "; ".join(line for line in lines if line) or "sbatch failed without a word"
