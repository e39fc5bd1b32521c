#!/usr/bin/env python3
"""The recipes for 4B and 30B-A3B on eight GPUs, and two Slurm nodes of a GPU each, as parts of a visit (visit.py).

usage: eight.py eight|nodes|PART... WORK OUT [--seconds 520] [--rehearse] [--executor slurm|local] [--plan]

    prepare-4b    the model and its data
    4b            qwen3-4b-fp8 as shipped, FP8: RL steps 1 to 4 and a checkpoint
    4b-engine     the same run goes on from it; an engine is killed after step 5; to step 8 and its checkpoint
    4b-rank       the same run; a rank is killed after step 9, the job requeued; to step 10, the run's end
    4b-bf16       the same in BF16 on both sides, three steps
    4b-split      four GPUs train, four serve, one step ahead
    prepare-30b   the model with all 48 layers
    30b           qwen3-30b-a3b-fp8 on two Slurm nodes of four GPUs, routing replayed: five steps in FP8
    30b-bf16      the same in BF16 on both sides, two steps
    prepare-nodes four of 30B-A3B's layers
    nodes-faults  sbatch/train_qwen3_30b_a3b_fp8_2node.sbatch on two nodes of a GPU with four layers: checkpoints, an
                  engine killed, scontrol requeue, a rank killed
    prepare-large as many of its layers as fit two GPUs
    nodes-large   the same script with these, two steps

A part takes at most PART_S seconds. WORK/parts/PART.json has what it has seen so far, with every step as it comes, and
is copied to OUT; table.md there is made of all of them. A part that is over is not run again, one that was cut off goes
on from its run's newest checkpoint. So the same command, called again with the same WORK, does what is left.

--rehearse: the same parts with the tiny models, engines on the CPU and gloo: other sizes and devices (REHEARSAL) and
nothing else.
--plan: what every part would hold by plan and be refused for, and nothing is run; exit status 1 where one does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "gpu"), str(ROOT / "tools")]

from recipes import PRECISIONS, engine_arguments, with_settings, write_model  # noqa: E402

from fp8slurm.check.dry_run import Refusal  # noqa: E402
from fp8slurm.check.preflight import preflight  # noqa: E402
from fp8slurm.config import RunConfig  # noqa: E402
from fp8slurm.config.load import read_recipe, to_toml  # noqa: E402
from fp8slurm.config.placement import place  # noqa: E402
from fp8slurm.core.processes import process_start  # noqa: E402
from fp8slurm.models.spec import ModelSpec  # noqa: E402
from fp8slurm.observe.metrics import read_metrics  # noqa: E402
from fp8slurm.plan.plan import Plan, make_plan  # noqa: E402
from fp8slurm.scheduler.job import fields  # noqa: E402

MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast of a process that dies can take GPUs out of service for everybody. tools/slurm_lab.sh gives it to
the tasks of a job, whatever sbatch exports."""
PART_S = 520.0
"""Of the ten minutes that a command may take where GPUs are lent, with room for the end."""
STOP_S = 25.0
"""Before a part's deadline: its run is ended then."""
GPU = {"H200": 141_000_000_000}
"""What parts have to fit by plan."""
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """RL steps of a recipe. Parts with the same `run` are one run, which each of them lets go on."""

    run: str
    recipe: str
    model: str
    nodes: int
    gpus: int
    """Of a node."""
    until: int
    """It is over with this RL step's record,"""
    saved: int | None = None
    """and this step's checkpoint."""
    faults: dict[int, str] = field(default_factory=dict)
    """Record of RL after which it happens -> "engine" or "rank" (killed), "requeue"."""
    settings: Sections = field(default_factory=dict)
    """Beside the recipe's."""
    script: str | None = None
    """sbatch file that starts it in place of `fp8slurm submit`."""
    needs_s: float = 400.0
    """A call with less left leaves it to the next one."""


VOCABULARY = 151_936


