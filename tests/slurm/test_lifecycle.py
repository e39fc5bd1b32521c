"""Attempts inside a job, notices and deadlines, and what follows the end of the tasks; Slurm's commands are faked here."""

import errno
import json
import shutil
import time
from pathlib import Path

import pytest
from tiny import write_model

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config import RunConfig
from fp8slurm.core.deadlines import REQUEUE_S
from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.files import write_atomic
from fp8slurm.run.directory import FencedError, RunBusyError, RunDirectory
from fp8slurm.run.status import statuses
from fp8slurm.run.task_errors import STOPPED, first_error, record_error
from fp8slurm.scheduler import job
from fp8slurm.scheduler.job import Job, SlurmError
from fp8slurm.slurm import attempt, bad_nodes, requeue, worker
from fp8slurm.slurm import epilogue as after
from fp8slurm.slurm.launch import open_run
from fp8slurm.slurm.lifecycle import JobLifecycle, StoppedForGood


@pytest.fixture
def config(tmp_path):
    return RunConfig(run={"root": tmp_path, "name": "r"})


@pytest.fixture
def slurm(monkeypatch):
    """A controller: `requeued` are the jobs it was asked to requeue, `refuses` its answer if it will not."""

    class Controller:
        requeued: list[str] = []
        refuses: str | None = None
        state = "RUNNING"
        end: float | None = None

        def requeue(self, id: str) -> None:
            if self.refuses:
                raise SlurmError(self.refuses)
            self.requeued.append(id)

    c = Controller()
    c.requeued = []
    monkeypatch.setattr(job, "requeue", c.requeue)
    monkeypatch.setattr(job, "show_job", lambda id: {"JobState": c.state, "StdErr": str(getattr(c, "log", ""))})
    monkeypatch.setattr(job, "end_time", lambda id: c.end)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setattr(after, "LINGER_S", 0)
    return c


def begin(config: RunConfig, restart: int = 0, id: str = "7") -> RunDirectory:
    return attempt.begin(config, config.run.root / "r", Job(id, restart, "0"))


def checkpoint(run: RunDirectory, step: int) -> None:
    folder = run.checkpoints / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()


# -- attempts --------------------------------------------------------------------------------------------------------


def test_one_task_begins_and_the_others_find_it(config, slurm):
    path = config.run.root / "r"
    with pytest.raises(TimeoutError, match="job 7"):
        attempt.join(path, Job("7", 0, "0"), timeout_s=0)
    run = begin(config)
    assert attempt.join(path, Job("7", 0, "0"), timeout_s=0).attempt == run.attempt == 0
    for other in (Job("7", 1, "0"), Job("8", 0, "0"), Job("7", 0, "1")):  # a restart, another job, a second srun
        assert attempt.find(path, other) is None
    assert begin(config, restart=1).attempt == 1
    owner = json.loads((run.attempts / "1" / "owner.json").read_text())
    assert (owner["job"], owner["restart"], owner["checkpoint"]) == ("7", 1, "")
    assert json.loads((run.path / "config.json").read_text())["run"]["name"] == "r"


