"""Where runs stand: from whole directories, damaged ones, and what Slurm says (stand-ins for its commands)."""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import process_start
from fp8slurm.report.status import main, overview
from fp8slurm.run.attempts import read_attempt
from fp8slurm.run.status import find_runs, statuses
from fp8slurm.scheduler.queue import parse_sacct, parse_squeue


class RunFolder:
    """Builds a run directory as a run leaves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def write(self, name: str, value: object) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def config(self, steps: int = 10) -> RunFolder:
        self.write("config.json", {"run": {"steps": steps}, "sft": {"max_steps": 4}})
        return self

    def records(self, last: int) -> RunFolder:
        rows = [{"phase": "sft", "step": s, "time/step": 9.0} for s in (1, 2, 3)]
        rows += [
            {
                "phase": "rl",
                "step": s,
                "reward/mean": s / 10,
                "time/step": 2.0,
                "time/checkpoint": 1.0,
                "throughput/tokens_per_s": 50.0,
                **({"eval/accuracy": 0.25} if s == 2 else {}),
            }
            for s in range(1, last + 1)
        ]
        self.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        return self

    def checkpoint(self, step: int) -> RunFolder:
        name = f"checkpoints/step_{step:06d}"
        self.write(f"{name}/data", "12345")
        self.write(f"{name}/COMPLETE", {"files": {"data": {"bytes": 5, "sha256": "-"}}})
        return self

    def attempt(self, number: int, **owner: object) -> RunFolder:
        self.write(f"attempts/{number}/begun", "")
        if owner:
            self.write(f"attempts/{number}/owner.json", owner)
        return self

    def error(self, attempt: int, task: int, text: str, primary: bool = True, at: float = 1.0) -> RunFolder:
        said = {"time": at, "task": task, "primary": primary, "text": text}
        self.write(f"attempts/{attempt}/errors/task_{task}.json", said)
        return self


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(name, shell lines): stand-ins for Slurm's commands; the others are not there."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def command(name: str, *lines: str) -> None:
        path = folder / name
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return command


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "a")


def one(run: RunFolder):
    return statuses([run.path])[0][0]


def test_figures_of_a_run_that_goes_on(run, slurm):
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    run.config().records(6).checkpoint(5).attempt(0).attempt(1, **me).error(0, 0, "an old one")
    s = one(run)
    assert (s.state, s.attempt, s.phase, s.step, s.total) == ("running", 1, "rl", 6, 10)
    assert (s.reward, s.accuracy, s.step_seconds, s.tokens_per_s, s.remaining_s) == (0.6, 0.25, 3.0, 50.0, 12.0)
    assert s.checkpoint == "step_000005" and 0 <= s.checkpoint_age_s < 600 and s.notes == ()
    assert (s.error, s.error_attempt) == ("task 0: an old one", 0)


@pytest.mark.parametrize(
    "owner, steps, error, state",
    [
        ({}, 4, False, "stopped"),
        ({}, 4, True, "failed"),
        ({}, 10, False, "finished"),
        ({"host": "elsewhere", "pid": 1, "start": "5"}, 4, False, "held"),
        ({"host": socket.gethostname(), "pid": os.getpid(), "start": "another time"}, 4, False, "stopped"),
    ],
)
def test_states_without_slurm(run, slurm, owner, steps, error, state):
    run.config().records(steps).checkpoint(steps).attempt(0, **owner)
    if error:
        run.error(0, 1, "broken")
    assert one(run).state == state


@pytest.mark.parametrize(
    "said, steps, state",
    [
        ("7|PENDING|Priority|0:00|30:00||N/A", 4, "pending"),
        ("7|RUNNING|None|5:00|30:00|node1|2026-11-23T20:00:00", 10, "running"),
        ("7|COMPLETED|None|5:00|30:00|node1|2026-11-23T20:00:00", 10, "finished"),
        ("7|NODE_FAIL|None|5:00|30:00|node1|2026-11-23T20:00:00", 4, "node_fail"),
        ("7|CANCELLED|None|5:00|30:00|node1|2026-11-23T20:00:00", 4, "cancelled"),
    ],
)
def test_states_of_slurm_jobs(run, slurm, said, steps, state):
    run.config().records(steps).checkpoint(steps).attempt(0, job="7", host="node1", pid=1, start="1")
    slurm("squeue", f'echo "{said}"')
    s = one(run)
    assert (s.state, s.job_id) == (state, "7") and s.job.limit == "30:00"


def test_a_job_that_was_only_queued_is_found(run, slurm):
    """Before its first start, and again after an attempt of an earlier job."""
    run.write("slurm/8_submitted.pkl", "")
    slurm("squeue", 'echo "8|PENDING|Resources|0:00|30:00||2026-11-24T01:00:00"')
    assert (one(run).state, one(run).job_id, one(run).attempt) == ("pending", "8", None)
    run.attempt(0, job="7", host="n", pid=1, start="1")
    assert (one(run).state, one(run).job_id) == ("pending", "8")


def test_a_resubmitted_job_is_followed(run, slurm):
    run.attempt(0, job="7", host="n", pid=1, start="1")
    said = {"why": "stopped as planned", "at": "step 4", "saved": True}
    run.write("attempts/0/stopped.json", said | {"next": "resubmitted as job 9", "resubmitted": "9"})
    slurm("squeue", 'echo "7|COMPLETED|None|5:00|30:00|n|N/A"; echo "9|PENDING|Dependency|0:00|30:00||N/A"')
    s = one(run)
    assert (s.state, s.job_id, s.stop) == ("pending", "9", "stopped as planned; saved at step 4; resubmitted as job 9")


def test_a_task_of_an_array_is_known_by_its_own_number(run, slurm):
    """squeue's %i and sacct's JobID say 25_2, the job's environment and with it the owner 27."""
    run.config().attempt(0, job="27", host="n", pid=1, start="1")
    said = "|RUNNING|None|0:10|30:00|n|N/A"
    slurm(
        "squeue",
        f'case "$*" in *%i*) echo "25_2{said}";; *) echo "27{said}"; echo "25|PENDING|x|0:00|30:00||N/A";; esac',
    )
    assert (one(run).state, one(run).job_id) == ("running", "27")
    slurm("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2", "exit 1")
    slurm("sacct", 'case "$*" in *JobIDRaw*) echo "JobIDRaw|State|NodeList"; echo "27|TIMEOUT|n";; esac')
    assert (one(run).state, one(run).job_id) == ("timeout", "27")


