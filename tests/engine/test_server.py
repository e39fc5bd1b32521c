"""The server as a child process: it says why it does not come up, and never outlives what started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fp8slurm.config.schema import EngineSection
from fp8slurm.engine import server
from fp8slurm.engine.server import Engine, EngineError, EngineSettings, meaningful_tail, server_arguments, vital_of

pytestmark = pytest.mark.slow

CPU = EngineSettings(EngineSection(ready_timeout_s=120, max_total_tokens=4096), cpu=True, cpu_threads=1)


def gone(pids: list[int], timeout_s: float = 20) -> bool:
    """Whether all of these processes end within the deadline."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        alive = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


def test_arguments() -> None:
    section = EngineSection(tensor_parallel_size=2, context_length=64, extra_args=["--attention-backend", "fa3"])
    gpu = server_arguments(Path("m"), EngineSettings(section, cpu=False, deterministic=True, seed=3), 4000)
    assert gpu[gpu.index("--tp-size") + 1] == "2" and gpu[gpu.index("--context-length") + 1] == "64"
    assert gpu[-2:] == ["--attention-backend", "fa3"] and "--enable-deterministic-inference" in gpu
    assert "--device" not in gpu and "--max-total-tokens" not in gpu and "--api-key" not in gpu
    assert gpu[gpu.index("--host") + 1] == "127.0.0.1"
    cpu = server_arguments(Path("m"), EngineSettings(section, cpu=True, deterministic=True), 4000)
    assert cpu[cpu.index("--device") + 1] == "cpu" and "--enable-deterministic-inference" not in cpu


def test_a_long_path_is_not_a_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zmq appends up to 40 characters, and a socket's path has 107 at most."""
    long = tmp_path / ("x" * 70)
    long.mkdir()
    monkeypatch.setattr(server.tempfile, "tempdir", str(long))
    folder = server._temporary_dir(long, "engine")
    try:
        assert len(str(folder)) + 40 <= 107 and folder.stat().st_mode & 0o777 == 0o700
    finally:
        folder.rmdir()


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-model has no config.json"):
        Engine(tmp_path / "no-such-model", tmp_path, CPU).start()


def test_broken_model_ends_with_its_reason(tmp_path: Path, write_fp8_model) -> None:
    write_fp8_model(tmp_path / "model", seed=0)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, 96]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    engine = Engine(tmp_path / "model", tmp_path / "log", CPU)
    engine.start()
    process = engine._process.pid
    with pytest.raises(EngineError) as error:
        engine.wait_ready()
    last = str(error.value).splitlines()[-1]
    assert "died while starting" in str(error.value) and "weight_block_size" in last and "sigquit" not in last
    assert not engine.alive() and gone([process], 1)


def test_a_child_that_ends_before_it_was_told_anything(tmp_path: Path, write_fp8_model, monkeypatch) -> None:
    """stop() of it comes to its end, as of any other."""
    real = subprocess.Popen

    class Ended(real):
        def __init__(self, command, **more):
            super().__init__([sys.executable, "-c", ""], **more)
            self.wait()

    write_fp8_model(tmp_path / "model", seed=0)
    engine = Engine(tmp_path / "model", tmp_path / "log", CPU)
    monkeypatch.setattr(subprocess, "Popen", Ended)
    with pytest.raises(BrokenPipeError):
        engine.start()
    monkeypatch.undo()
    stop_policy = threading.Thread(target=engine.stop, daemon=True)
    stop_policy.start()
    stop_policy.join(30)
    assert not stop_policy.is_alive() and not engine.alive()


def test_deadline(tmp_path: Path, write_fp8_model) -> None:
    write_fp8_model(tmp_path / "model", seed=0)
    engine = Engine(tmp_path / "model", tmp_path / "log", CPU)
    engine.start()
    process = engine._process.pid
    with pytest.raises(
        EngineError, match=r"not ready after 0.5 s \(engine.ready_timeout_s; a first start compiles kernels\)"
    ):
        engine.wait_ready(0.5)
    assert not engine.alive() and gone([process], 1)