def test_another_spelling_of_a_path_is_the_same_model(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDirectory(tmp_path / "r")
    checkpoint(run, 1)

    def settled(path) -> list[str]:
        model = config.model.model_copy(update={"hf_checkpoint": path})
        return attempt.settle_configuration(config.model_copy(update={"model": model}), run)

    assert settled(Path("models/m")) == settled(tmp_path / "models" / "m") == settled(Path("models/../models/m")) == []
    with pytest.raises(ValueError, match="belongs to another run .model.hf_checkpoint"):
        settled(Path("m"))


def test_a_data_file_with_other_content_is_another_runs(config, tmp_path):
    """A checkpoint's cursor counts rows of the file that was there: another file would be read from its middle on."""
    run, data = RunDirectory(tmp_path / "r"), tmp_path / "train.jsonl"
    run.path.mkdir()
    data.write_text("one row\n")

    def settled(on_changed_file: str = "error", path: Path = data) -> list[str]:
        section = config.data.model_copy(update={"train": path, "on_changed_file": on_changed_file})
        return attempt.settle_configuration(config.model_copy(update={"data": section}), run)

    settled()
    data.write_text("another\n")
    assert settled() == ["data.train: other content (8 bytes, 8 at the last start)"], (
        "without a checkpoint nothing binds"
    )
    checkpoint(run, 1)
    assert settled() == []
    shutil.copy(data, tmp_path / "copy.jsonl")
    data.write_text("a longer row\n")
    with pytest.raises(
        ValueError, match="data.train: other content .13 bytes, 8 at the last start.*--data.on-changed-file"
    ):
        settled()
    assert settled("warn") == [
        "data.on_changed_file: 'error' -> 'warn'", "data.train: other content (13 bytes, 8 at the last start)",
    ]  # fmt: skip
    data.unlink()
    assert settled("warn") == [], "a file that is away is somebody else's to miss"
    assert "data.train" in json.loads((run.path / "data.json").read_text()), "and keeps its sum until it is back"
    (run.path / "data.json").unlink()
    data.write_text("of a run that kept no sums\n")
    assert settled("warn") == []


def test_sources_are_the_runs_and_a_version_without_them_had_none(config, tmp_path):
    """A cursor counts prompts of the files and weights that were there; rewards and labels may change, as elsewhere."""
    run, train = RunDirectory(tmp_path / "r"), tmp_path / "train.jsonl"
    run.path.mkdir()
    train.write_text("one row\n")

    def settled(**sources) -> list[str]:
        values = config.model_dump() | {"data": {"sources": {n: {"file": train} | s for n, s in sources.items()}}}
        return attempt.settle_configuration(RunConfig.model_validate(values), run)

    settled()
    saved = json.loads((run.path / "config.json").read_text())
    for section, key in (("data", "sources"), ("sft", "prompt_key"), ("reward", "workers"), ("reward", "concurrency")):
        del saved[section][key]
    (run.path / "config.json").write_text(json.dumps(saved))
    checkpoint(run, 1)
    assert settled() == [], "settings that it did not have are not changed"
    for folder in ("checkpoints",):
        shutil.rmtree(run.path / folder)
    settled(a={}, b={"weight": 2})
    checkpoint(run, 1)
    assert len(settled(a={"reward": "numeric"}, b={"weight": 2, "label_key": "x"})) == 1
    other = tmp_path / "other.jsonl"
    for changed in (
        {"a": {}, "b": {"weight": 3}},
        {"b": {"weight": 2}, "a": {}},
        {"a": {"file": other}, "b": {"weight": 2}},
    ):
        with pytest.raises(ValueError, match="belongs to another run .data.sources"):
            settled(**changed)
    train.write_text("another\n")
    with pytest.raises(ValueError, match="data.sources a: other content"):
        settled(a={}, b={"weight": 2})


def test_the_questions_of_a_further_task_are_bound_too(config, tmp_path):
    """Their accuracy is one curve: other questions in the middle of it would be a jump that no weight made."""
    run, questions = RunDirectory(tmp_path / "r"), tmp_path / "more.jsonl"
    run.path.mkdir()
    questions.write_text("one row\n")
    asked = config.model_copy(update={"eval": config.eval.model_copy(update={"tasks": [str(questions)]})})
    attempt.settle_configuration(asked, run)
    checkpoint(run, 1)
    questions.write_text("another\n")
    with pytest.raises(ValueError, match="eval.tasks more: other content"):
        attempt.settle_configuration(asked, run)


def test_a_rollout_checkpoint_of_another_precision_is_another_run(config, tmp_path):
    run = RunDirectory(tmp_path / "r")
    run.path.mkdir()
    (bf16 := tmp_path / "bf16").mkdir()
    write_model(bf16)
    hf_to_fp8(bf16, tmp_path / "fp8")
    shutil.copytree(tmp_path / "fp8", tmp_path / "moved")

    def settled(path: Path | None) -> list[str]:
        model = config.model.model_copy(update={"hf_checkpoint": Path("m"), "rollout_checkpoint": path})
        fp8 = config.fp8.model_copy(update={"backend": "emulated"})
        return attempt.settle_configuration(config.model_copy(update={"model": model, "fp8": fp8}), run)

    settled(tmp_path / "bf16")
    assert len(settled(tmp_path / "fp8")) == 1, "without a checkpoint nothing binds"
    checkpoint(run, 1)
    assert len(settled(tmp_path / "moved")) == 1
    assert len(settled(None)) == 1, "made from the model it is in FP8, too"
    with pytest.raises(ValueError, match="belongs to another run .model.rollout_checkpoint"):
        settled(tmp_path / "bf16")


def test_another_job_is_refused_while_the_first_is_active(config, slurm):
    begin(config)
    with pytest.raises(RunBusyError, match="job 7"):
        _as_job("8", begin, config, 0, "8")
    slurm.state = "FAILED"
    assert _as_job("8", begin, config, 0, "8").attempt == 1


def _as_job(id: str, call, *arguments):
    import os

    before, os.environ["SLURM_JOB_ID"] = os.environ["SLURM_JOB_ID"], id
    try:
        return call(*arguments)
    finally:
        os.environ["SLURM_JOB_ID"] = before


def test_attempts_without_a_new_checkpoint_are_counted_and_limited(config, slurm):
    for restart in range(3):
        run = begin(config, restart)
        record_error(_errors(run), 0, f"reason {restart}")
    with pytest.raises(ValueError, match="3 attempts in a row without a new checkpoint.*reason 2"):
        begin(config, 3)
    checkpoint(run, 2)
    assert begin(config, 3).attempt == 3
    assert attempt.without_progress(run, Job("7", 3, None)) == 1
    assert attempt.without_progress(run, Job("9", 0, None)) == 0, "a new job begins to count anew"


def _shown(run: RunDirectory):
    """What `fp8slurm status` says of the run."""
    return statuses([run.path])[0][0]


def test_a_run_that_ends_before_its_next_attempt_says_why_in_its_folder(config, slurm, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    for restart in range(3):
        run = begin(config, restart)
        said = {
            "why": "stopped as planned",
            "at": "sft_000000",
            "saved": False,
            "time": time.time() + 50,
            "next": "requeued",
            "why_not": "",
        }
        (run.attempt_dir / "stopped.json").write_text(json.dumps(said))
    texts = []
    for _ in range(2):  # a job that somebody requeues once more
        with pytest.raises(attempt.NoProgressError) as error:
            begin(config, 3)
        texts.append(str(error.value))
    assert (
        "Attempt 2: it stopped as planned at sft_000000 50 s after its start; --slurm.time" in texts[0]
        and "killed" not in texts[0]
    )
    assert texts[0] == texts[1] == _shown(run).error
    assert _shown(run).error_attempt == 2 and _shown(run).stop.endswith("too many attempts without a new checkpoint")


def test_an_attempt_that_is_refused_before_it_begins_says_why(config, slurm, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    run = begin(config)
    checkpoint(run, 1)
    with pytest.raises(ValueError, match="belongs to another run"):
        begin(config.model_copy(update={"data": config.data.model_copy(update={"shuffle": False})}), 1)
    assert _shown(run).error_attempt == 1 and "belongs to another run" in _shown(run).error


@pytest.mark.parametrize("began", [True, False])
def test_a_task_that_refuses_its_job_ends_the_run_with_its_reason(config, slurm, monkeypatch, capsys, began):
    """As where srun deals the tasks in another order: nothing that another attempt would mend."""
    two = config.model_copy(update={"slurm": config.slurm.model_copy(update={"nodes": 2})})
    for name, value in {"PROCID": "1", "NTASKS": "4", "NODEID": "1", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(worker, "RECORD_TIMEOUT_S", 0.0)
    run = begin(two) if began else RunDirectory(config.run.root / "r")
    with pytest.raises(SystemExit) as end:
        worker.work(two.model_dump_json(), str(run.path))
    said = capsys.readouterr().err
    assert (
        end.value.code == 2 and "task 1 is on node 1 instead of 0" in said.splitlines()[0] and "Traceback" not in said
    )
    monkeypatch.delenv("SLURM_STEP_ID")
    assert after.after(2, run.path) == 2 and slurm.requeued == []
    if began:
        assert (
            "task 1: task 1 is on node 1 instead of 0" in (said := capsys.readouterr().err) and "the run ends" in said
        )


def test_a_resubmitted_job_goes_on_counting(config, slurm):
    run = begin(config)
    (run.attempt_dir / "stopped.json").write_text('{"resubmitted": "8"}')
    slurm.state = "COMPLETED"
    again = _as_job("8", begin, config, 0, "8")
    assert attempt.without_progress(again, Job("8", 0, None)) == 2


def _errors(run: RunDirectory):
    (run.attempt_dir / "errors").mkdir(exist_ok=True)
    return run.attempt_dir / "errors"


def test_settings_that_a_run_must_keep(config, slurm):
    run = begin(config)
    checkpoint(run, 1)
    other = config.model_copy(update={"data": config.data.model_copy(update={"shuffle": False})})
    with pytest.raises(ValueError, match="data.shuffle: True -> False"):
        begin(other, 1)
    faster = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 2e-6})})
    assert attempt.settle_configuration(faster, run) == ["optim.lr: 1e-06 -> 2e-06"]