def common(precision: str) -> Sections:
    """Of all parts: a model with random weights, and what a bare machine needs to be ready within minutes."""
    return {
        "fp8": PRECISIONS[f"{precision}-{precision}"],
        # One of 64 tokens ends a sample: lengths with a mean of about 2400 and a long tail, up to max_tokens.
        "rollout": {"stop_token_ids": list(range(1000, VOCABULARY, VOCABULARY // 64))[:64]},
        "reward": {"kind": "coin:even"},
        "engine": {"extra_args": engine_arguments([1, 2, 4, 8, 16, 32, 64]), "ready_timeout_s": 400.0},
        "watchdog": {"timeout_s": 240.0},
        "observe": {"plot": False, "tensorboard": False},
    }


def merged(*all_sections: Sections) -> Sections:
    out: Sections = {}
    for sections in all_sections:
        for name, values in sections.items():
            out[name] = out.get(name, {}) | values
    return out


TEN = {"run": {"steps": 10}, "checkpoint": {"every": 4}}
FEW = {"run": {"steps": 6}, "checkpoint": {"every": 100}}
"""Ended before its last step, which would save."""
FOUR_B = ("qwen3-4b-fp8", "Qwen3-4B", 1, 8)
THIRTY_B = ("qwen3-30b-a3b-fp8", "Qwen3-30B-A3B", 2, 4)
FOUR_GPUS: Sections = {
    "slurm": {"nodes": 2, "gpus_per_node": 4, "ranks_per_node": 4},
    # The experts lie on a node's four GPUs, twice: over two nodes every copy of a token would cross sockets.
    "parallel": {"expert_parallel_size": 4},
    "engine": {"tensor_parallel_size": 4, "expert_parallel_size": 4},
    # Adam's FP32 state of 30 G parameters would fill the host's memory (489 GB), and its GPUs beside the rest.
    "optim": {"cpu_offload": False, "moments": "bfloat16"},
    "rollout": {"routing_replay": True, "max_tokens": 1024},
}
ONE_GPU: Sections = {
    "slurm": {"nodes": 2, "gpus_per_node": 1, "ranks_per_node": 1},
    "parallel": {"tensor_parallel_size": 1, "sequence_parallel": False, "expert_parallel_size": 2},
    "engine": {"tensor_parallel_size": 1, "expert_parallel_size": 1, "max_running_requests": 64},
    "train": {"tokens_per_micro_batch": 8192},
    "data": {"max_prompt_tokens": 64},
    "rollout": {"routing_replay": True, "max_tokens": 1024, "prompts_per_step": 16},
}
SCRIPT = "sbatch/train_qwen3_30b_a3b_fp8_2node.sbatch"
LARGE_LAYERS, SMALL_LAYERS = 16, 4
"""Of the parts on two GPUs, whose host has 256 GiB of memory and 128 of disk: Adam of 16 layers takes 170 GB, a
checkpoint of four 44."""

PARTS: dict[str, Part] = {
    "4b": Part("4b-fp8", *FOUR_B, until=4, saved=4, settings=merged(common("fp8"), TEN)),
    "4b-engine": Part(
        "4b-fp8", *FOUR_B, until=8, saved=8, faults={5: "engine"}, settings=merged(common("fp8"), TEN)
    ),
    "4b-rank": Part("4b-fp8", *FOUR_B, until=10, saved=10, faults={9: "rank"}, settings=merged(common("fp8"), TEN)),
    "4b-bf16": Part("4b-bf16", *FOUR_B, until=3, settings=merged(common("bf16"), FEW)),
    "4b-split": Part(
        "4b-split", *FOUR_B, until=4,
        settings=merged(
            common("fp8"), FEW,
            {
                "engine": {"placement": "split", "gpus": 4, "per_node": 4, "max_running_requests": 128},
                "slurm": {"ranks_per_node": 4},
                "rollout": {"max_staleness": 1},
            },
        ),
    ),
    "30b": Part("30b-fp8", *THIRTY_B, until=5, settings=merged(common("fp8"), FEW, FOUR_GPUS), needs_s=480),
    "30b-bf16": Part(
        "30b-bf16", *THIRTY_B, until=2, needs_s=480,
        # a run without TransformerEngine's FP8 is refused BF16 moments; without copies in FP8 others have room
        settings=merged(common("bf16"), FEW, FOUR_GPUS, {"optim": {"moments": "float32"}}),
    ),
    "nodes-faults": Part(
        "nodes-faults", "qwen3-30b-a3b-fp8", f"Qwen3-30B-A3B-{SMALL_LAYERS}", 2, 1, until=8, saved=8, script=SCRIPT,
        faults={2: "engine", 3: "requeue", 5: "rank"},
        settings=merged(common("fp8"), {"run": {"steps": 8}, "checkpoint": {"every": 2, "keep_last": 1}}, ONE_GPU),
        needs_s=480,
    ),
    "nodes-large": Part(
        "nodes-large", "qwen3-30b-a3b-fp8", f"Qwen3-30B-A3B-{LARGE_LAYERS}", 2, 1, until=2, script=SCRIPT,
        settings=merged(common("fp8"), FEW, ONE_GPU), needs_s=480,
    ),
}  # fmt: skip
MODELS = {
    "prepare-4b": ("Qwen3-4B",),
    "prepare-30b": ("Qwen3-30B-A3B",),
    "prepare-nodes": (f"Qwen3-30B-A3B-{SMALL_LAYERS}",),
    "prepare-large": (f"Qwen3-30B-A3B-{LARGE_LAYERS}",),
}
"""Parts that make models."""
VISITS = {
    "eight": ("prepare-4b", "4b", "4b-engine", "4b-rank", "4b-bf16", "4b-split", "prepare-30b", "30b", "30b-bf16"),
    "nodes": ("prepare-nodes", "nodes-faults", "prepare-large", "nodes-large"),
}
REHEARSAL: Sections = {
    "model": {"rollout_checkpoint": None},
    "rollout": {"prompts_per_step": 4, "n_samples": 4, "max_tokens": 32, "stop_token_ids": list(range(5, 320, 16))},
    "data": {"max_prompt_tokens": 64},
    "train": {"tokens_per_micro_batch": 1024},
    "engine": {
        "extra_args": [], "max_running_requests": 64, "max_total_tokens": 8192, "context_length": 256,
        "mem_fraction": 0.3, "placement": "shared", "gpus": 0,
    },
    "optim": {"moments": "float32"},
    "slurm": {"gpus_per_node": 0, "cpus_per_task": None, "cpu_threads": 1, "engine_threads": 1},
}  # fmt: skip
"""What tiny models and CPUs need otherwise. Two ranks take the place of four, and of eight."""


def rehearsed(part: Part) -> Sections:
    """Settings of a part's rehearsal beside its own: fewer ranks in the same kind of layout, and stand-ins for GPUs."""
    own = part.settings
    ranks = max(1, own.get("slurm", {}).get("ranks_per_node", part.gpus) // 2) if part.nodes == 1 else min(2, part.gpus)
    changes: Sections = {"slurm": {"ranks_per_node": ranks}, "fp8": {}}
    if own["fp8"]["backend"] == "transformer_engine":
        changes["fp8"] = {"backend": "emulated"}
    if part.nodes == 1:
        changes["engine"] = {"per_node": 2}
        if (
            own["engine"].get("placement") == "split"
        ):  # engines on the CPU have no devices: NCCL's stand-in sends to them
            changes["sync"] = {"transport": "gloo-direct"}
    else:
        changes["parallel"] = {"tensor_parallel_size": ranks, "sequence_parallel": ranks > 1, "expert_parallel_size": 2}
        changes["engine"] = {"tensor_parallel_size": ranks, "expert_parallel_size": ranks}
    return merged(REHEARSAL, changes)


@dataclass
class Visit:
    """Where everything is, and how a visit differs from its rehearsal."""

    work: Path
    out: Path
    rehearse: bool = False
    executor: str = "slurm"

    def model(self, part: Part) -> Path:
        if self.rehearse:
            return self.work / ("tiny-moe" if "30B" in part.model else "tiny")
        return self.work / part.model

    def config(self, part: Part) -> RunConfig:
        """The part's recipe with its settings. ValidationError, InputError: one of them cannot be."""
        model, data = self.model(part), self.work / "data"
        # made before, so that a start does not take the time for it
        ready = part.settings["fp8"].get("backend") != "off" and fp8_of(model).exists()
        paths: Sections = {
            "run": {"name": part.run, "root": self.work / "runs"},
            "model": {"hf_checkpoint": model, "rollout_checkpoint": fp8_of(model) if ready else None},
            "data": {"train": data / "train.jsonl", "eval": None},
            "slurm": {"executor": self.executor},
        }
        settings = merged(paths, part.settings, rehearsed(part) if self.rehearse else {})
        return with_settings(read_recipe(part.recipe), settings)

    def recipe(self, name: str, config: RunConfig) -> Path:
        path = self.work / "recipes" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(config))
        return path

    def save(self, name: str, note: dict[str, Any]) -> None:
        """What a part has seen so far, in WORK and in OUT; and the table."""
        for folder in (self.work / "parts", self.out):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.json"
            path.with_suffix(".tmp").write_text(json.dumps(note, indent=1, default=str))
            path.with_suffix(".tmp").rename(path)
        (self.out / "table.md").write_text(table(self.notes(), self.rehearse))

    def notes(self) -> dict[str, dict[str, Any]]:
        paths = sorted((self.work / "parts").glob("*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: json.loads(path.read_text()) for path in paths}


def fp8_of(model: Path) -> Path:
    return model.with_name(f"{model.name}-FP8")


def changed(config: RunConfig, recipe: str) -> dict[str, list[Any]]:
    """Setting -> what is shipped, what is here; paths are left out."""
    mine, shipped = config.model_dump(mode="json"), read_recipe(recipe).model_dump(mode="json")
    paths = {"run.name", "run.root", "model.hf_checkpoint", "model.rollout_checkpoint", "data.train"}
    return {
        key: [shipped[section][name], value]
        for section, values in mine.items()
        for name, value in values.items()
        if value != shipped[section][name] and (key := f"{section}.{name}") not in paths
    }


# -- starting and ending runs ----------------------------------------------------------------------------------------


class Started(Protocol):
    """A run that was started."""

    def start(self) -> None: ...

    def over(self) -> str | None:
        """How it ended; None: it goes on."""

    def requeue(self) -> None: ...

    def stop(self) -> None: ...


class LocalRun:
    """Processes of this machine. A run that a fault has ended is started again, as a requeue would."""

    def __init__(self, recipe: Path, log: Path) -> None:
        self.command = [sys.executable, "-m", "fp8slurm.cli", "train", "--recipe", str(recipe)]
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def over(self) -> str | None:
        assert self.process is not None
        status = self.process.poll()
        return None if status is None else "COMPLETED" if status == 0 else f"status {status}"

    def requeue(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Lab:
    """tools/slurm_lab.sh with nodes that have shares of this machine's GPUs, or none."""

    def __init__(self, nodes: int, gpus: int, deal: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        state = self.folder / "lab"
        own = {"LAB_STATE": state, "LAB_NODES": nodes, "LAB_GPUS": gpus, "LAB_CPUS": 128, "LAB_DEAL": int(deal)}
        own["LAB_FIRST_JOB"] = int(time.time()) % 10**7 + 1  # a run goes on in the lab of another part
        foreign = ("SLURM", "SRUN", "SBATCH")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.environment |= {k: str(v) for k, v in own.items()}
        self.environment |= {
            "SLURM_CONF": str(state / "slurm.conf"),
            "PATH": f"{state / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def ask(self, *command: str, limit_s: float = 60) -> str:
        """A command's output. RuntimeError: it failed, with what it said."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=limit_s
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout

    def script(self, action: str) -> str:
        return self.ask(str(ROOT / "tools" / "slurm_lab.sh"), action)


class SlurmRun:
    """A job of the lab."""

    def __init__(self, lab: Lab, command: list[str]) -> None:
        self.lab, self.command, self.job = lab, command, ""

    def start(self) -> None:
        said = self.lab.ask(*self.command, limit_s=180)  # "job 1: ..." by submit, "1" by sbatch --parsable
        self.job = said.removeprefix("job ").split(":")[0].strip()

    def over(self) -> str | None:
        state = fields(self.lab.ask("scontrol", "-o", "show", "job", self.job))["JobState"]
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return state if state in ended else None

    def requeue(self) -> None:
        self.lab.ask("scontrol", "requeue", self.job)

    def stop(self) -> None:
        if not self.job or self.over():
            return
        self.lab.ask("scancel", self.job)
        until = time.monotonic() + 20
        while self.over() is None and time.monotonic() < until:
            time.sleep(0.2)


@contextmanager
def started(v: Visit, part: Part, name: str, config: RunConfig) -> Iterator[Started]:
    """The part's run, not started yet; ended with the context, and the lab with it."""
    recipe = v.recipe(name, config)
    if v.executor == "local":
        run: Started = LocalRun(recipe, v.work / f"{part.run}.log")
        try:
            yield run
        finally:
            run.stop()
        return
    lab = Lab(part.nodes, part.gpus, deal=not v.rehearse)
    try:
        lab.script("up")
        run = SlurmRun(lab, command_of(v, part, recipe, config))
        try:
            yield run
        finally:
            with suppress(RuntimeError, subprocess.TimeoutExpired):
                run.stop()
    finally:
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            lab.script("down")
        shutil.rmtree(lab.folder, ignore_errors=True)


def command_of(v: Visit, part: Part, recipe: Path, config: RunConfig) -> list[str]:
    """What queues a part's run: `submit`, or sbatch and the script, with what it asks for of nodes of this size."""
    if part.script is None:
        return [sys.executable, "-m", "fp8slurm.cli", "submit", "--recipe", str(recipe)]
    program = v.work / "fp8slurm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m fp8slurm.cli "$@"\n')
    program.chmod(0o755)
    s = config.slurm
    flags = {
        "gpus-per-node": part.gpus, "ntasks-per-node": s.ranks_per_node + 1, "cpus-per-task": s.cpus_per_task or 1,
        "output": v.work / f"{part.run}.log",
    }  # fmt: skip
    asked = [f"--{flag}={value}" for flag, value in flags.items()]
    return ["env", f"FP8SLURM={program}", "sbatch", "--parsable", *asked, part.script, "--recipe", str(recipe)]


# -- a part ----------------------------------------------------------------------------------------------------------


def newest_attempt(run: Path) -> int:
    """The newest attempt that keeps records, -1 without any."""
    return max((int(path.parent.name) for path in run.glob("attempts/*/metrics.jsonl")), default=-1)


def records_of(run: Path, attempt: int) -> list[dict[str, Any]]:
    """An attempt's RL records, those that it took over included: it has cut off what lies behind its checkpoint, which
    the run's metrics.jsonl still shows while it starts."""
    with suppress(ValueError, OSError):
        return [r for r in read_metrics(run / "attempts" / str(attempt) / "metrics.jsonl") if r["phase"] == "rl"]
    return []


def newest_saved(run: Path) -> int:
    """Step of the newest complete checkpoint, -1 without any."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_??????/COMPLETE")), default=-1)


def victim(run: Path, config: RunConfig, kind: str) -> int:
    """The process that a fault kills: rank 1 (or 0 of one), or the first engine of the first rollout worker.

    RuntimeError: it is not there; nothing but a run's own processes is ever named."""
    import psutil

    attempt = run / "attempts" / str(newest_attempt(run))
    tasks = place(config).tasks
    role = "worker" if kind == "engine" else "rank"
    index = [t.index for t in tasks if t.role == role][: 2 if role == "rank" else 1][-1]
    path = attempt / "tasks" / f"{index}.json"
    if not path.is_file():
        raise RuntimeError(f"{run}: task {index} has not begun")
    task = json.loads(path.read_text())
    if process_start(task["pid"]) != task["start"]:
        raise RuntimeError(f"{path}: process {task['pid']} is gone")
    if kind == "rank":
        return int(task["pid"])
    for child in psutil.Process(task["pid"]).children(recursive=True):
        with suppress(psutil.Error, ProcessLookupError):
            if child.cmdline()[-1:] == ["fp8slurm.engine.child"] and os.getpgid(child.pid) == child.pid:
                return int(child.pid)
    raise RuntimeError(f"the rollout worker {task['pid']} of {run} has no engine")


def used_gb() -> float | None:
    """GB in use on the fullest GPU; None without any."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return max((int(mib) * 2**20 / 1e9 for mib in said if mib.isdigit()), default=None)


def planned(config: RunConfig) -> dict[str, Any]:
    """What plan says of a run, in GB, beside what is measured."""
    plan = make_plan(config, GPU)
    (fit,) = plan.fits
    return {
        "fits": fit.fits,
        "phases_gb": {phase.name: round(phase.bytes / 1e9, 1) for phase in fit.phases},
        "fullest_gb": round(max((phase.bytes for phase in fit.phases), default=0) / 1e9, 1),
        "trainer_gb": round(trainer_bytes(plan) / 1e9, 1),
        "host_gb": round(sum(item.bytes for item in plan.host) / 1e9, 1),
        "update_gb": round(plan.traffic.payload / 1e9, 2),
    }


def trainer_bytes(plan: Plan) -> int:
    return max(stage.memory.state_bytes + stage.memory.working_bytes for stage in plan.stages)


def carry_out(v: Visit, name: str, deadline: float) -> bool:
    """One part, until it has shown what it is for or the deadline comes; whether it is over."""
    part = PARTS[name]
    config = v.config(part)
    run = v.work / "runs" / part.run
    note: dict[str, Any] = v.notes().get(name) or {
        "part": name, "rehearsal": v.rehearse, "executor": v.executor, "recipe": part.recipe,
        "ranks": place(config).world_size, "changed": changed(config, part.recipe), "plan": planned(config),
        "faults": [], "memory_gb": None, "records": [], "spent_s": 0.0,
    }  # fmt: skip
    note |= {"over": False, "why": None, "host": socket.gethostname(), "began": time.strftime("%Y-%m-%d %H:%M:%S")}
    since = time.monotonic() - note["spent_s"]
    note.setdefault("from_step", newest_saved(run))
    if waiting(note):
        note["faults"][-1]["seconds"] = "cut off"
    left = {step: kind for step, kind in part.faults.items() if step not in [f["after"] for f in note["faults"]]}
    try:
        if part.saved is not None and is_saved(run, part.saved) and not left:
            note["over"] = True  # the last call was cut off before it saw that
        else:
            with started(v, part, name, config) as job:
                follow(v, note, job, config, left, since, deadline - STOP_S)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        note["why"] = str(error)
    note["spent_s"] = round(time.monotonic() - since, 1)
    v.save(name, note)
    if not note["over"]:
        (v.out / f"{name}-logs.txt").write_text(ends_of_logs(v, part, run))
    elif part.saved == config.run.steps:
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # up to 170 GB, which the next model's folder may need
    return bool(note["over"])


def follow(
    v: Visit, note: dict[str, Any], job: Started, config: RunConfig, left: dict[int, str], since: float, until: float
) -> None:  # fmt: skip
    """Start a part's run, write down its steps as they come, let the faults happen that are `left`, until it is over.

    since: when it began, as if it had done so without a break; until: the call's end. Both by time.monotonic."""
    part = PARTS[note["part"]]
    run, spec = v.work / "runs" / part.run, ModelSpec.from_hf_dir(v.model(part))
    earlier = newest_attempt(run)
    seen: tuple[int, ...] = ()
    job.start()
    while time.monotonic() < until:
        time.sleep(0.5)
        ended = job.over()  # asked first: what a run has recorded before its end is seen below
        attempt = newest_attempt(run)
        records = records_of(run, attempt) if attempt > earlier else []
        step = max((r["step"] for r in records), default=note["from_step"])
        recover(note, attempt, step)
        note["memory_gb"] = max(filter(None, (note["memory_gb"], used_gb())), default=None)
        note["spent_s"] = round(time.monotonic() - since, 1)
        if (attempt, step, len(note["faults"])) != seen:
            seen = (attempt, step, len(note["faults"]))
            note["records"] = [with_flop(r, spec) for r in records if r["step"] > note["from_step"]]
            v.save(note["part"], note)
        due = [at for at in left if step >= at and records]
        if due and not waiting(note):
            strike(note, run, config, job, due[0], left.pop(due[0]), attempt, step)
            continue
        goal = step >= part.until and not left and not waiting(note) and is_saved(run, part.saved)
        if goal and (ended or step < config.run.steps):  # at its last step it ends by itself
            note["over"] = True
            return
        if ended and waiting(note) and v.executor == "local":
            job.start()  # the resume that a job's requeue is
        elif ended:
            note["why"] = f"the run ended before: {ended}"
            return
    note["why"] = "no time left: it goes on in the next call"


def with_flop(record: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    tokens = record.get("tokens")
    return record | ({"flop": model_flop(spec, tokens, record["rollout/response_length"])} if tokens else {})


def is_saved(run: Path, step: int | None) -> bool:
    return step is None or (run / "checkpoints" / f"step_{step:06}" / "COMPLETE").exists()


def waiting(note: dict[str, Any]) -> bool:
    """Whether the run is not yet past its last fault."""
    return bool(note["faults"]) and note["faults"][-1]["seconds"] is None


def strike(
    note: dict[str, Any], run: Path, config: RunConfig, job: Started, at: int, kind: str, attempt: int, step: int
) -> None:  # fmt: skip
    """A fault, now."""
    if kind == "requeue":
        job.requeue()
    else:
        os.kill(victim(run, config, kind), signal.SIGKILL)
    note["faults"].append(
        {"kind": kind, "after": at, "step": step, "attempt": attempt, "at": time.time(), "seconds": None}
    )  # fmt: skip


def recover(note: dict[str, Any], attempt: int, step: int) -> None:
    """Once the run is a step further than before a fault, the fault knows what it cost."""
    if not waiting(note):
        return
    fault = note["faults"][-1]
    if step > fault["step"] and (fault["kind"] == "engine" or attempt > fault["attempt"]):
        fault["seconds"] = round(time.time() - fault["at"], 1)


def ends_of_logs(v: Visit, part: Part, run: Path) -> str:
    """The last of what a run's processes said, for a part that did not come to its end."""
    files = [v.work / f"{part.run}.log", *sorted(run.glob("slurm/*.err")), *sorted(run.glob("slurm/*.out"))]
    for attempt in sorted(run.glob("attempts/[0-9]*"), key=lambda path: int(path.name))[-1:]:
        files += [*sorted((attempt / "errors").glob("*")), *sorted((attempt / "logs").glob("*"))]
    return "\n".join(f"== {p}\n{p.read_text(errors='replace')[-6000:]}" for p in files if p.is_file())[-400_000:]


# -- models, and parts in their order --------------------------------------------------------------------------------


def prepare(v: Visit, name: str) -> bool:
    """Models and data of later parts."""
    from fp8slurm.checkpoint import hf_to_fp8

    began = time.monotonic()
    make = [sys.executable, str(ROOT / "tools/make_tiny.py"), "--data", str(v.work / "data"), "--out"]
    kinds = [[str(v.work / "tiny")], [str(v.work / "tiny-moe"), "--moe"]]
    for kind in kinds:
        subprocess.run([*make, *kind], check=True, stdout=subprocess.DEVNULL)
    seconds: dict[str, float] = {}
    for model in MODELS[name] if not v.rehearse else ():
        shape, _, layers = model.rpartition("-")
        known = (shape, int(layers)) if layers.isdigit() else (model, None)
        at = time.monotonic()
        folder = write_model(v.work / model, known[0], v.work / "tiny", known[1])
        seconds[model] = round(time.monotonic() - at, 1)
        if not fp8_of(folder).exists():
            hf_to_fp8(folder, fp8_of(folder), verify=False)
        seconds[f"{model}-FP8"] = round(time.monotonic() - at - seconds[model], 1)
    v.save(name, {"part": name, "over": True, "seconds": seconds, "spent_s": round(time.monotonic() - began, 1)})
    return True


def run_parts(v: Visit, names: list[str], seconds: float) -> bool:
    """Those of the parts that are not over, in their order, as far as the time reaches; whether all are over."""
    deadline = time.monotonic() + seconds
    for name, note in v.notes().items():
        v.save(name, note)
    done = {name for name, note in v.notes().items() if note["over"]}
    for number, name in enumerate(n for n in names if n not in done):
        left = deadline - time.monotonic()
        needs = PARTS[name].needs_s if name in PARTS and not v.rehearse else 60.0
        if number and left < min(needs, seconds):
            print(f"{name} and what comes behind it: {left:.0f} s are left; call this again", flush=True)
            return False
        over = prepare(v, name) if name in MODELS else carry_out(v, name, time.monotonic() + min(left, PART_S))
        note = v.notes()[name]
        print(f"{name}: {'over' if over else note['why']}, {note['spent_s']:.0f} s", flush=True)
        if not over:
            return False
    return True


def show_plans(v: Visit, names: list[str]) -> bool:
    """What each part holds by plan and would be refused for; whether all fit and only a missing package is refused."""
    good = True
    for name in names:
        if name not in PARTS:
            continue
        part = PARTS[name]
        config = v.config(part)
        found = planned(config)
        phases = ", ".join(f"{phase} {gb:g}" for phase, gb in found["phases_gb"].items()) or "on the CPU"
        verdict = "fits" if found["fits"] else "DOES NOT FIT"
        print(f"{name}: GB a GPU: {phases}; host {found['host_gb']:g} a node: {verdict}")
        refusals = [r for r in preflight(config, dry_run=True) if isinstance(r, Refusal)]
        for refusal in refusals:
            print(f"  {refusal}")
        good = good and found["fits"] and all("transformer_engine: it is not installed" in r for r in refusals)
    return good


# -- the table -------------------------------------------------------------------------------------------------------


def model_flop(spec: ModelSpec, tokens: float, length: float) -> float:
    """FLOP of a training step's products over `tokens` in sequences of `length`, recomputation not counted: 6 for each
    weight that a token meets, and causal attention (Narayanan et al. 2021, appendix; half of each square)."""
    h, d = spec.hidden_size, spec.head_dim
    attention = 2 * h * d * (spec.num_heads + spec.num_kv_heads)
    ffn = spec.experts_per_token * spec.moe_ffn_hidden_size if spec.is_moe else spec.ffn_hidden_size
    router = h * spec.num_experts if spec.is_moe else 0
    weights = spec.num_layers * (attention + 3 * h * ffn + router) + spec.vocab_size * h
    return tokens * (6.0 * weights + 6.0 * spec.num_layers * spec.num_heads * d * length)


PUBLISHED: list[tuple[str, str, str, str]] = [
    ("30b-bf16", "TFLOP/s a GPU, training", "299, 16 H100 in BF16 (Megatron-Bridge)", "pre-training: full sequences, no recomputation of all layers; a network of cards"),
    ("30b", "TFLOP/s a GPU, training", "203 to 208, 16 H100 in FP8 (Megatron-Bridge)", "the same"),
    ("30b", "seconds a step", "87 in FP8, 95 in BF16, 8 nodes (NeMo-RL)", "the ratio of FP8 to BF16 at most; not the seconds: other batch, lengths, nodes"),
    ("30b", "seconds of an update", "2.90 to 4.00 in FP8 (NeMo-RL); 2.16 (miles, RDMA); 3.0 (slime)", "the bytes are the same; theirs cross a network or come from other GPUs"),
    ("30b-bf16", "seconds of an update", "0.74 to 1.00 in BF16 (NeMo-RL)", "the same"),
    ("4b", "seconds of an update", "0.21 to 0.34, 4B in BF16 (NeMo-RL)", "ours moves half of the bytes, within a GPU and over NVLink"),
    ("4b", "gap, KL (k3)", "1.4e-3, 9B (NeMo-RL)", "no: random weights have a gap far above a trained model's"),
    ("30b", "gap, KL (k3)", "2.4e-3, 35B-A3B (NeMo-RL)", "no: random weights, and routing replayed"),
    ("4b-split", "seconds a step", "-35 to -38% by asynchrony, 35B-A3B (verl); 1.26 times (NeMo-RL)", "the ratio to the part 4b, with its lengths"),
]  # fmt: skip
"""Part, figure, what others published, how far it can be compared."""
MEASURED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "seconds a step": lambda n: median(n, "time/step"),
    "of them generating": lambda n: median(n, "time/rollout"),
    "training": lambda n: median(n, "time/train"),
    "seconds of an update": lambda n: median(n, "time/sync"),
    "neither of them": lambda n: rest(n),
    "tokens a step": lambda n: median(n, "tokens"),
    "TFLOP/s a GPU, training": lambda n: tflops(n),
    "gap, mean": lambda n: median(n, "gap/mean_abs"),
    "gap, KL (k3)": lambda n: median(n, "gap/k3"),
    "gap without replay, mean": lambda n: median(n, "gap_no_replay/mean_abs", first=0),
    "GB of the fullest GPU; plan": lambda n: beside(n.get("memory_gb"), n["plan"]["fullest_gb"]),
    "GB of the trainer's tensors; plan": lambda n: beside(median(n, "memory/peak"), n["plan"]["trainer_gb"]),
}
"""Figure -> what a part's note says of it; of steps the median, without the first, which compiles."""


def median(note: dict[str, Any], key: str, first: int = 2) -> float | None:
    after = note["from_step"] if note["from_step"] > 0 else 0
    values = sorted(r[key] for r in note["records"] if r.get(key) is not None and r["step"] >= after + first)
    return values[len(values) // 2] if values else None


def rest(note: dict[str, Any]) -> float | None:
    parts = [median(note, f"time/{name}") for name in ("step", "rollout", "train", "sync")]
    return None if parts[0] is None else parts[0] - sum(part or 0.0 for part in parts[1:])


def tflops(note: dict[str, Any]) -> float | None:
    seconds, flop = median(note, "time/train"), median(note, "flop")
    return flop / seconds / note["ranks"] / 1e12 if seconds and flop else None


def beside(measured: float | None, plan: float) -> str | None:
    return None if measured is None else f"{measured:.1f}; {plan:.1f}"


def cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"


def table(notes: dict[str, dict[str, Any]], rehearsal: bool) -> str:
    """Markdown: figures by part, faults, and the published figures beside ours."""
    runs = {name: note for name, note in notes.items() if name in PARTS}
    what = "A REHEARSAL with tiny models on the CPU: no figure says anything about GPUs." if rehearsal else ""
    lines = [line for line in (what, "") if rehearsal]
    if runs:
        lines += ["| figure | " + " | ".join(runs) + " |", "|---|" + "---|" * len(runs)]
        for figure, of in MEASURED.items():
            lines.append(f"| {figure} | " + " | ".join(cell(of(note)) for note in runs.values()) + " |")
        over = [f"{'yes' if n['over'] else n['why'] or 'runs'}, {n['spent_s']:.0f} s" for n in runs.values()]
        lines.append("| over | " + " | ".join(over) + " |")
    rows = [(name, fault) for name, note in runs.items() for fault in note["faults"]]
    if rows:
        lines += ["", "| part | fault | after step | until the run was a step further |", "|---|---|---|---|"]
        for name, fault in rows:
            took = {None: "not yet", "cut off": "cut off"}.get(fault["seconds"]) or f"{fault['seconds']:.0f} s"
            lines.append(f"| {name} | {fault['kind']} | {fault['step']} | {took} |")
    lines += ["", "| part | figure | here | published | comparable? |", "|---|---|---|---|---|"]
    for part, figure, others, how in PUBLISHED:
        if part in runs:
            lines.append(f"| {part} | {figure} | {cell(MEASURED[figure](runs[part]))} | {others} | {how} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*VISITS, *MODELS, *PARTS], metavar="PART")
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=PART_S, help="of all of it")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm", help="local: parts of one node only")
    parser.add_argument("--plan", action="store_true", help="only say what would be held and refused")
    args = parser.parse_args()
    names = [name for given in args.parts for name in VISITS.get(given, (given,))]
    if args.executor == "local" and (wrong := [n for n in names if n in PARTS and PARTS[n].nodes > 1]):
        parser.error(f"--executor local with {', '.join(wrong)}: two nodes; allowed: slurm")
    os.environ |= MULTICAST_OFF
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), str(ROOT / "tools" / "gpu"), os.environ.get("PYTHONPATH")))
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the contexts, which end what was started
    v = Visit(args.work.resolve(), args.out.resolve(), args.rehearse, args.executor)
    good = show_plans(v, names) if args.plan else run_parts(v, names, args.seconds)
    sys.exit(not good)


if __name__ == "__main__":
    main()
