"""What a task does before it is a rank or a rollout worker."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fp8slurm.config import RunConfig
from fp8slurm.process import environment, monitor

IMPORTS = """
import os, sys, fp8slurm.slurm.task as task
from fp8slurm.process import environment
from fp8slurm.config import RunConfig
from fp8slurm.config.placement import place
"""
SET = """
c = RunConfig(slurm={slurm!r})
p = place(c)
try:
    environment.set_environment(c, p, p.tasks[0])
except ValueError as error:
    sys.exit(print(error))
import torch
print(os.environ["OMP_NUM_THREADS"], torch.get_num_threads())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that has imported what a task imports first."""
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    command = [sys.executable, "-c", IMPORTS + code]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environment)


def start(code: str, **environment: str) -> str:
    """What it says on standard output."""
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torch_is_not_imported_before_the_environment_is_set():
    """It counts OMP_NUM_THREADS when it is imported; later the variable does nothing."""
    assert start("print('torch' in sys.modules)") == "False"


BEGIN = """
from pathlib import Path
from fp8slurm.run.directory import RunDirectory
from fp8slurm.slurm import attempt
from fp8slurm.scheduler.job import Job
c, path = RunConfig(fp8={{"backend": "emulated"}}), Path({path!r})
attempt.settle_configuration(c, RunDirectory(path))  # as `submit` does
attempt.finished(c, RunDirectory(path))
attempt.begin(c, path, Job("1", 0, "0"))
print("torch" in sys.modules)
"""


def test_torch_is_not_imported_by_beginning_an_attempt(tmp_path: Path):
    """Task 0 does that before it sets its environment."""
    (tmp_path / "r").mkdir()
    assert start(BEGIN.format(path=str(tmp_path / "r"))) == "False"


def test_threads_of_a_rank():
    """More threads than cores are not looked for in torch: MKL caps them."""
    assert start(SET.format(slurm={"ranks_per_node": 4096})) == "1 1"
    assert start(SET.format(slurm={"cpu_threads": 3})).split()[0] == "3"
    assert start(SET.format(slurm={}), OMP_NUM_THREADS="3").split()[0] == "3"
    assert start(SET.format(slurm={"cpu_threads": 1}), OMP_NUM_THREADS="3") == "1 1", "the setting wins"


def test_slurm_has_dealt_the_cores_out_already(monkeypatch):
    """A task that is bound to its own cores sees no others: there is nothing left to share."""
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    here, job = ({"ranks_per_node": 8, "executor": executor} for executor in ("local", "slurm"))
    assert environment.threads_of_a_rank(RunConfig(slurm=job), 12) == 12
    assert environment.threads_of_a_rank(RunConfig(slurm=job), 96) == 12, "not bound: the whole node"
    assert environment.threads_of_a_rank(RunConfig(slurm=here), 96) == 12, (
        "a shell in an allocation: its number is not a rank's"
    )
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert environment.threads_of_a_rank(RunConfig(slurm=job), 96) == 12


def test_a_run_that_asks_for_no_gpu_sees_none():
    code = SET.format(slurm={}).replace("import torch", "print(repr(os.environ['CUDA_VISIBLE_DEVICES'])); import torch")
    assert start(code, CUDA_VISIBLE_DEVICES="0,1").splitlines()[0] == "''"


def test_a_contradicting_environment_is_refused():
    assert "NVTE_FP8_BLOCK_SCALING_FP32_SCALES=0" in start(SET.format(slurm={}), NVTE_FP8_BLOCK_SCALING_FP32_SCALES="0")


FAIL = """
from pathlib import Path
from fp8slurm.run.directory import RunDirectory
from fp8slurm.scheduler.job import Job
c = RunConfig(slurm={{"requeue": False}})
p = place(c)
run = RunDirectory(Path({path!r}), 0)
task.rank_main = lambda *_: 1 / 0
job = Job("1", 0, None) if {in_slurm} else None
task.be_task(c, run, p, p.tasks[0], job)
"""


@pytest.mark.parametrize(("newest", "in_slurm", "status"), [(0, True, 1), (1, True, 0), (1, False, 1)])
def test_a_failed_task_of_a_replaced_attempt_tells_srun_nothing(
    tmp_path: Path, newest: int, in_slurm: bool, status: int
) -> None:
    """srun would end the step by its number, and that is the next attempt's by then. Either way the error is on disk."""
    for attempt in range(newest + 1):
        (tmp_path / "attempts" / str(attempt) / "tasks").mkdir(parents=True)
        (tmp_path / "attempts" / str(attempt) / "errors").mkdir()
    done = run(FAIL.format(path=str(tmp_path), in_slurm=in_slurm), PATH="/nonexistent")
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (status, True), done.stderr
    assert "ZeroDivisionError" in (tmp_path / "attempts" / "0" / "errors" / "task_0.json").read_text()