# -- notice and deadline ---------------------------------------------------------------------------------------------


def test_a_notice_stops_the_run_at_the_next_border_and_requeues_once(config, slurm):
    run = begin(config)
    rank = JobLifecycle(config, run, Job("7", 0, "0"), first=True)
    assert not rank.noticed() and rank.at_step_boundary(False, 10, 10) == "" and rank.in_rollout(10) == ""
    slurm.end = time.time() + 1000
    rank.notice()
    assert rank.noticed() and rank.at_step_boundary(True, 10, 10) and rank.in_rollout(10) == ""
    rank.stopped("step_000004", True)
    rank.stopped("step_000004", True)
    rank.tick()
    assert slurm.requeued == ["7"]
    said = json.loads((run.attempt_dir / "stopped.json").read_text())
    assert said["saved"] and said["next"] == "requeued" and said["at"] == "step_000004"


def test_a_notice_counts_while_slurm_does_not_answer(config, slurm, monkeypatch):
    """scontrol may take half a minute, and a step less."""
    rank, noticed = JobLifecycle(config, begin(config), Job("7", 0, "0"), first=True), []
    monkeypatch.setattr(job, "end_time", lambda id: noticed.append(rank.noticed()))
    rank.notice()
    assert noticed == [True]


def test_the_jobs_own_clock_stops_it_in_time_to_save(config, slurm):
    slurm.end = time.time() + 100
    rank = JobLifecycle(config, begin(config), Job("7", 0, "0"), first=True)
    assert rank.at_step_boundary(False, 10, 10) == ""
    assert "a step and a save may take" in rank.at_step_boundary(False, 60, 20)
    slurm.end = time.time() + 1000
    assert rank.at_step_boundary(False, 60, 20) == "", "the limit was extended meanwhile"


