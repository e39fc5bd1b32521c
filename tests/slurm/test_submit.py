"""The job script, pinned; and what is refused before a job is queued."""

from pathlib import Path

import pytest

from fp8slurm.chain.links import links
from fp8slurm.check import cluster
from fp8slurm.config import RunConfig, parse
from fp8slurm.run.directory import SLURM_FOLDER, RunBusyError, RunDirectory
from fp8slurm.scheduler import job
from fp8slurm.scheduler.job import SlurmError
from fp8slurm.slurm import script, submit
from fp8slurm.slurm.attempt import finished, holder

GOLDEN = Path(__file__).parent / "golden"


def config(**slurm) -> RunConfig:
    engine = {"per_node": 1, "tensor_parallel_size": 8}
    defaults = {"executor": "slurm", "nodes": 2, "ranks_per_node": 8, "gpus_per_node": 8, "time": "1-00:00:00"}
    return RunConfig(run={"name": "qwen"}, slurm=defaults | slurm, engine=engine)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("plain", {"nodes": 1, "ranks_per_node": 8}),
        (
            "everything",
            {
                "partition": "gpu", "account": "lab", "qos": "high", "reservation": "res", "constraint": "h100", "exclude": "n7",
                "memory": "0", "cpus_per_task": 12, "container_image": "image.sqsh", "container_mounts": ["/data:/data", "/scratch:/s"],
                "setup": ["module load cuda"], "sbatch": {"exclusive": True, "mail-type": "FAIL"}, "srun": ["--mpi=none"],
                "signal_delay_s": 600,
            },
        ),
    ],
)  # fmt: skip
def test_the_script_is_the_pinned_one(name, settings, monkeypatch):
    monkeypatch.setattr(script.sys, "executable", "/env/bin/python")
    monkeypatch.setattr(script.parameters, "__defaults__", ("/env/bin/python",))
    got = script.script(config(**settings), Path("/runs/qwen"))
    assert got == (GOLDEN / f"{name}.sbatch").read_text()


def test_gpus_of_a_type(tmp_path):
    typed = config(gpu_type="h100-sxm_80.gb")
    assert "#SBATCH --gpus-per-node=h100-sxm_80.gb:8\n" in script.script(typed, tmp_path)
    assert (
        links(
            typed.model_copy(update={"model": typed.model.model_copy(update={"hf_checkpoint": Path("m")})}), tmp_path
        )[-1].directives["gpus-per-node"]
        == "h100-sxm_80.gb:8"
    )
    with pytest.raises(ValueError, match="gpu_type"):
        config(gpu_type="h100:2")


PARTITIONS = """PartitionName=gpu AllocNodes=ALL Default=YES GraceTime=0 MaxNodes=UNLIMITED MaxTime=2-00:00:00 PreemptMode=OFF TotalNodes=4
PartitionName=spot AllocNodes=ALL Default=NO GraceTime=30 MaxNodes=2 MaxTime=UNLIMITED PreemptMode=REQUEUE TotalNodes=64
"""


