"""Chains of jobs: what is queued and what is left out; and one on a real Slurm, broken, repaired and requeued."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest

from fp8slurm.chain import submit as submit_chain
from fp8slurm.chain.links import Link, links, parse_sbatch, script
from fp8slurm.chain.submit import check_scripts, describe, plan, queue, refuse_second, submit, with_sbatch
from fp8slurm.config import RunConfig
from fp8slurm.run.directory import RunDirectory
from fp8slurm.scheduler.job import SlurmError
from fp8slurm.slurm.attempt import settle_configuration
from fp8slurm.slurm.requeue import follow

ORDER = ["hf-to-torch-dist", "hf-to-fp8", "train", "export-hf", "export-fp8", "eval"]
TIMEOUT_S = 600.0


def config(**sections: dict) -> RunConfig:
    values = {"run": {"name": "r", "steps": 7}, "model": {"hf_checkpoint": "m"}, "slurm": {"executor": "slurm"}}
    names = values.keys() | sections.keys()
    return RunConfig.model_validate({k: values.get(k, {}) | sections.get(k, {}) for k in names})


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands; slurm.calls() is what they were called with."""
    folder = tmp_path / "commands"
    folder.mkdir()
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    class Slurm:
        def command(self, name: str, *lines: str) -> None:
            path = folder / name
            path.write_text("\n".join(["#!/bin/sh", f'echo "{name} $*" >> {log}', *lines, ""]))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

        def calls(self) -> list[str]:
            return log.read_text().splitlines()

    return Slurm()


def test_every_job_waits_for_what_it_reads(tmp_path):
    found = links(config(), tmp_path)
    assert [x.name for x in found] == ORDER
    made: dict[str, set[str]] = {}
    for link in found:
        before = set(link.after).union(*(made[n] for n in link.after)) if link.after else set()
        made[link.name] = before
        read = {x.name for x in found if str(x.output) in " ".join(link.command) and x is not link}
        assert read <= before | {link.name}, f"{link.name} reads what it does not wait for"
    chain = {x.name: x for x in found}
    assert chain["train"].after == ("hf-to-fp8",), "it does not read what hf-to-torch-dist makes"
    for name in ("export-hf", "export-fp8"):
        assert chain[name].after == ("train",) and "--checkpoint=step_000007" in chain[name].command
    assert found[2].output == tmp_path / "checkpoints" / "step_000007"
    assert found[1].output == tmp_path / "engine_model", "where the rollout workers look for the engine's checkpoint"


def test_a_given_rollout_checkpoint_is_not_made(tmp_path):
    found = links(config(model={"rollout_checkpoint": "fp8"}), tmp_path / "run")
    assert [x.name for x in found] == [n for n in ORDER if n != "hf-to-fp8"]
    assert found[1].name == "train" and found[1].after == ()


def test_directives_follow_the_settings(tmp_path):
    settings = {"partition": "gpu", "account": "me", "gpus_per_node": 8, "ranks_per_node": 8, "requeue": False}
    c = config(slurm=settings)
    chain = {x.name: x for x in links(c, tmp_path, ["--partition=cpu", "--exclusive"], ["--time=5"])}
    convert, evaluation = chain["export-fp8"].directives, chain["eval"].directives
    assert (convert["partition"], convert["account"], convert["exclusive"]) == ("cpu", "me", "")
    assert "gpus-per-node" not in convert
    assert (evaluation["partition"], evaluation["gpus-per-node"], evaluation["time"]) == ("gpu", "8", "5")
    several = links(c, tmp_path, [], ["--nodes=3"])[-1]
    text = script(several, 6, c, tmp_path)
    assert "#SBATCH --nodes=3\n" in text and "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --ntasks=" not in text
    assert " srun --ntasks-per-node=1 --kill-on-bad-exit=1 " in text
    text = script(chain["export-fp8"], 5, c, tmp_path)
    assert "#SBATCH --exclusive\n" in text and "#SBATCH --no-requeue\n" in text and "#SBATCH --requeue\n" not in text
    with pytest.raises(ValueError, match="--convert-sbatch -p: sbatch flags are written --name=value"):
        parse_sbatch("--convert-sbatch", ["-p"])