def test_a_step_is_given_up_when_only_the_save_fits(config, slurm):
    rank = JobLifecycle(config, begin(config), Job("7", 0, "0"), first=True)
    slurm.end = time.time() + 60
    rank.notice()
    assert rank.in_rollout(5) == "" and "too few" in rank.in_rollout(40)


def test_the_last_moment_requeues_without_a_save(config, slurm):
    run = begin(config)
    slurm.end = time.time() + REQUEUE_S / 2
    other = JobLifecycle(config, run, Job("7", 0, "0"), first=False)
    other.tick()
    assert slurm.requeued == []
    JobLifecycle(config, run, Job("7", 0, "0"), first=True).tick()
    assert slurm.requeued == ["7"] and not json.loads((run.attempt_dir / "stopped.json").read_text())["saved"]


def test_an_old_attempt_does_not_requeue(config, slurm):
    old = begin(config)
    rank = JobLifecycle(config, old, Job("7", 0, "0"), first=True)
    begin(config, 1)
    with pytest.raises(FencedError):
        rank.stopped("step_000004", True)
    assert slurm.requeued == []


def test_where_requeue_is_disabled_the_job_is_submitted_again(config, slurm, monkeypatch):
    run = begin(config)
    commands = []
    monkeypatch.setattr(job, "ask", lambda *command, **_: commands.append(command) or "99\n")
    (run.path / "slurm").mkdir()
    (run.path / "slurm" / "7_submitted.pkl").write_text("call")
    slurm.refuses = "Requested operation is presently disabled"
    JobLifecycle(config, run, Job("7", 0, "0"), first=True).stopped("step_000004", True)
    said = json.loads((run.attempt_dir / "stopped.json").read_text())
    assert said["resubmitted"] == "99" and "presently disabled" in said["why_not"]
    assert commands[1][:3] == ("sbatch", "--parsable", "--dependency=afterany:7")
    assert (run.path / "slurm" / "99_submitted.pkl").read_text() == "call"


def test_the_jobs_of_a_chain_wait_for_the_resubmitted_one(config, slurm, monkeypatch):
    run, commands = begin(config), []
    links = [{"job_id": "7", "after": []}, {"job_id": "8", "after": ["7"]}]
    (run.path / "chain.json").write_text(json.dumps({"links": links}))
    monkeypatch.setattr(job, "ask", lambda *command, **_: commands.append(command) or "99\n")
    slurm.refuses = "Requested operation is presently disabled"
    JobLifecycle(config, run, Job("7", 0, "0"), first=True).stopped("step_000004", True)
    assert ("scontrol", "update", "JobId=8", "Dependency=afterok:99") in commands
    assert json.loads((run.path / "chain.json").read_text())["links"][0]["job_id"] == "99"