@pytest.fixture
def slurm(monkeypatch):
    """Answers of a cluster with two partitions; sbatch agrees unless a test says otherwise."""
    answers = {"scontrol": PARTITIONS, "sbatch": "", "nodes": ""}

    def ask(*command, **_):
        answer = answers["nodes" if command[-1] == "node" else command[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(job, "ask", ask)
    monkeypatch.setattr(job, "available", lambda: True)
    return answers


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"partition": "gpus"}, ["--slurm.partition gpus", "gpu, spot"]),
        ({"nodes": 5}, ["--slurm.nodes 5", "at most 4"]),
        ({"nodes": 3, "partition": "spot"}, ["--slurm.nodes 3", "spot", "at most 2"]),
        ({"time": "2-00:01:00"}, ["--slurm.time 2-00:01:00", "gpu", "2-00:00:00"]),
        (
            {"nodes": 3, "time": "3-00", "partition": "gpu,spot"},
            ["--slurm.time 3-00: partition gpu", "--slurm.nodes 3: partition spot"],
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(slurm, settings, says):
    with pytest.raises(ValueError) as error:
        cluster.check_cluster(config(**settings))
    assert all(word in str(error.value) for word in says), error.value


def test_what_sbatch_refuses_and_a_machine_without_slurm(slurm, monkeypatch):
    assert cluster.check_cluster(config()) == []
    slurm["sbatch"] = SlurmError("Invalid account")
    with pytest.raises(ValueError, match="Invalid account"):
        cluster.check_cluster(config())
    monkeypatch.setattr(job, "available", lambda: False)
    with pytest.raises(ValueError, match="no Slurm on this machine.*--slurm.executor local"):
        cluster.check_cluster(config())


def test_a_variable_of_sbatch_decides_the_partition_where_no_setting_does(slurm, monkeypatch):
    slurm["scontrol"] = PARTITIONS.replace("GraceTime=30", "GraceTime=0")
    monkeypatch.setenv("SBATCH_PARTITION", "spot")
    assert (
        "partition spot is preemptible" in cluster.check_cluster(config(time="3-00"))[0]
    )  # too long for the default one
    with pytest.raises(ValueError, match=r"--slurm.nodes 3: partition spot \(SBATCH_PARTITION\)"):
        cluster.check_cluster(config(nodes=3))
    assert cluster.check_cluster(config(nodes=3, partition="gpu")) == []
    monkeypatch.setenv("SBATCH_PARTITION", "gpus")
    with pytest.raises(ValueError, match="SBATCH_PARTITION gpus: there is no partition gpus; there are gpu, spot"):
        cluster.check_cluster(config())


def test_a_partition_that_is_down_is_a_warning(slurm):
    slurm["scontrol"] = PARTITIONS.replace("TotalNodes=4", "TotalNodes=4 State=DOWN")
    assert cluster.check_cluster(config()) == ["partition gpu is DOWN: the job waits until it is UP"]
    assert cluster.check_cluster(config(partition="gpu,spot")) == [], "it starts in the other"


@pytest.mark.parametrize(
    "settings, partition, says",
    [
        ({}, "", ""),
        ({}, "DefMemPerNode=UNLIMITED", ""),
        ({}, "DefMemPerCPU=256", "partition gpu gives 256 MiB for each core of 9 unasked"),
        ({"cpus_per_task": 16}, "DefMemPerCPU=16000", ""),
        ({}, "JobDefaults=DefMemPerGPU=1000", "partition gpu gives 1000 MiB for each GPU of 8 unasked"),
        ({"memory": "0"}, "DefMemPerCPU=256", ""),
        ({"memory": "2G"}, "DefMemPerNode=UNLIMITED", "--slurm.memory 2G"),
        ({"memory": "2T"}, "DefMemPerCPU=256", ""),
        ({"sbatch": {"mem-per-gpu": "1024"}}, "", "--slurm.sbatch mem-per-gpu 1024"),
    ],
)
def test_memory_that_is_less_than_the_plan_is_a_warning(slurm, settings, partition, says):
    slurm["scontrol"] = PARTITIONS.replace("TotalNodes=4", f"TotalNodes=4 {partition}")
    recipe = parse("qwen3-4b-fp8", [])
    asked = {"executor": "slurm", "partition": "gpu", "memory": None, "cpus_per_task": None} | settings
    recipe = recipe.model_copy(update={"slurm": recipe.slurm.model_copy(update=asked)})
    warnings = cluster.check_cluster(recipe)
    assert len(warnings) == bool(says) and all(says in w and "--slurm.memory (0: all of a node)" in w for w in warnings)


def test_what_no_node_has_is_compared_with_what_they_have(slurm):
    slurm["sbatch"] = SlurmError(
        "sbatch: error: Memory specification can not be satisfied\nallocation failure: Requested node configuration is not available"
    )
    node = "NodeName=n{} CPUTot=64 RealMemory=65536 Gres={} State=IDLE Partitions={}\n"
    slurm["nodes"] = (
        node.format(1, "gpu:8", "gpu")
        + node.format(2, "gpu:8", "gpu,x")
        + node.format(3, "(null)", "gpu")
        + node.format(4, "gpu:16", "x")
    )
    with pytest.raises(ValueError) as error:
        cluster.check_cluster(config(cpus_per_task=12, gpu_type="a100", memory="999G", exclude="n1"))
    text = str(error.value)
    assert "\n" not in text and "sbatch: error" not in text and "can not be satisfied; allocation failure" in text
    for words in (
        "a100:8 GPUs (--slurm.gpus-per-node, --slurm.gpu-type a100)", "108 cores", "--slurm.cpus-per-task", "999G memory (--slurm.memory)",
        "without n1 (--slurm.exclude)", "nodes of gpu: 2 x gpu:8, 64 cores, 65536 MB; 1 x no GPU, 64 cores, 65536 MB",
    ):  # fmt: skip
        assert words in text, text


def test_a_dry_run_asks_in_passing(slurm, monkeypatch):
    assert cluster.check_in_passing(config()) == []
    (warning,) = cluster.check_in_passing(config(partition="gpus"))
    assert warning.startswith("a start would be refused here: --slurm.partition gpus")
    slurm["scontrol"] = SlurmError("no answer within 5 s")
    assert "Slurm does not answer" in cluster.check_in_passing(config())[0]
    monkeypatch.setattr(job, "available", lambda: False)
    assert cluster.check_in_passing(config()) == []


@pytest.mark.parametrize("command", ["submit", "chain"])
def test_dry_runs_say_what_slurm_would_refuse(slurm, command, tmp_path, monkeypatch, capsys):
    from fp8slurm.cli import main

    monkeypatch.chdir(tmp_path)  # no checkpoint, no data
    assert main([command, "--recipe", "qwen3-4b-fp8", "--dry-run", "--slurm.partition", "gpus"]) == 2
    assert (
        "a start would be refused here: --slurm.partition gpus: there is no partition gpus" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", [["worker"], ["after", "1"]])
def test_dry_runs_of_what_only_a_job_calls_are_refused(command, capsys):
    from fp8slurm.cli import main

    assert main([*command, "--recipe", "tiny-fp8", "--dry-run"]) == 2
    output = capsys.readouterr().err
    assert "--dry-run: " in output and "fp8slurm submit --dry-run" in output


def test_of_several_partitions_one_must_fit(slurm):
    slurm["scontrol"] = PARTITIONS.replace("GraceTime=30", "GraceTime=0")
    assert (
        cluster.check_cluster(config(partition="spot,gpu", nodes=3)) == []
    )  # spot is too small, so its short notice does not count
    (warning,) = cluster.check_cluster(config(partition="spot,gpu", nodes=2, time="3-00"))
    assert "partition spot is preemptible" in warning


def test_nodes_that_are_away_are_a_warning(slurm):
    """sbatch --test-only refuses what plain sbatch queues until they are back."""
    slurm["sbatch"] = SlurmError("allocation failure: Requested node configuration is not available")
    slurm["nodes"] = "NodeName=n1 State=IDLE Partitions=gpu \nNodeName=n2 State=DOWN*+DRAIN Partitions=spot \n"
    with pytest.raises(ValueError, match="configuration is not available"):
        cluster.check_cluster(config())
    slurm["nodes"] += (
        "NodeName=n3 State=IDLE+DRAIN Partitions=all,gpu Reason=x \nNodeName=n4 State=IDLE+NOT_RESPONDING Partitions=gpu\n"
    )
    (warning,) = cluster.check_cluster(config())
    assert warning.endswith("away: n3 (IDLE+DRAIN), n4 (IDLE+NOT_RESPONDING)")
    slurm["sbatch"] = SlurmError("Invalid account")
    with pytest.raises(ValueError, match="Invalid account"):
        cluster.check_cluster(config())


def test_the_time_limit_and_the_notice_are_compared_with_what_was_measured(slurm, tmp_path):
    c = config(time="5", signal_delay_s=60)
    c = c.model_copy(update={"run": c.run.model_copy(update={"root": tmp_path})})
    (tmp_path / "qwen").mkdir()
    assert cluster.check_cluster(c) == []
    (tmp_path / "qwen" / "pace.json").write_text('{"step_s": 40.0, "save_s": 20.0}')
    (warning,) = cluster.check_cluster(c)
    assert "slurm.signal_delay_s 60" in warning
    (tmp_path / "qwen" / "pace.json").write_text('{"step_s": 200.0, "save_s": 60.0}')
    with pytest.raises(ValueError, match="--slurm.time 5 .300 s. is shorter than one step and one save"):
        cluster.check_cluster(c)


def test_a_preemption_without_time_to_save_is_named(slurm, tmp_path):
    c = config(partition="spot")
    c = c.model_copy(update={"run": c.run.model_copy(update={"root": tmp_path})})
    assert cluster.check_cluster(c) == []
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "pace.json").write_text('{"step_s": 10.0, "save_s": 40.0}')
    (warning,) = cluster.check_cluster(c)
    assert "partition spot" in warning and "30 s of notice, a save takes 40 s" in warning
    slurm["scontrol"] = PARTITIONS.replace("GraceTime=30", "GraceTime=0")
    (warning,) = cluster.check_cluster(config(partition="spot"))
    assert "no time to save" in warning and "checkpoint.every 10 steps" in warning


def test_a_second_job_is_refused_while_the_first_waits_or_runs(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "qwen")
    (run.path / SLURM_FOLDER).mkdir(parents=True)
    states = {"41": "COMPLETED", "42": "PENDING"}
    monkeypatch.setattr(job, "show_job", lambda id: {"JobState": states[id]})
    submit.refuse_second_job(run)
    for id in states:
        (run.path / SLURM_FOLDER / f"{id}_submitted.pkl").touch()
    with pytest.raises(RunBusyError, match="job 42"):
        submit.refuse_second_job(run)
    states["42"] = "FAILED"
    submit.refuse_second_job(run)
    run.acquire({"job": "43"})  # a hand-written script's
    states["43"] = "RUNNING"
    with pytest.raises(RunBusyError, match="job 43"):
        submit.refuse_second_job(run)


def test_a_job_that_is_being_ended_may_come_back(tmp_path, monkeypatch):
    """A requeued job is COMPLETING before it waits again; a next start of a run is not held up by one that is cut off."""
    run = RunDirectory(tmp_path / "qwen")
    run.acquire({"job": "43"})
    monkeypatch.setattr(job, "show_job", lambda id: {"JobState": "COMPLETING"})
    with pytest.raises(RunBusyError, match="job 43, which is COMPLETING.*try again when"):
        submit.refuse_second_job(run)
    assert holder({"job": "43"}) is None


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that writes its environment to a file; `sbatch(lines)` says what it does after that."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(job, "show_job", lambda id: None)

    def command(*lines: str) -> Path:
        for name, does in {"srun": [], "sbatch": [f"env > {tmp_path}/environment", *lines]}.items():
            (folder / name).write_text("\n".join(["#!/bin/sh", *does, ""]))
            (folder / name).chmod(0o755)
        return tmp_path / "environment"

    return command


def test_what_only_sbatch_itself_refuses_is_one_line(sbatch, tmp_path, capsys):
    reason = "QOSMaxSubmitJobPerUserLimit"
    sbatch(
        f"echo 'sbatch: error: {reason}' >&2",
        "echo 'sbatch: error: Batch job submission failed: Job violates policy' >&2",
        "exit 1",
    )
    c = config()
    with pytest.raises(submit.RefusedError) as error:
        submit.submit(c.model_copy(update={"run": c.run.model_copy(update={"root": tmp_path})}))
    assert str(error.value) == f"Slurm refuses this job: {reason}; Batch job submission failed: Job violates policy"
    assert capsys.readouterr().err == ""


def test_sbatch_is_started_without_variables_that_contradict_the_settings(sbatch, tmp_path, monkeypatch):
    file = sbatch("echo Submitted batch job 7")
    for name in ("SBATCH_PARTITION", "SBATCH_NO_REQUEUE", "SBATCH_EXPORT", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    c = config(partition="gpu")
    assert submit.submit(c.model_copy(update={"run": c.run.model_copy(update={"root": tmp_path})})) == "7"
    assert [x for x in file.read_text().splitlines() if x.startswith("SBATCH")] == ["SBATCH_ACCOUNT=x"]


def test_a_finished_run(tmp_path):
    c = config()
    run = RunDirectory(tmp_path / "qwen")
    assert not finished(c, run)
    for step, complete in ((c.run.steps, False), (c.run.steps - 1, True)):
        folder = run.checkpoints / f"step_{step:06d}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "COMPLETE").touch()
    assert not finished(c, run)
    (run.checkpoints / f"step_{c.run.steps:06d}" / "COMPLETE").touch()
    assert finished(c, run)