def test_jobs_that_squeue_has_forgotten_are_asked_of_sacct(run, slurm):
    run.config().attempt(0, job="7", host="n", pid=1, start="1")
    slurm("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2", "exit 1")
    slurm("sacct", "echo 'JobID|State|NodeList'; echo '7|CANCELLED by 1000|n'")
    (s,), problem = statuses([run.path])
    assert (s.state, s.job.reason, problem) == ("cancelled", "by 1000", "")


def test_a_slurm_that_does_not_answer_is_said_and_the_rest_is_shown(run, slurm, capsys):
    run.config().records(3).attempt(0, job="7", host="n", pid=1, start="1")
    slurm("squeue", "echo 'Unable to contact slurm controller' >&2", "exit 1")
    assert main([str(run.path)]) == 0
    shown = capsys.readouterr()
    assert "rl 3/10" in shown.out and "Unable to contact slurm controller" in shown.err and "sacct" in shown.err
    assert "state       unknown" in shown.out and "Slurm could not be asked" in shown.out
    assert main(["--json", str(run.path)]) == 0
    shown = capsys.readouterr()
    said = json.loads(shown.out)
    assert said["state"] == "unknown" and "Unable to contact" in said["problem"] and "Unable to contact" in shown.err
    run.checkpoint(10)
    assert one(run).state == "finished"
    assert one(RunFolder(run.path.parent / "without a job").attempt(0)).problem is None


def test_damaged_and_half_written_files(run, slurm, capsys):
    run.config().records(4).checkpoint(2).checkpoint(4).checkpoint(6).attempt(0).attempt(1)
    metrics = run.path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    torn, unfinished = '{"phase": "rl", "st\n[1]\n', '{"phase": "rl", "step": 5, "rew'
    metrics.write_text("".join(lines[:-2]) + torn + lines[-1] + unfinished)
    run.write("config.json", '{"run": {"steps"')
    run.write("attempts/1/owner.json", "")
    run.write("attempts/1/errors/task_0.json", "{")
    run.write("attempts/1/errors/task_1.json", {"text": "Traceback\nValueError: this one"})
    run.write("chain.json", "[]")
    (run.path / "checkpoints" / "step_000006" / "COMPLETE").unlink()
    (run.path / "checkpoints" / "step_000004" / "data").write_text("123")
    s = one(run)
    assert (s.state, s.phase, s.step, s.total, s.reward) == ("failed", "rl", 4, None, 0.4)
    assert s.checkpoint == "step_000002" and s.error.endswith("this one") and s.links == ()
    notes = "\n".join(s.notes)
    for part in (
        "config.json cannot be read", "attempts/1/owner.json", "errors/task_0.json", "chain.json is no JSON object",
        "2 of the last 8 lines", "step_000006: COMPLETE is missing", "step_000004: data has 3 bytes instead of 5",
    ):  # fmt: skip
        assert part in notes, notes
    assert main(["--root", str(run.path.parent)]) == 0
    assert "damaged files in a" in capsys.readouterr().out
    assert main([str(run.path)]) == 0
    assert "step_000004: data has 3 bytes" in capsys.readouterr().out