@pytest.mark.parametrize("way", ["mem-per-cpu", "mem-per-gpu"])
def test_one_way_of_asking_for_memory(tmp_path, way):
    """sbatch refuses a second one."""
    directives = {
        x.name: x.directives for x in links(config(slurm={"memory": "64G"}), tmp_path, [f"--{way}=2G"], [f"--{way}=3G"])
    }
    memory = {name: {k: v for k, v in d.items() if k.startswith("mem")} for name, d in directives.items()}
    assert memory["export-fp8"] == {way: "2G"} and memory["eval"] == {way: "3G"}
    directives = {
        x.name: x.directives for x in links(config(slurm={"sbatch": {way.replace("-", "_"): "4G"}}), tmp_path)
    }
    assert (
        directives["eval"][way] == "4G" and "mem" not in directives["eval"] and directives["export-fp8"]["mem"] == "8G"
    )


def test_what_the_training_job_waits_for_is_the_chains_own(tmp_path):
    with pytest.raises(ValueError, match="--slurm.sbatch dependency singleton: in a chain"):
        links(config(slurm={"sbatch": {"dependency": "singleton"}}), tmp_path)


def test_scripts_survive_spaces_and_run_in_a_container(tmp_path):
    c = config(
        model={"hf_checkpoint": "my models/m"},
        slurm={
            "container_image": "a image.sqsh",
            "container_mounts": ["/a:/b", "/c:/d"],
            "setup": ["module load x"],
            "srun": ["--mpi=none"],
        },
    )
    found = links(c, tmp_path / "a run")
    text = script(found[0], 1, c, tmp_path / "a run")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    command = shlex.split(text.splitlines()[-1])
    assert command[:2] == ["exec", "srun"] and "my models/m" in command and "python3" in command
    assert "--container-image=a image.sqsh" in command and "--container-mounts=/a:/b,/c:/d" in command
    assert "module load x" in text.splitlines() and "--mpi=none" in command[: command.index("python3")]


def test_what_is_done_is_left_out(tmp_path):
    run = tmp_path
    (run / "torch_dist").mkdir()
    found = plan(config(), run, [], [])
    assert [bool(p.done) for p in found] == [True, False, False, False, False, False]
    checkpoint = run / "checkpoints" / "step_000007"
    checkpoint.mkdir(parents=True)
    (checkpoint / "data").write_text("123")
    (checkpoint / "COMPLETE").write_text(json.dumps({"files": {"data": {"bytes": 3}}}))
    (run / "export" / "step_000007-hf").mkdir(parents=True)
    found = plan(config(), run, [], [])
    assert [bool(p.done) for p in found] == [True, False, True, True, False, False]
    text = describe(found, config(), run)
    assert "# ---- 3 train: nothing to do" in text and "# ---- 5 export-fp8: sbatch\n" in text
    (checkpoint / "data").write_text("12")
    with pytest.raises(
        ValueError, match="step_000007, the run's last checkpoint, is damaged .data has 2 bytes instead of 3"
    ):
        plan(config(), run, [], [])
    checkpoint.rename(tmp_path / "away")
    with pytest.raises(ValueError, match="step_000007-hf is there, but the checkpoint that it comes from is not"):
        plan(config(), run, [], [])


def test_a_run_that_has_gone_further_is_exported_from_where_it_is(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step_000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text(json.dumps({"files": {}}))
    found = plan(config(), tmp_path, [], [])
    assert [p.link.output.name for p in found[2:]] == [
        "step_000009",
        "step_000009-hf",
        "step_000009-fp8",
        "summary.json",
    ]
    assert found[2].done and "--checkpoint=step_000009" in found[-1].link.command
    further = plan(config(run={"steps": 10}), tmp_path, [], [])
    assert not further[2].done and further[2].link.output.name == "step_000010"


def test_another_model_in_the_same_run_is_refused(tmp_path):
    (tmp_path / "chain.json").write_text(json.dumps({"hf_checkpoint": "other"}))
    with pytest.raises(ValueError, match="began with other, not with --model.hf-checkpoint m"):
        plan(config(), tmp_path, [], [])
    (tmp_path / "chain.json").write_text(json.dumps({"hf_checkpoint": os.path.abspath("m")}))
    plan(config(), tmp_path, [], [])


def test_a_second_chain_is_refused_while_jobs_of_the_first_wait(tmp_path, slurm):
    first = {"links": [{"name": "eval", "job_id": "5"}, {"name": "x", "job_id": "6"}]}
    (tmp_path / "chain.json").write_text(json.dumps(first))
    slurm.command("squeue", 'echo "5|COMPLETED|None|0:01|1:00|n|N/A"; echo "6|PENDING|Dependency|0:00|1:00||N/A"')
    with pytest.raises(ValueError, match="jobs 6 of it wait or run.*scancel 6"):
        refuse_second(tmp_path)
    slurm.command("squeue", 'echo "5|COMPLETING|None|0:01|1:00|n|N/A"; echo "6|CANCELLED|Dependency|0:00|1:00||N/A"')
    with pytest.raises(ValueError, match="jobs 5 of it .*being ended"):
        refuse_second(tmp_path)
    slurm.command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ValueError, match="Slurm cannot say.*Unable to contact"):
        refuse_second(tmp_path)