AGENT = """
import json, sys, threading, time
from pathlib import Path
from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.server import Engine, EngineSettings

section = EngineSection(ready_timeout_s=120, max_total_tokens=4096)
engine = Engine(Path(sys.argv[1]), Path(sys.argv[2]), EngineSettings(section, cpu=True, cpu_threads=1))
starter = threading.Thread(target=engine.start)  # PDEATHSIG would follow this thread
starter.start(); starter.join(); del starter
engine.wait_ready()
print(json.dumps([p.pid for p in engine._family()]), flush=True)
time.sleep(600)
"""


def test_nothing_survives_a_killed_worker(tmp_path: Path, write_fp8_model) -> None:
    write_fp8_model(tmp_path / "model", seed=0)
    shm_before = set(os.listdir("/dev/shm"))
    worker = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path / "model"), str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    try:
        family = json.loads(worker.stdout.readline())
        assert len(family) >= 3
        os.killpg(family[0], signal.SIGUSR2)  # Slurm's warning goes to every process of the step
        time.sleep(0.5)
        assert all(psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in family)
    finally:
        worker.kill()
        worker.wait()
    assert gone(family)
    left = {name for name in set(os.listdir("/dev/shm")) - shm_before if name.startswith(("sglang_", "sgl_shm"))}
    # other servers may come and go meanwhile: their segments carry other process ids, or are mapped by somebody
    assert not {n for n in left if any(str(p) in n for p in family)} and not _unmapped(left)


def _unmapped(names: set[str]) -> set[str]:
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text = maps.read_text()
        except OSError:
            continue
        names = {n for n in names if n not in text}
    return {n for n in names if Path("/dev/shm", n).exists()}


def test_stop_leaves_nothing(tmp_path: Path, write_fp8_model) -> None:
    write_fp8_model(tmp_path / "model", seed=0)
    engine = Engine(tmp_path / "model", tmp_path / "log", CPU)
    engine.start()
    with pytest.raises(RuntimeError, match="running already"):
        engine.start()
    temporary, process = engine._temporary, engine._process.pid
    engine.stop()
    engine.stop()
    assert gone([process], 1) and not engine.alive() and not temporary.exists()


TREE = """
import subprocess, sys, time
if sys.argv[1:] == ["child"]:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(helper.pid, flush=True)
else:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "multiprocessing.resource_tracker"])
    subprocess.Popen([sys.executable, __file__, "child"])  # the last: the test goes on when it prints
time.sleep(600)
"""


def test_only_what_the_server_started_itself_takes_it_along(tmp_path: Path) -> None:
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True)
    engine, exited = Engine(tmp_path, tmp_path, CPU), threading.Event()
    try:
        helper = int(server.stdout.readline())
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) == 4
        child = psutil.Process(helper).parent()
        assert [p.pid for p in vital_of(family)] == [server.pid, child.pid]
        watcher = threading.Thread(target=engine._end_together, args=(vital_of(family), exited))
        watcher.start()
        os.kill(helper, signal.SIGKILL)  # as when torch closes its pool of compilers
        assert gone([helper]) and not watcher.join(1) and watcher.is_alive() and server.poll() is None
        child.kill()
        watcher.join(20)
        assert server.wait(20) == -signal.SIGKILL and gone([p.pid for p in family])
        assert "tree.py child" in engine._first_to_end and f"(pid {child.pid})" in engine._first_to_end
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def test_meaningful_tail() -> None:
    log = """[1] INFO starting
/x.py:3: UserWarning: who cares
  warnings.warn("who cares")
[2] Scheduler hit an exception: Traceback (most recent call last):
  File "a.py", line 1, in load
    raise ValueError("why")
ValueError: why

[3] Received sigquit from a child process. It usually means the child failed.
Traceback (most recent call last):
  File "b.py", line 1
SystemExit: 1
"""
    lines = meaningful_tail(log, 4).splitlines()
    assert lines[-1] == "ValueError: why" and lines[0].startswith("[2] Scheduler hit") and len(lines) == 4
    older = log.replace("Received sigquit from a child process. It", "SIGQUIT received. signum=None, frame=None. It")
    assert meaningful_tail(older, 4) == meaningful_tail(log, 4)
    assert meaningful_tail("a\n\nb\nc\n", 2) == "b\nc"