def test_a_run_that_may_not_requeue_says_so(config, slurm):
    off = config.model_copy(update={"slurm": config.slurm.model_copy(update={"requeue": False})})
    with pytest.raises(StoppedForGood, match="slurm.requeue is off.*Submit the run again"):
        JobLifecycle(off, begin(off), Job("7", 0, "0"), first=True).stopped("step_000004", True)


# -- after the tasks -------------------------------------------------------------------------------------------------


def test_a_task_that_died_is_named_by_srun_and_the_job_requeued(config, slurm, tmp_path, capsys):
    run = begin(config)
    record_error(_errors(run), 0, "connection reset")
    slurm.log = tmp_path / "log"
    slurm.log.write_text(
        "srun: error: node9: task 5: Killed\n"
        f"task 0 (rank 0): attempt {run.attempt}, logs in x\n"
        "srun: error: node1: task 1: Killed\nsrun: error: node2: tasks 3-4: Exited with exit code 1\n"
    )
    assert after.after(137, run.path) == 0 and slurm.requeued == ["7"]
    assert "task 1 on node1: Killed" in capsys.readouterr().err
    assert first_error(run.attempt_dir) == "task 1 on node1: Killed"


def test_the_traceback_of_the_task_that_failed_is_the_last_thing_said(config, slurm, tmp_path, capsys):
    run = begin(config)
    record_error(_errors(run), 3, "Traceback\nKeyError: 'x'")
    slurm.log = tmp_path / "log"
    slurm.log.write_text("srun: error: node2: task 3: Exited with exit code 1\n")
    off = config.model_copy(update={"slurm": config.slurm.model_copy(update={"requeue": False})})
    (run.path / "config.json").write_text(off.model_dump_json())
    assert after.after(1, run.path) == 1 and slurm.requeued == []
    assert "task 3: Traceback\nKeyError: 'x'" in capsys.readouterr().err


def test_the_last_words_of_a_task_before_it_had_a_log(config, slurm, tmp_path, capsys):
    run = begin(config)
    slurm.log = tmp_path / "log"
    slurm.log.write_text("srun: error: node2: task 1: Exited with exit code 1\n")
    (run.path / "slurm").mkdir()
    own = run.path / "slurm" / "7_1_log.err"
    own.write_text("Traceback\nModuleNotFoundError: No module named 'x'\nsrun: Job step aborted\n\n")
    after.after(1, run.path)
    text = f"task 1 on node2: Exited with exit code 1; {own}: ModuleNotFoundError: No module named 'x'"
    assert text in capsys.readouterr().err and first_error(run.attempt_dir) == text
    run = begin(config, 1)
    own.write_text("task 1 (rank 1): attempt 1, logs in x\n")
    after._verdict(run, {"StdErr": str(slurm.log)})
    assert first_error(run.attempt_dir) == "task 1 on node2: Exited with exit code 1"


def test_a_node_that_srun_lost_goes_before_the_tasks_that_it_ends_for_it(config, slurm, tmp_path):
    run = begin(config)
    log = tmp_path / "log"
    lost = "srun: error: Aborting, io error and missing step on node 1\n"
    ended = "srun: error: node1: tasks 0-2: Killed\n"
    log.write_text(lost + ended)
    shown = {"StdErr": str(log), "NodeList": "node[1-2]"}
    assert (
        after._verdict(run, shown) == "Aborting, io error and missing step on node 1 (nodes node[1-2], counted from 0)"
    )
    log.write_text(ended + lost)
    assert after._verdict(run, shown) == "task 0-2 on node1: Killed"


@pytest.mark.parametrize("state", ["CANCELLED", "TIMEOUT", "PENDING", "COMPLETING"])
def test_a_job_that_slurm_has_ended_is_left_alone(config, slurm, state):
    run = begin(config)
    slurm.state = state
    assert after.after(143, run.path) == 143 and slurm.requeued == []


STEP = "slurmstepd-node1: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-30T20:00:00"
JOB = "slurmstepd-node1: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-30T20:00:00"
LATE = "srun: got SIGCONT\nsrun: error: node2: task 3: Exited with exit code 143\nsrun: error: node1: task 2: Exited with exit code 1\n"
"""As a real Slurm 22.05 wrote it after a requeue: tasks that are ended may fail over it."""