def test_the_first_cause_is_the_error_that_is_shown(run, slurm):
    run.attempt(0).error(0, 0, "a consequence", primary=False, at=1.0)
    run.error(0, 2, "the cause", at=2.0).error(0, 1, "later", at=3.0)
    assert one(run).error == "task 2: the cause"
    run.write("attempts/0/errors/verdict.json", {"text": "task 1 on node2: Killed"})
    assert one(run).error == "task 1 on node2: Killed"


@pytest.mark.parametrize(
    "verdict, stop",
    [
        (None, "ended by Slurm"),
        ({"text": "task 2: ended by SIGTERM"}, "ended by Slurm"),  # as earlier versions left it
        ({"text": "ended by Slurm (job requeue)", "primary": False}, "ended by Slurm (job requeue)"),
    ],
)
def test_what_slurm_ended_has_no_error(run, slurm, capsys, verdict, stop):
    """A requeue or a scancel is nobody's fault: the last error is the one before it, if there is any."""
    run.attempt(0).error(0, 0, "broken").attempt(1, job="7", host="n", pid=1, start="1")
    run.error(1, 2, "ended by SIGTERM", primary=False, at=1.0)
    run.error(1, 0, "task 2 (process 5) ended; this task ends with it", primary=False, at=2.0)
    if verdict:
        run.write("attempts/1/errors/verdict.json", verdict)
    slurm("squeue", 'echo "7|PENDING|BeginTime|0:00|30:00||N/A"')
    s = one(run)
    assert (s.state, s.stop, s.error, s.error_attempt) == ("pending", stop, "task 0: broken", 0)
    assert main([str(run.path)]) == 0 and main(["--root", str(run.path.parent)]) == 0
    shown = capsys.readouterr().out
    assert "SIGTERM" not in shown and "earlier: task 0: broken" in shown and "earlier error" in shown
    assert read_attempt(run.path, 1, True, [], job_over=True).state == "stopped"


def test_a_real_error_is_not_put_down_to_slurm(run, slurm):
    """Where a task failed first, the rest are ended for it."""
    run.attempt(0, job="7", host="n", pid=1, start="1").error(0, 1, "CUDA error", at=1.0)
    run.error(0, 0, "ended by SIGTERM", primary=False, at=2.0)
    assert (one(run).error, one(run).stop) == ("task 1: CUDA error", None)


def test_an_interrupted_run_of_this_machine_has_stopped(run, slurm):
    run.config().attempt(0).error(0, 0, "ended by SIGTERM", primary=False)
    assert (one(run).state, one(run).stop, one(run).error) == ("stopped", "ended by a signal", None)


def test_only_the_end_of_long_metrics_is_read(run, slurm):
    run.config(steps=100_000)
    row = json.dumps({"phase": "rl", "step": 0, "padding": "x" * 500})
    run.write("metrics.jsonl", "".join(row.replace('"step": 0', f'"step": {s}') + "\n" for s in range(5000)))
    s = one(run)
    assert s.step == 4999 and s.notes == ()


