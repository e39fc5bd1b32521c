"""A running tiny job as another user of the same node sees it, and as somebody sees it who looks for its secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tiny import write_model
from tiny_task import write_data

from fp8slurm.observe.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, and reads memory")]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
NOBODY = 65534


@dataclass
class Job:
    process: subprocess.Popen
    run: Path
    log: Path

    def family(self) -> list[psutil.Process]:
        return [
            p for p in psutil.Process(self.process.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE
        ]

    def named(self, text: str) -> list[psutil.Process]:
        return [p for p in self.family() if text in " ".join(p.cmdline())]

    @property
    def engine(self) -> psutil.Process:
        return self.named("fp8slurm.engine.child")[0]

    @property
    def engine_port(self) -> int:
        return next(c.laddr.port for c in self.engine.net_connections("tcp") if c.status == psutil.CONN_LISTEN)

    @property
    def store(self) -> dict:
        return json.loads((self.run / "attempts" / "0" / "store.json").read_text())

    def steps(self) -> int:
        try:
            return max((r["step"] for r in read_metrics(self.run) if r["phase"] == "rl"), default=-1)
        except ValueError:
            return -1

    def wait_step(self, step: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.steps() < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stranger(self, *more: str) -> dict:
        """What tests/security/stranger.py does as user nobody."""
        pids = [p.pid for p in self.family()]
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable]
        arguments = [str(self.run), str(self.store["port"]), str(self.engine_port), json.dumps(pids), *more]
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONDONTWRITEBYTECODE": "1",
            "JOB_PORTS": json.dumps(sorted(ports(self))),
        }
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "security" / "stranger.py"), *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd="/",
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def listening(job: Job) -> list[tuple[str, str, int]]:
    """(process, address, port) of everything of the job that listens, UDP included."""
    out = []
    for p in job.family():
        out.extend(
            (" ".join(p.cmdline()), c.laddr.ip, c.laddr.port)
            for c in p.net_connections("inet")
            if c.status == psutil.CONN_LISTEN or (c.type == 2 and c.laddr)
        )
    return out


def ports(job: Job) -> set[int]:
    return {port for _, _, port in listening(job)}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("security")
    # pytest's folders are closed to others; a real run folder has nothing but its own mode
    opened = [
        (p, p.stat().st_mode)
        for p in [folder, *folder.parents]
        if p.stat().st_uid == os.geteuid() and p != Path("/tmp") and p != Path("/")
    ]
    for p, mode in opened:
        p.chmod(mode | 0o055)
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    write_model(folder / "model")
    write_data(folder / "data")
    data, log = folder / "data", folder / "output"
    flags = {
        "run.name": "job",
        "run.root": folder / "runs",
        "run.steps": 100000,
        "model.hf-checkpoint": folder / "model",
        "data.train": data / "train.jsonl",
        "data.eval": data / "eval.jsonl",
        "sft.data": data / "sft.jsonl",
        "sft.max-steps": 2,
        "sft.batch-size": 16,
        "sft.eval-every": 0,
        "rollout.prompts-per-step": 4,
        "rollout.n-samples": 4,
        "rollout.save-every": 1,
        "eval.every": 0,
        "checkpoint.every": 100000,
        "sync.verify": "off",
    }
    command = [
        sys.executable,
        "-m",
        "fp8slurm.cli",
        "train",
        "--recipe",
        "tiny-fp8",
        *(f"--{k}={v}" for k, v in flags.items()),
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--rollout.no-drop-no-signal"], stdout=out, stderr=subprocess.STDOUT, cwd=ROOT
        )
    job = Job(process, folder / "runs" / "job", log)
    try:
        job.wait_step(1)
        yield job
    finally:
        if process.poll() is None:
            process.terminate()  # SIGINT is ignored by what a script starts in the background
        process.wait(TIMEOUT_S)
        for p, mode in opened:
            p.chmod(mode)
        shutil.rmtree(folder, ignore_errors=True)


def test_everything_that_listens_is_on_loopback_and_explained(job):
    found = listening(job)
    assert found and {ip for _, ip, _ in found} == {"127.0.0.1"}, found
    http, gloo = job.engine_port, set()
    for command, _, port in found:
        if port == http:
            continue  # SGLang's HTTP server; its forked processes inherit the socket
        # what is left are the store and gloo's own listeners, of ranks, rollout worker and SGLang's scheduler
        assert "submitit.core._submit" in command or command.startswith("sglang::scheduler"), (command, port)
        gloo.add(port)
    assert job.store["port"] in gloo
    run = str(job.run)
    for p in job.family():
        for c in p.net_connections("unix"):
            if c.laddr and c.status != "ESTABLISHED":
                assert c.laddr.startswith(
                    (run, f"{tempfile.gettempdir()}/fp8slurm-")  # a folder of its own, where the run's path is too long
                ), f"{c.laddr} of {p.cmdline()} is outside the run's folder"


def test_the_run_folder_is_closed(job):
    assert job.run.stat().st_mode & 0o777 == 0o700
    assert job.run.parent.stat().st_mode & 0o055, "this test must be able to fail: the folder above is open"
    assert (job.run / "attempts" / "0" / "store.json").stat().st_mode & 0o777 == 0o600


def secret_of_the_engine(job: Job) -> str:
    """The API key, out of the engine's memory: nothing else knows it."""
    with open(f"/proc/{job.engine.pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{job.engine.pid}/maps").read_text().splitlines():
            where, mode, *_ = line.split()
            path = line.split()[5] if len(line.split()) > 5 else ""
            start, end = (int(a, 16) for a in where.split("-"))
            if not mode.startswith("rw") or path.startswith("/") or end - start > 2**30:
                continue
            try:
                memory.seek(start)
                held = memory.read(end - start)
            except OSError:
                continue
            for candidate in set(re.findall(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])", held)):
                if status(job, candidate.decode()) == 200:
                    return candidate.decode()
    pytest.fail("no API key was found in the engine's memory")