@pytest.mark.parametrize(
    "log, state, told",
    [
        (
            f"{JOB} DUE TO JOB REQUEUE ***\n{STEP} DUE TO JOB REQUEUE ***\n{LATE}",
            "COMPLETING",
            "ended by Slurm (job requeue)",
        ),
        (f"{STEP} DUE TO PREEMPTION ***\n", "COMPLETING", "ended by Slurm (preemption)"),
        (
            f"{STEP} ***\nsrun: error: node2: task 2: Exited with exit code 143\n",
            "CANCELLED",
            "ended by Slurm (cancelled)",
        ),
        ("", "COMPLETING", "ended by Slurm (requeued or cancelled)"),
        (f"srun: error: node1: task 1: Killed\n{STEP} ***\n", "COMPLETING", "task 1 on node1: Killed"),
        (f"srun: error: node2: task 2: Exited with exit code 143\n{STEP} ***\n", "RUNNING", "task 2: ended by SIGTERM"),
    ],
)
def test_who_ended_the_tasks(config, slurm, tmp_path, capsys, log, state, told):
    """A job that Slurm has taken away is nobody's failure, unless a task had failed before; a task that somebody
    ended in a job that runs is one."""
    run = begin(config)
    slurm.state, slurm.log = state, tmp_path / "log"
    slurm.log.write_text(log)
    record_error(_errors(run), 2, "ended by SIGTERM", primary=False)
    after.after(143, run.path)
    assert told in capsys.readouterr().err and first_error(run.attempt_dir) == told


def test_a_mistake_is_not_started_again(config, slurm, capsys):
    run = begin(config)
    record_error(_errors(run), 2, "--data.train: no such file", permanent=True)
    assert after.after(1, run.path) == 1 and slurm.requeued == []
    assert "the run ends" in capsys.readouterr().err


def test_a_run_without_progress_ends_with_the_reason(config, slurm, capsys):
    for restart in range(3):
        run = begin(config, restart)
    record_error(_errors(run), 2, "CUDA error")
    import os

    os.environ["SLURM_RESTART_COUNT"] = "2"
    try:
        assert after.after(1, run.path) == 1 and slurm.requeued == []
    finally:
        del os.environ["SLURM_RESTART_COUNT"]
    assert "3 attempts in a row without a new checkpoint" in capsys.readouterr().err


def test_nothing_to_do_after_a_good_end_or_without_an_attempt(config, slurm, tmp_path):
    assert after.after(2, tmp_path / "none") == 2
    run = begin(config)
    assert after.after(0, run.path) == 0
    (run.attempt_dir / STOPPED).write_text('{"why": "w", "next": "", "why_not": "slurm.requeue is off"}')
    assert after.after(0, run.path) == 1, "a chain of jobs must not take a stop for the end"
    assert slurm.requeued == []