def test_tables_json_and_unknown_runs(run, slurm, capsys):
    run.config().records(3).checkpoint(2).attempt(0).error(0, 1, "Traceback\n  File x\nKeyError: 'no such answer'")
    RunFolder(run.path.parent / "b")
    (run.path.parent / "results.json").write_text("{}")
    RunFolder(run.path.parent / "c").config()
    assert [p.name for p in find_runs(run.path.parent)] == ["a", "c"]
    root = ["--root", str(run.path.parent)]
    assert main(root) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split()[:4] == ["run", "state", "job", "attempt"] and len(rows) == 3
    assert "rl 3/10" in rows[1] and "step_000002" in rows[1] and "task 1: KeyError: 'no such answer'" in rows[1]
    assert rows[2].split() == ["c", "new"]
    assert main([*root, "--json"]) == 0
    assert [x["name"] for x in json.loads(capsys.readouterr().out)] == ["a", "c"]
    assert main([*root, "--json", "a"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "step_000002"
    with pytest.raises(ValueError, match="nothing.*there: a, c"):
        main([*root, "nothing"])


def test_nothing_is_written_and_a_command_starts_quickly(run, slurm):
    """torch and the like are not loaded for a look at a run."""
    run.config().records(3).checkpoint(2).attempt(0)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*"))
    code = (
        "import sys; from fp8slurm.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'sglang', 'megatron', 'transformers'} & sys.modules.keys(); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "status", str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted((str(p), p.stat().st_mtime_ns) for p in run.path.rglob("*")) == before


def test_a_run_that_is_being_written(run, slurm):
    """Readings while another process appends, renames and removes: never an exception, steps never go back."""
    run.config(steps=10_000).attempt(0)
    code = (
        "import json, os, pathlib, shutil, sys, time\n"
        "run = pathlib.Path(sys.argv[1]); f = open(run / 'metrics.jsonl', 'a'); end = time.monotonic() + 3; s = 0\n"
        "while time.monotonic() < end:\n"
        "    s += 1; line = json.dumps({'phase': 'rl', 'step': s, 'reward/mean': 0.5}) + '\\n'\n"
        "    f.write(line[:9]); f.flush(); f.write(line[9:]); f.flush()\n"
        "    c = run / 'checkpoints' / f'step_{s:06d}'; tmp = c.with_name(c.name + '.0.tmp'); tmp.mkdir(parents=True)\n"
        "    (tmp / 'data').write_text('1')\n"
        "    (tmp / 'COMPLETE').write_text(json.dumps({'files': {'data': {'bytes': 1}}}))\n"
        "    os.rename(tmp, c); shutil.rmtree(run / 'checkpoints' / f'step_{s - 2:06d}', ignore_errors=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(run.path)])
    seen = []
    while writer.poll() is None:
        seen.append(one(run).step or 0)
        time.sleep(0.01)
    assert writer.returncode == 0 and seen == sorted(seen) and one(run).step >= seen[-1] > 0


def test_what_slurm_prints():
    job = parse_squeue("12|RUNNING|None|1-00:00:01|2-00:00:00|n[1-2]|2026-11-23T20:00:00\ngarbage\n")["12"]
    assert (job.active, job.reason, job.elapsed, job.nodes) == (True, "", "1-00:00:01", "n[1-2]")
    header = "JobID|State|Elapsed|Timelimit|NodeList|Start"
    jobs = parse_sacct(f"{header}\n3|TIMEOUT|1:00|1:00|None assigned|Unknown\n4||||\n")
    assert list(jobs) == ["3"] and (jobs["3"].active, jobs["3"].nodes, jobs["3"].start) == (False, "", "")
    assert parse_sacct("") == {}


def test_a_models_folder_is_no_run(tmp_path):
    from fp8slurm.run.reader import read_run

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"run": {"name": "run"}}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"run": ')
    assert [p.name for p in find_runs(tmp_path)] == ["run", "torn"]
    assert read_run(tmp_path / "run").name == "run"
    with pytest.raises(ValueError, match="model is no run directory"):
        read_run(tmp_path / "model")


def starting(run: RunFolder) -> RunFolder:
    """A job that is starting, on a node whose GPUs say what they do."""
    run.config(steps=2000).attempt(0, job="7", host="n", pid=1, start="1")
    run.write("attempts/0/phases/task_0.json", {"phase": "loading ranks", "since": time.time() - 42})
    gpus = [{"use": u, "used": m, "total": 81920} for u, m in ((62, 40960), (97, 61440))]
    run.write("attempts/0/gpus/0.json", {"time": time.time(), "host": "node1", "gpus": gpus})
    return run


def test_a_start_says_what_it_does(run, slurm, capsys):
    slurm("squeue", 'echo "7|RUNNING|None|0:50|30:00|node1|N/A"')
    assert main([str(starting(run).path)]) == 0 and main(["--root", str(run.path.parent)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("loading ranks 0:4") == 2
    assert "node1: 2, busy 62 to 97%, memory at most 60 of 80 GiB (0:0" in shown
    run.write("attempts/0/phases/task_0.json", {"phase": "training", "since": time.time()})
    assert one(run).doing is None
    slurm("squeue", 'echo "7|TIMEOUT|None|0:50|30:00|node1|N/A"')
    assert one(run).gpus == (), "what the GPUs did in a job that is over says nothing"


def test_a_waiting_job_says_when_slurm_expects_it_to_start(run, slurm, capsys):
    run.config().write("slurm/8_submitted.pkl", "")
    slurm("squeue", 'echo "8|PENDING|Resources|0:00|30:00||2037-11-24T01:00:00"')
    assert main([str(run.path)]) == 0 and main(["--root", str(run.path.parent)]) == 0
    assert capsys.readouterr().out.count("start expected 2037-11-24 01:00") == 2


def test_a_run_in_trouble_says_so_and_where_its_time_goes(run, slurm, capsys):
    me = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    run.config().attempt(0, **me)
    row = {"phase": "rl", "rollout/truncated": 0.5, "time/step": 4.0, "time/rollout": 3.0, "time/train": 0.8}
    run.write("metrics.jsonl", "".join(json.dumps(row | {"step": s}) + "\n" for s in range(1, 6)))
    s = one(run)
    assert list(s.waits.items()) == [("rollout", 0.75), ("train", pytest.approx(0.2)), ("other", pytest.approx(0.05))]
    assert len(s.alerts) == 1 and "50% of the last samples" in s.alerts[0]
    assert main([str(run.path)]) == 0 and main(["--root", str(run.path.parent)]) == 0
    shown = capsys.readouterr().out
    assert "rollout 75%, train 20%, other 5%" in shown and shown.count("truncation: 50%") == 2


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_tables_fit_the_terminal(run, slurm, width):
    """A narrow one does without columns; run, state and step are always there, and no line is wrapped."""
    slurm("squeue", 'echo "7|RUNNING|None|0:50|30:00|node1|N/A"')
    starting(run)
    other = RunFolder(run.path.parent / "qwen3-4b-fp8-long-name").config(steps=2000).records(1999).checkpoint(1990)
    other.attempt(12).error(12, 1, "Traceback\n  File x\nRuntimeError: " + "a long reason " * 20)
    console = Console(file=io.StringIO(), width=width)
    for part in overview(statuses(find_runs(run.path.parent))[0], run.path.parent, console):
        console.print(part)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= width, lines
    assert "loading ranks" in lines[1] and "rl 1999/2000" in lines[2] and "qwen3-4b-fp8-long-name" in lines[2]
    assert ("attempt" in lines[0]) == (width == 200) and "task 1: RuntimeError" in lines[2]


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--watch"], "draws on a terminal"),
        (["--watch", "0.5"], "at least 2 seconds"),
        (["--watch", "nan"], "at least 2 seconds"),
        (["--follow"], "which run"),
    ],
)
def test_what_cannot_be_watched_is_refused(run, slurm, flags, told):
    run.config()
    with pytest.raises(InputError, match=told):
        main(["--root", str(run.path.parent), *flags])


WRITER = """
import json, sys, time
from pathlib import Path
from fp8slurm.run.directory import RunDirectory
from fp8slurm.run.phases import FIRST_UPDATE, enter_phase, keep_phases
run, steps = RunDirectory(Path(sys.argv[1])), int(sys.argv[2])
run.acquire()
keep_phases(run.attempt_dir, 0)
enter_phase(FIRST_UPDATE)
print("begun", flush=True)
sys.stdin.readline()
with open(run.path / "metrics.jsonl", "a") as f:
    for step in range(1, steps + 1):
        f.write(json.dumps({"phase": "rl", "step": step, "reward/mean": 0.5, "time/step": 1.0}) + "\\n")
if steps == 3:
    folder = run.checkpoints / "step_000003"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").write_text('{"files": {}}')
time.sleep(1)
"""


@pytest.mark.parametrize("made, status", [(3, 0), (2, 1)])
def test_a_run_that_somebody_started_is_followed_to_its_end(run, slurm, capfd, monkeypatch, made, status):
    monkeypatch.setattr("fp8slurm.report.live.ASK_S", 0.2)
    run.config(steps=3)
    command = [sys.executable, "-c", WRITER, str(run.path), str(made)]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "begun\n"
    threading.Timer(1.5, lambda: (writer.stdin.write("\n"), writer.stdin.flush(), writer.wait())).start()
    assert main([str(run.path), "--follow"]) == status
    said = capfd.readouterr()
    assert "first update of the engines" in said.out and f"rl {made}/3  reward 0.500" in said.out
    assert "a: running" in said.err and said.err.strip().endswith("a: finished" if status == 0 else "a: stopped")