ENDS = """
from pathlib import Path
import errno, json, numpy
from fp8slurm.core.errors import BadCheckpoint, InputError
from fp8slurm.run.directory import FencedError, RunDirectory
c = RunConfig()
p = place(c)
class Permanent(RuntimeError):
    permanent = True
def fails(error):
    def rank_main(*_):
        if isinstance(error, Exception):
            raise error
        error()
    return rank_main
errors = {{
    "json": lambda: json.loads(""),
    "text": lambda: b"\\xff".decode(),
    "lists": lambda: list(zip([1], [], strict=True)),
    "numpy": lambda: numpy.zeros(3).reshape(2, 2),
    "pydantic": lambda: RunConfig(run={{"steps": -1}}),
    "stale": OSError(errno.ESTALE, "Stale file handle", "/data/train.jsonl"),
    "torn": BadCheckpoint("model.safetensors: truncated"),
    "input": InputError("--data.train nowhere: there is no such path"),
    "fenced": FencedError("attempt 1 has begun"),
    "says": Permanent("stopped"),
}}
for name, error in errors.items():
    folder = Path({path!r}) / name
    for part in ("tasks", "errors"):
        (folder / "attempts" / "0" / part).mkdir(parents=True)
    task.rank_main = fails(error)
    if (child := os.fork()) == 0:
        task.be_task(c, RunDirectory(folder, 0), p, p.tasks[0], None)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1, name
"""