def stumbles(function, times: int = 1, error: int = errno.EIO):
    """`function`, which meets an error of the file system the first `times` times."""
    left = [times]

    def wrapped(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(error, "the file system")
        return function(*args, **kwargs)

    return wrapped


@pytest.fixture
def hasty(monkeypatch):
    """Nothing waits."""
    monkeypatch.setattr(time, "sleep", lambda s: None)


@pytest.mark.parametrize("stumbling", ["owner", "newest_attempt", "newest_checkpoint", "check_fence"])
def test_an_attempt_begins_although_the_file_system_stumbles(config, slurm, hasty, monkeypatch, stumbling):
    begin(config)
    monkeypatch.setattr(RunDirectory, stumbling, stumbles(getattr(RunDirectory, stumbling)))
    assert begin(config, restart=1).attempt == 1


@pytest.mark.parametrize("stumbling", ["owner", "newest_attempt", "newest_checkpoint"])
def test_the_job_script_looks_again_where_the_file_system_stumbles(config, slurm, hasty, monkeypatch, stumbling):
    run = begin(config)
    record_error(_errors(run), 0, "CUDA error")
    monkeypatch.setattr(RunDirectory, stumbling, stumbles(getattr(RunDirectory, stumbling)))
    monkeypatch.setattr(job, "show_job", stumbles(job.show_job))
    assert after.after(1, run.path) == 0 and slurm.requeued == ["7"]
    assert json.loads((run.attempt_dir / STOPPED).read_text())["next"] == "requeued"


def test_a_job_is_requeued_although_nothing_can_be_written(config, slurm, hasty, monkeypatch):
    run = begin(config)
    record_error(_errors(run), 0, "CUDA error")
    monkeypatch.setattr(requeue, "write_atomic", stumbles(write_atomic, 100, errno.ENOSPC))
    assert after.after(1, run.path) == 0 and slurm.requeued == ["7"]


def test_words_that_stay_torn_do_not_end_the_run(config, slurm, hasty, capsys):
    run = begin(config)
    record_error(_errors(run), 0, "CUDA error")
    (run.attempt_dir / "errors" / "task_1.json").write_text('{"permanent": tr')
    assert after.after(1, run.path) == 0 and slurm.requeued == ["7"]
    assert "task_1.json: not JSON" in capsys.readouterr().err


def test_a_job_that_begins_no_attempt_is_requeued_a_few_times(config, slurm, hasty, monkeypatch, capsys):
    """The folder of the newest attempt says nothing that can be read: no attempt is begun, and the reason is kept."""
    run = begin(config)
    (run.attempt_dir / "owner.json").write_text("")
    for key, value in {"PROCID": "0", "NTASKS": "2", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    for restart in (1, 2, 3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        with pytest.raises(SystemExit):
            worker.work(config.model_dump_json(), str(run.path))
        assert (
            "owner.json: not JSON"
            in (run.path / "slurm" / f"unbegun_7_{restart}" / "errors" / "task_0.json").read_text()
        )
        assert after.after(2, run.path) == (0 if restart < 3 else 2)
    assert slurm.requeued == ["7", "7"] and run.newest_attempt() == 0
    assert "3 starts in a row began no attempt" in capsys.readouterr().err


def test_a_start_that_is_refused_for_good_is_not_requeued(config, slurm, hasty, monkeypatch):
    run = begin(config)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    record_error(attempt.unbegun(run.path, Job("7", 1, None)) / "errors", 0, "held by job 8", permanent=True)
    assert after.after(2, run.path) == 2 and slurm.requeued == []


@pytest.mark.parametrize("state", [{"JobState": "COMPLETING", "Reason": "None"}, {"JobState": "CANCELLED"}])
def test_a_cancelled_job_is_not_brought_back(config, slurm, monkeypatch, state):
    """While scancel's signals are on their way Slurm shows an end that has passed, and would take a requeue."""
    shown = state | {"TimeLimit": "01:00:00", "EndTime": "2026-12-01T02:42:42"}
    monkeypatch.undo()
    monkeypatch.setattr(job, "show_job", lambda id: shown)
    monkeypatch.setattr(job, "requeue", lambda id: slurm.requeued.append(id))
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    run = begin(config)
    assert job.end_time("7") is None
    lifecycle = JobLifecycle(config, run, Job("7", 0, "0"), first=True)
    lifecycle.end = time.time()
    lifecycle.tick()
    assert lifecycle.at_step_boundary(False, 1e6, 1e6) == "" and not (run.attempt_dir / STOPPED).exists()
    with pytest.raises(StoppedForGood, match="the job was cancelled"):
        lifecycle.stopped("rl step 3", True)
    assert slurm.requeued == []
    for other in ({"Reason": "TimeLimit"}, {"EndTime": "2037-12-01T02:42:42"}):  # these jobs may go on
        seen = shown | {"JobState": "COMPLETING", "Reason": "None"} | other
        assert not job.cancelled(seen), seen


def test_the_last_moment_is_tried_again(config, slurm, hasty, monkeypatch):
    """With no time left to save, a run directory that cannot be read must not cost the requeue."""
    run = begin(config)
    slurm.end = time.time() + REQUEUE_S - 1
    lifecycle = JobLifecycle(config, run, Job("7", 0, "0"), first=True)
    monkeypatch.setattr(RunDirectory, "check_fence", stumbles(RunDirectory.check_fence, 3))
    lifecycle.tick()
    assert slurm.requeued == []
    lifecycle.tick()
    assert slurm.requeued == ["7"]
    lifecycle.tick()
    assert slurm.requeued == ["7"]


# -- nodes -----------------------------------------------------------------------------------------------------------


class Nodes:
    """What Slurm is asked about nodes, and what it was told to leave out."""

    def __init__(self, monkeypatch, total: int = 9) -> None:
        self.excluded = "(null)"
        self.told: list[str] = []
        monkeypatch.setattr(job, "node_names", lambda text: ["a", "b"])
        monkeypatch.setattr(job, "nodes_of_partition", lambda name: total)
        monkeypatch.setattr(requeue.signal, "signal", lambda *_: None)
        monkeypatch.setattr(job, "ask", self.ask)

    def ask(self, *command: str, **_) -> str:
        self.told += [word.removeprefix("ExcNodeList=") for word in command if word.startswith("ExcNodeList=")]
        return ""


def fails_on(
    config: RunConfig, monkeypatch, restart: int, node: str, fault: str = "uncorrectable ECC error"
) -> RunDirectory:
    """An attempt of a job that a node has brought down, and the job script after it."""
    run = begin(config, restart)
    monkeypatch.setenv("SLURMD_NODENAME", node)
    record_error(_errors(run), 0, "CUDA error", fault=fault)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    checkpoint(run, restart + 1)
    assert after.after(1, run.path) == 0
    return run


def test_a_node_that_brings_two_attempts_in_a_row_down_is_left_out(config, slurm, monkeypatch, capsys):
    nodes = Nodes(monkeypatch)
    run = fails_on(config, monkeypatch, 0, "a")
    assert nodes.told == [] and "a brought this attempt down: uncorrectable ECC error" in capsys.readouterr().err
    run = fails_on(config, monkeypatch, 1, "a")
    assert nodes.told == ["a"] and slurm.requeued == ["7", "7"]
    assert "a is left out from here on (attempts 0 to 1: uncorrectable ECC error)" in capsys.readouterr().err
    (status,), _ = statuses([run.path])
    assert status.left_out == ("a: attempts 0 to 1: uncorrectable ECC error",)


@pytest.mark.parametrize(
    ("faults", "total"),
    [
        ([("a", "ECC"), ("b", "ECC")], 9),  # each once
        ([("a", "ECC"), ("a", ""), ("a", "ECC")], 9),  # an error of the run's own between them
        ([("a", "ECC"), ("a", "ECC")], 1),  # there is no other node
    ],
)
def test_a_node_that_may_be_innocent_is_not_left_out(config, slurm, monkeypatch, faults, total):
    nodes = Nodes(monkeypatch, total)
    for restart, (node, fault) in enumerate(faults):
        fails_on(config, monkeypatch, restart, node, fault)
    assert nodes.told == [] and len(slurm.requeued) == len(faults)


def test_nodes_are_left_out_up_to_a_limit(config, slurm, monkeypatch):
    nodes = Nodes(monkeypatch)
    for restart, node in enumerate("aabbcc"):
        fails_on(config, monkeypatch, restart, node)
    assert nodes.told == ["a", "b"], "slurm.max_bad_nodes is 2"


def test_a_node_is_added_to_those_that_the_job_leaves_out_already(monkeypatch):
    monkeypatch.setattr(job, "show_job", lambda id: {"ExcNodeList": "n[1-2]"})
    assert job.leave_out("7", "n5") == "n[1-2],n5"


def test_the_node_of_a_hang_is_the_one_that_says_nothing(config, slurm):
    run = begin(config)
    (stacks := run.attempt_dir / "stacks").mkdir()
    hosts = {0: "a", 1: "a", 2: "b", 3: "b"}
    (stacks / "task_0.txt").touch()
    assert bad_nodes.blamed(run, [], hosts) == ("", ""), "no hang"
    (stacks / "hung").touch()
    assert bad_nodes.blamed(run, [], hosts)[0] == "b"
    (stacks / "task_3.txt").touch()
    assert bad_nodes.blamed(run, [], hosts) == ("", "")
    lost = ["srun: error: Node failure on c", "srun: error: a: task 0: Killed"]
    assert bad_nodes.blamed(run, lost, hosts) == ("c", "srun lost it")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", '{"model": 3}', "config.json: model is no section of settings"),
        ("config.json", "\ufeff{}", "config.json: not JSON: Unexpected UTF-8 BOM"),
        ("data.json", '{"data.train": 7}', "data.json: allowed are settings with bytes and sha256"),
        ("attempts/0/owner.json", "\ufeff{}", "owner.json: not JSON: Unexpected UTF-8 BOM"),
    ],
)
def test_a_broken_file_of_a_run_is_named_by_a_start(config, tmp_path, hasty, file, text, said):
    run = open_run(config)
    run.release()
    (run.path / file).write_text(text, encoding="utf-8")
    with pytest.raises(TransientInputError, match=said):
        open_run(config)


@pytest.mark.parametrize("text", ["{}", '{"host": 1, "pid": "x", "start": []}', '{"colour": 3}'])
def test_an_owner_that_says_nothing_holds_nothing(config, slurm, text):
    run = begin(config)
    (run.attempt_dir / "owner.json").write_text(text)
    assert open_run(config).attempt == 1
    (status,), _ = statuses([run.path])
    assert status.attempt == 1
