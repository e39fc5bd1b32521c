"""What Slurm's environment and commands say."""

import socket
import subprocess

import pytest

from fp8slurm.process.environment import set_gpus
from fp8slurm.scheduler import job
from fp8slurm.scheduler.job import Job


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    import os

    for name in [n for n in os.environ if n.startswith(("SLURM", "CUDA"))]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "text, minutes",
    [("90", 90), ("2:30", 3), ("04:00:00", 240), ("0:0:1", 1), ("1-00", 1440), ("2-01:30", 2970), ("1-02:03:04", 1564)],
)
def test_time_limits(text, minutes):
    assert job.minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "four", "1:2:3:4", "-5", "1.5"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="no time"):
        job.minutes(text)


def test_the_job_of_a_process(monkeypatch):
    assert Job.here() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert Job.here() == Job("12", 0, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert Job.here() == Job("12", 3, "0")
    monkeypatch.setenv("SLURM_STEP_ID", str(0xFFFFFFFB))  # the job script
    assert Job.here() == Job("12", 3, None)


def test_ranks_take_the_gpus_that_slurm_gave(monkeypatch):
    import os

    assert job.gpu_list() == []
    monkeypatch.setenv("SLURM_JOB_GPUS", "2,3,6,7")
    assert job.gpu_list() == ["2", "3", "6", "7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")  # renumbered by a cgroup: this is what CUDA understands
    assert job.gpu_list() == ["0", "1", "2", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    set_gpus(4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3,6,7"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(ValueError, match="4 GPUs.*2,3,6,7.*--slurm.gpus-per-node is 8"):
        set_gpus(8)
    monkeypatch.setenv("SLURM_GPU_BIND", "single:1")
    with pytest.raises(ValueError, match="gave this task 4 GPUs.*; SLURM_GPU_BIND=single:1 binds GPUs to tasks"):
        set_gpus(8)


@pytest.mark.parametrize("environment, bound", [
    ({}, ""), ({"SLURM_GPU_BIND": "none"}, ""), ({"SLURM_TRES_PER_TASK": "cpu:4"}, ""),
    ({"SLURM_GPUS_PER_TASK": "1"}, "SLURM_GPUS_PER_TASK=1"),
    ({"SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}, "SLURM_TRES_PER_TASK=cpu:4,gres/gpu:1"),
])  # fmt: skip
def test_what_gives_each_task_gpus_of_its_own(environment, bound):
    assert job.gpu_binding(environment) == bound


@pytest.mark.parametrize("chosen", ["lo", "l", "=lo", "ib0,lo", "^ib", "^=l", ""])
def test_an_interface_that_nccl_finds(chosen):
    assert job.no_such_interface(chosen) == ""


@pytest.mark.parametrize("chosen", ["ib7", "=l", "ib7,=lo", "=ib7:1"])
def test_an_interface_that_nccl_does_not_find(chosen):
    assert job.no_such_interface(chosen).startswith(f"NCCL_SOCKET_IFNAME={chosen}: no network interface")


def test_fields_of_scontrol():
    line = (
        "JobId=3 JobName=a=b UserId=root(0) JobState=RUNNING EndTime=2026-11-23T20:34:11 Reason=None NodeList=node[1-2]"
    )
    shown = job.fields(line)
    assert shown["JobId"] == "3" and shown["JobState"] == "RUNNING" and shown["NodeList"] == "node[1-2]"
    assert job.parse_time(shown["EndTime"]) > 0 and job.parse_time("Unknown") is None


def test_times_do_not_follow_a_format_of_the_users_own(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$SLURM_TIME_FORMAT" = standard ] && t=2026-11-23T20:34:11 || t=20:34\necho "JobId=3 EndTime=$t"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "%H:%M")
    assert job.end_time("3") == job.parse_time("2026-11-23T20:34:11")


def test_a_command_that_is_not_there():
    with pytest.raises(job.SlurmError, match="no such command"):
        job.ask("no-such-slurm-command")


@pytest.mark.parametrize("launcher, name, says", [
    ("fd00::1", "n1", "no IPv4 route to fd00::1, where srun was started .*IPv4"),
    ("", "no-such-host.invalid", "name no-such-host.invalid has no IPv4 address .*resolve"),
])  # fmt: skip
def test_a_node_without_an_ipv4_address_is_named(monkeypatch, launcher, name, says):
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", launcher)
    monkeypatch.setenv("SLURMD_NODENAME", name)
    with pytest.raises(job.SlurmError, match=says):
        job.address()


def test_the_address_is_that_of_the_interface_towards_the_launcher(monkeypatch):
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    assert job.address() == "127.0.0.1" and job.interface_of("127.0.0.1") == "lo"
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(job.SlurmError, match="127.0.1.1"):
        job.address()


def test_a_job_inherits_nothing_that_describes_another():
    kept = job.environment_for_a_job({"SLURM_CONF": "c", "SLURM_JOB_ID": "1", "SUBMITIT_FOLDER": "f", "PATH": "p"})
    assert kept == {"SLURM_CONF": "c", "PATH": "p"}


def test_variables_of_sbatch_do_not_win_over_what_a_script_asks_for():
    script = "#!/bin/bash\n#SBATCH --partition=gpu\n#SBATCH --requeue\n#SBATCH --time=5\n#SBATCH --mem=0\n#SBATCH --gpus-per-node=8\n"
    never = {"SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "0-3", "SBATCH_WAIT": "1"}
    covered = {
        "SBATCH_PARTITION": "x",
        "SBATCH_NO_REQUEUE": "1",
        "SBATCH_TIMELIMIT": "9",
        "SBATCH_MEM_PER_CPU": "1",
        "SBATCH_GPUS": "2",
    }
    free = {"SBATCH_ACCOUNT": "mine", "SBATCH_QOS": "q", "PATH": "p"}
    assert job.environment_for_a_job(never | covered | free, script) == free
    assert job.environment_for_a_job(never | covered | free) == covered | free
    assert job.environment_for_a_job({"SBATCH_GPUS_PER_NODE": "8", "SBATCH_QOS": "q"}, "#SBATCH --nodes=1\n") == {
        "SBATCH_QOS": "q"
    }, "none is asked for"
    assert job.environment_for_a_job({"SBATCH_REQUEUE": "1"}, "#SBATCH --no-requeue\n") == {}


def test_requeue_waits_for_the_controller_but_not_for_a_refusal(monkeypatch):
    answers = iter(["Unable to contact slurm controller (connect failure)", None])

    def ask(*command, **_):
        answer = next(answers)
        if answer:
            raise job.SlurmError(answer)
        return ""

    monkeypatch.setattr(job, "ask", ask)
    monkeypatch.setattr(job.time, "sleep", lambda s: None)
    job.requeue("7")
    answers = iter(["Requested operation is presently disabled for job 7"])
    with pytest.raises(job.SlurmError, match="disabled"):
        job.requeue("7")


def test_a_task_of_an_array_requeues_itself_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(job, "ask", lambda *command, **_: calls.append(command[1:]) or "JobId=5 JobState=RUNNING")
    for name, value in {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    job.requeue("5")
    job.show_job("5")
    job.requeue("4")  # somebody else's
    assert calls == [("requeue", "5_2"), ("-o", "show", "job", "5_2"), ("requeue", "4")]


def test_of_an_arrays_number_the_task_that_has_it_is_meant(monkeypatch):
    output = "JobId=6 ArrayJobId=5 JobState=COMPLETED\nJobId=5 ArrayJobId=5 JobState=RUNNING\n"
    monkeypatch.setattr(job, "ask", lambda *command, **_: output)
    assert job.show_job("5")["JobState"] == "RUNNING"


def test_a_job_is_asked_for_again_as_it_was():
    shown = {
        "Partition": "gpu",
        "Account": "(null)",
        "TimeLimit": "UNLIMITED",
        "Features": "",
        "NumNodes": "2",
        "Requeue": "0",
    }
    environment = {"SLURM_JOB_NAME": "my run", "SLURM_GPUS_PER_NODE": "8", "SLURM_PROCID": "3"}
    assert job.flags_of(shown, environment) == [
        "--partition=gpu", "--time=UNLIMITED", "--nodes=2", "--job-name=my run", "--gpus-per-node=8", "--no-requeue"
    ]  # fmt: skip
    assert job.flags_of({"Requeue": "1"}, {}) == []
    assert job.flags_of({}, {"SLURM_ARRAY_TASK_ID": "2"}) == ["--array=2"]


def test_the_arguments_of_a_job_script_come_from_its_process(tmp_path):
    script = tmp_path / "slurm_script"
    script.write_text("#!/bin/bash\necho started\nread line\n")
    script.chmod(0o700)
    environment = {"SLURM_JOB_ID": "4711", "PATH": "/usr/bin:/bin"}
    command = [str(script), "a b", "--x=1", ""]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        assert job.script_arguments("4711") == ["a b", "--x=1", ""] and job.script_arguments("471") == []
        process.communicate(b"\n")
    assert job.script_arguments("4711") == []