def test_a_refused_job_takes_those_before_it_along(tmp_path, slurm):
    """The first two are queued, the training job is refused: both are cancelled."""
    count = tmp_path / "count"
    slurm.command(
        "sbatch",
        f"n=$(cat {count} 2>/dev/null || echo 0); echo $((n + 1)) > {count}",
        'if [ "$n" = 2 ]; then echo "sbatch: error: invalid account" >&2; exit 1; fi',
        "echo 10$n",
    )
    slurm.command("scancel")
    slurm.command("srun")
    slurm.command("squeue")
    with pytest.raises(SlurmError, match="invalid account.*nothing of the chain is left in the queue"):
        submit(plan(config(), tmp_path / "r", [], []), config(run={"root": str(tmp_path)}), tmp_path / "r", [])
    assert [x for x in slurm.calls() if "scancel" in x] == ["scancel 100 101"]


def test_a_job_that_sbatch_queued_without_an_answer_is_cancelled_too(tmp_path, slurm, monkeypatch):
    """The first is queued, and nobody says so; another run's job of the same name stays."""
    monkeypatch.setattr(submit_chain, "LATE_S", 0.2)
    monkeypatch.setattr(submit_chain, "LOOK_S", 0.0)

    def no_answer(*_):
        raise SlurmError("sbatch: no answer within 30 s")

    monkeypatch.setattr(submit_chain, "queue", no_answer)
    run, gone = tmp_path / "r", tmp_path / "gone"
    mine, other = (f"{folder}/chain/1-hf-to-torch-dist.sbatch" for folder in (run, tmp_path / "other"))
    slurm.command(
        "squeue", f'[ -e {gone} ] || echo "5|PENDING|{mine}"', f'echo "6|PENDING|{other}"; echo "7|COMPLETING|{mine}"'
    )
    slurm.command("scancel", f"touch {gone}")
    with pytest.raises(SlurmError, match="no answer within 30 s; nothing of the chain is left"):
        submit(plan(config(), run, [], []), config(run={"root": str(tmp_path)}), run, [])
    assert [x for x in slurm.calls() if "scancel" in x] == ["scancel 5"]
    slurm.command("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SlurmError, match="Slurm cannot say what is left of the chain in the queue .Unable to contact"):
        submit(plan(config(), run, [], []), config(run={"root": str(tmp_path)}), run, [])


def test_every_script_is_checked_before_the_first_is_queued(tmp_path, slurm):
    """One question for the conversions, one for the evaluation; the refusal names the flag."""
    slurm.command(
        "sbatch",
        'if grep -q "partition=cpu" "$2"; then echo "sbatch: error: invalid partition specified: cpu" >&2; exit 1; fi',
    )
    assert check_scripts(plan(config(), tmp_path, [], []), config(), tmp_path) == []
    assert len([x for x in slurm.calls() if x.startswith("sbatch --test-only ")]) == len(slurm.calls()) == 2
    for flags, says in (
        (
            [["--partition=cpu"], []],
            "hf-to-torch-dist: invalid partition specified: cpu; it asks for .*--partition=cpu .--convert-sbatch changes",
        ),
        ([[], ["--partition=cpu"]], "eval: invalid partition .*--eval-sbatch changes"),
    ):
        with pytest.raises(ValueError, match=says):
            check_scripts(plan(config(), tmp_path, *flags), config(), tmp_path)
    slurm.command("sbatch", "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1")
    slurm.command("scontrol", "echo 'NodeName=n1 State=DOWN Partitions=x'")
    warnings = check_scripts(plan(config(), tmp_path, [], []), config(), tmp_path)
    assert len(warnings) == 2 and warnings[1] == (
        "job eval will wait: Slurm could not start it on the nodes that are there now; away: n1 (DOWN)"
    )


def test_what_a_job_waits_for_is_no_setting_of_its_run(tmp_path):
    run = RunDirectory(tmp_path)
    waits = with_sbatch(
        config(slurm={"sbatch": {"comment": "c"}}), ["--dependency=afterok:5", "--kill-on-invalid-dep=yes"]
    )
    assert settle_configuration(waits, run) == []
    assert json.loads((tmp_path / "config.json").read_text())["slurm"]["sbatch"] == {"comment": "c"}
    (tmp_path / "config.json").write_text(waits.model_dump_json())  # as it was written before
    assert settle_configuration(config(slurm={"sbatch": {"comment": "c"}}), run) == []


def test_dependencies_reach_sbatch(tmp_path, slurm):
    slurm.command("sbatch", "echo '42;cluster'")
    link = Link("export-fp8", ("export", "a", "b"), tmp_path / "b", ("x",), {"nodes": "1"})
    (tmp_path / "chain").mkdir()
    planned = plan(config(), tmp_path, [], [])[4]
    assert planned.link.name == link.name
    job_id, log = queue(planned, ["7", "8"], config(), tmp_path)
    assert job_id == "42" and log.endswith("chain/5-export-fp8.log")
    assert slurm.calls() == [
        f"sbatch --parsable --dependency=afterok:7:8 --kill-on-invalid-dep=yes {tmp_path}/chain/5-export-fp8.sbatch"
    ]


def test_the_chain_follows_a_resubmitted_job(tmp_path, slurm):
    slurm.command("scontrol")
    chain = {
        "links": [
            {"name": "train", "job_id": "3", "after": ["1", "2"]},
            {"name": "next", "job_id": "4", "after": ["3"]},
            {"name": "last", "job_id": "5", "after": ["4"]},
        ]
    }
    (tmp_path / "chain.json").write_text(json.dumps(chain))
    follow(tmp_path, "3", "9")
    assert slurm.calls() == ["scontrol update JobId=4 Dependency=afterok:9"]
    after = json.loads((tmp_path / "chain.json").read_text())["links"]
    assert [(x["job_id"], x["after"]) for x in after] == [("9", ["1", "2"]), ("4", ["9"]), ("5", ["4"])]
    follow(tmp_path / "no chain", "3", "9")


# -- a real Slurm ------------------------------------------------------------------------------------------------


class Chain:
    """One tiny run as a chain on the lab."""

    def __init__(self, lab, runs, name: str = "chain", steps: int = 12) -> None:
        self.lab, self.runs, self.name = lab, runs, name
        self.run = runs.path(self.name)
        self.flags = runs.flags(
            self.name, f"--run.steps={steps}", "--checkpoint.every=1", "--sft.max-steps=4", "--eval.every=0",
            "--slurm.nodes=1", "--slurm.ranks-per-node=1",
        )  # fmt: skip

    def start(self, *more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fp8slurm.cli", "chain", *self.flags, *more]
        return subprocess.run(command, env=self.lab.environment, capture_output=True, text=True, timeout=TIMEOUT_S)

    def ids(self) -> dict[str, str]:
        record = json.loads((self.run / "chain.json").read_text())
        return {x["name"]: x["job_id"] for x in record["links"] if x["job_id"]}

    def states(self) -> dict[str, str]:
        return {name: self.lab.job(job_id)["JobState"] for name, job_id in self.ids().items()}

    def wait(self, reached) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not reached():
            assert time.monotonic() < deadline, f"{self.states()}\n{self.logs()}"
            time.sleep(0.3)

    def wait_end(self) -> dict[str, str]:
        self.wait(lambda: not set(self.states().values()) & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"})
        return self.states()

    def logs(self) -> str:
        others = sorted(self.run.glob("chain/*.log"))
        return self.runs.log(self.name) + "".join(f"== {p}\n{p.read_text()}" for p in others)

    def status(self) -> dict:
        command = [sys.executable, "-m", "fp8slurm.cli", "status", "--json", str(self.run)]
        done = subprocess.run(command, env=self.lab.environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def chain(start_lab, runs):
    return Chain(start_lab("linuxproc"), runs)


@pytest.fixture(scope="module")
def broken(chain):
    """The chain with training data that become unusable while it waits."""
    data = chain.runs.folder / "data" / "train.jsonl"
    kept = data.read_text()
    done = chain.start("--convert-sbatch=--hold")
    assert done.returncode == 0, done.stderr
    try:
        second = chain.start()
        waiting = chain.status()
        data.write_text('{"prompt": "without a label"}\n' + kept)
        for name in ORDER[:2]:
            chain.lab.ask("scontrol", "release", chain.ids()[name])
        states = chain.wait_end()
    finally:
        data.write_text(kept)
    return done, second, waiting, states


@pytest.mark.slow
@pytest.mark.slurm
def test_a_failing_link_cancels_the_rest(chain, broken):
    done, second, waiting, states = broken
    assert all(name in done.stdout for name in ORDER) and "scancel" in done.stdout
    assert second.returncode == 2 and "wait or run" in second.stderr
    assert waiting["state"] == "pending" and [x["state"] for x in waiting["links"]] == ["pending"] * 6
    want = dict.fromkeys(ORDER[:2], "COMPLETED") | {"train": "FAILED"} | dict.fromkeys(ORDER[3:], "CANCELLED")
    assert states == want, chain.logs()
    after = chain.status()
    assert after["state"] == "failed" and "label" in after["error"], after
    assert [x["state"] for x in after["links"]] == ["completed"] * 2 + ["failed"] + ["cancelled"] * 3
    chain.lab.wait_empty()


@pytest.mark.slow
@pytest.mark.slurm
def test_the_same_command_again_goes_on_and_a_requeued_job_keeps_its_place(chain, broken):
    """The conversions are not made again; the training job is requeued; the rest waits for it all the same."""
    before = {p: p.stat().st_mtime_ns for n in ("torch_dist", "engine_model") for p in (chain.run / n).iterdir()}
    failed = chain.runs.attempt(chain.name)
    done = chain.start()
    assert done.returncode == 0, done.stderr
    assert list(chain.ids()) == ORDER[2:] and done.stdout.count("is there") == 2
    train = chain.ids()["train"]
    chain.runs.wait_step(chain.lab, chain.name, train, 1)
    running = chain.status()
    assert (running["state"], running["phase"], running["job_id"], running["total"]) == ("running", "rl", train, 12)
    chain.lab.ask("scontrol", "requeue", train)
    states = chain.wait_end()
    assert states == dict.fromkeys(ORDER[2:], "COMPLETED"), chain.logs()
    assert chain.runs.attempt(chain.name) >= failed + 2 and int(chain.lab.job(train)["Restarts"]) >= 1
    assert before == {p: p.stat().st_mtime_ns for p in before}
    summary = json.loads((chain.run / "eval" / "step_000012-fp8" / "summary.json").read_text())
    assert summary["tasks"]["held_out"]["questions"] == 16
    for folder in ("step_000012-hf", "step_000012-fp8"):
        assert (chain.run / "export" / folder / "model.safetensors").is_file()
    assert chain.status()["state"] == "finished"
    chain.lab.wait_empty()
    again = chain.start()
    assert again.returncode == 0 and "every job of the chain is done" in again.stdout


@pytest.mark.slow
@pytest.mark.slurm
@pytest.mark.faults
def test_a_training_job_that_may_not_be_requeued_takes_the_rest_along(start_lab, runs):
    """A rank dies; the job submits itself again under a new number, and the jobs behind it wait for that one."""
    chain = Chain(start_lab("linuxproc"), runs, "moved", steps=20)
    done = chain.start()
    assert done.returncode == 0, done.stderr
    before = chain.ids()
    chain.runs.wait_step(chain.lab, chain.name, before["train"], 1)
    chain.lab.ask("scontrol", "update", f"JobId={before['train']}", "Requeue=0")
    os.kill(chain.runs.task(chain.name, 0)["pid"], signal.SIGKILL)
    chain.wait(lambda: chain.ids()["train"] != before["train"])
    states = chain.wait_end()
    assert states == dict.fromkeys(ORDER, "COMPLETED"), chain.logs()
    assert chain.runs.attempt(chain.name) == 1 and chain.status()["state"] == "finished"
    chain.lab.wait_empty()