def status(job: Job, key: str) -> int:
    request = urllib.request.Request(
        f"http://127.0.0.1:{job.engine_port}/model_info", headers={"Authorization": f"Bearer {key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_secret_is_in_arguments_environment_or_files(job):
    secrets = {"API key": secret_of_the_engine(job), "store's key": job.store["key"]}
    job.wait_step(job.steps() + 1)
    processes = [psutil.Process(job.process.pid), *job.family()]
    places = {f"command line of {p.pid}": " ".join(p.cmdline()).encode() for p in processes}
    places |= {f"environment of {p.pid}": Path(f"/proc/{p.pid}/environ").read_bytes() for p in processes}
    places |= {
        str(f): f.read_bytes()
        for f in job.run.rglob("*")
        if f.is_file() and f.name != "store.json" and f.suffix != ".distcp"
    }
    places["terminal"] = job.log.read_bytes()
    assert any("engine_0.log" in p and held for p, held in places.items())
    for name, secret in secrets.items():
        assert not [place for place, held in places.items() if secret.encode() in held], name


def test_another_user_gets_nothing(job):
    before = job.steps()
    said = job.stranger()
    assert said["uid"] == NOBODY
    for how in ("without_key", "wrong_key"):
        assert set(said[how].values()) == {401}, said[how]
    assert said["readable"] == [] and said["shared_memory"] == []
    assert said["knocked"] >= 10
    # the store can be read by whoever finds its port: no prompt and no response is in it
    assert said["keys"] > 10 and said["values"]
    questions = re.compile(r"\d{3}\|\d{3}")  # what every prompt of this data has in it
    assert questions.search(next((job.run / "rollouts").glob("*.jsonl")).read_text())
    assert not [value for value in said["values"] if questions.search(value)]
    job.wait_step(before + 2)
    assert status(job, "0" * 64) == 401


def test_a_command_of_another_user_is_not_obeyed(job):
    """The last of this file: the job notices what was forged, says so and ends."""
    said = job.stranger("forge")
    assert said["forged"] > 0
    assert job.process.wait(TIMEOUT_S) == 1
    assert "was not written by this run" in job.log.read_text()