def test_what_is_permanent_and_what_is_shown(tmp_path: Path) -> None:
    """Errors of other libraries cost a requeue, though they are ValueErrors, and say where they come from."""
    done = run(ENDS.format(path=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    errors = {p.parts[-5]: json.loads(p.read_text()) for p in tmp_path.glob("*/attempts/0/errors/task_0.json")}
    assert {name for name, e in errors.items() if e["permanent"]} == {"input", "fenced", "says"}
    lines = {name: e["text"] for name, e in errors.items() if "Traceback" not in e["text"]}
    assert lines == {"torn": "model.safetensors: truncated", "input": "--data.train nowhere: there is no such path"}
    for name, frame, text in (
        ("json", "json/decoder.py", "Expecting value: line 1 column 1"),
        ("text", 'File "<string>"', "UnicodeDecodeError"),
        ("lists", 'File "<string>"', "zip() argument 2 is shorter"),
        ("numpy", 'File "<string>"', "cannot reshape array"),
        ("pydantic", "pydantic/main.py", "run.steps"),
        ("stale", "slurm/task.py", "/data/train.jsonl"),
    ):
        assert frame in errors[name]["text"] and text in errors[name]["text"], errors[name]["text"]


BEGINS = """
from pathlib import Path
import json
from fp8slurm.core.errors import InputError
from fp8slurm.scheduler.job import Job
from fp8slurm.slurm import attempt, worker
c, path = RunConfig(slurm={{"executor": "slurm"}}), Path({path!r})
attempt.settle_configuration = lambda *_: {raises}
try:
    worker.work(c.model_dump_json(), str(path))
except BaseException as error:
    print(type(error).__name__, error)
found = attempt.find(path, Job("7", 0, "0"))
print("begun" if found else "not begun")
"""


@pytest.mark.parametrize(
    ("raises", "ends", "begun", "permanent"),
    [
        ("json.loads('')", "JSONDecodeError Expecting value: line 1 column 1 (char 0)", "begun", False),
        ("(_ for _ in ()).throw(InputError('another run'))", "SystemExit 2", "not begun", True),
    ],
)
def test_an_attempt_that_fails_while_it_begins(
    tmp_path: Path, raises: str, ends: str, begun: str, permanent: bool
) -> None:
    """One that another attempt may mend is left as begun: only so the job script finds it, and requeues the job."""
    code = BEGINS.format(path=str(tmp_path), raises=raises)
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    assert start(code, PATH="/nonexistent", **job).splitlines() == [ends, begun]
    error = json.loads((tmp_path / "attempts" / "0" / "errors" / "task_0.json").read_text())
    assert error["permanent"] is permanent and ("json/decoder.py" in error["text"]) is not permanent


ENDED = """
import signal, time
from pathlib import Path
from fp8slurm.process import monitor
monitor.SILENT_S = {silent_s}
monitor.Monitor(Path({folder!r}), 3, 600.0).start()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize("silent_s, shown", [(0.1, True), (30.0, False)])
def test_a_task_that_is_ended_in_a_long_silence_says_where_it_stands(tmp_path: Path, silent_s: float, shown: bool):
    done = run(ENDED.format(silent_s=silent_s, folder=str(tmp_path)))
    assert "ended by SIGTERM" in done.stderr
    stacks = tmp_path / "stacks" / "task_3.txt"
    assert stacks.exists() == shown
    if shown:
        main, kernel = stacks.read_text().split("thread: name, state")
        assert 'File "<string>"' in main and len(kernel.splitlines()) >= 3


STUMBLES = """
import errno, time
from pathlib import Path
from fp8slurm.process import monitor
class Stumbling(monitor.Monitor):
    times = 0
    def _dead_neighbour(self):
        self.times += 1
        if {when}:
            raise {error}
m = Stumbling(Path({folder!r}), 3, {timeout_s})
m.start()
time.sleep(30)
"""


@pytest.mark.parametrize("when", ["self.times == 1", "True"])
def test_the_watchdog_survives_a_file_system_that_stumbles(tmp_path: Path, when: str) -> None:
    error = "OSError(errno.ESTALE, 'stale')"
    done = run(STUMBLES.format(folder=str(tmp_path), when=when, error=error, timeout_s=2))
    assert done.returncode == monitor.HUNG, done.stderr
    assert "no progress for watchdog.timeout_s = 2" in done.stderr
    assert done.stderr.count("watching goes on") == 1 and "stale" in done.stderr


def test_a_task_that_cannot_be_watched_ends(tmp_path: Path) -> None:
    done = run(STUMBLES.format(folder=str(tmp_path), when="True", error="KeyError('pid')", timeout_s=60))
    assert done.returncode == 1, done.stderr
    assert "watching it failed" in (tmp_path / "errors" / "task_3.json").read_text()


def test_a_neighbours_file_that_is_half_written_ends_no_task(tmp_path: Path) -> None:
    """A monitor looks twice a second; one that finds two torn files in a row goes on watching."""
    code = STUMBLES.format(folder=str(tmp_path), when="False", error="None", timeout_s=2).replace(
        "m.start()",
        """
(m.folder).mkdir()
(m.folder / "1.json").write_text('{"host": ')
m.start()
time.sleep(1.2)
(m.folder / "1.json").unlink()
""",
    )
    code = code.replace("        self.times += 1\n", "        super()._dead_neighbour()\n")
    done = run(code)
    assert done.returncode == monitor.HUNG, done.stderr
    assert done.stderr.count("watching goes on") == 1 and "1.json: not JSON" in done.stderr


def test_a_task_whose_launcher_is_gone_imports_nothing(tmp_path: Path) -> None:
    code = "from pathlib import Path; from fp8slurm.process import monitor; "
    code += f"monitor.Monitor(Path({str(tmp_path)!r}), 0, 60.0).start(); print('goes on')"
    done = run(code, FP8SLURM_LAUNCHER="1 0")
    assert (done.returncode, done.stdout) == (monitor.TERMINATED, ""), done.stderr
    assert "the process that started it (1) is gone" in done.stderr


def test_imports_do_not_count_against_the_watchdog(tmp_path: Path) -> None:
    """What a task imports before it can say that it makes progress may lie on a slow file system."""
    (tmp_path / "attempts" / "0").mkdir(parents=True)
    code = FAIL.format(path=str(tmp_path), in_slurm=False).replace("1 / 0", "time.sleep(1.5)")
    code = code.replace('{"requeue": False}', '{}, watchdog={"timeout_s": 1}')
    done = run("import time\n" + code, PATH="/nonexistent")
    assert done.returncode == 0, done.stderr


def test_a_task_ends_where_its_last_words_cannot_be_written(tmp_path: Path) -> None:
    done = run(
        ENDED.format(silent_s=30.0, folder=str(tmp_path)).replace(
            "time.sleep(0.3)", f"time.sleep(0.3); import shutil; shutil.rmtree({str(tmp_path)!r})"
        )
    )
    assert done.returncode == monitor.TERMINATED, done.stderr
