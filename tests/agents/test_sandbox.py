import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from fp8slurm.agents.confined import STEPS
from fp8slurm.agents.sandbox import Limits, Sandbox
from fp8slurm.core.errors import InputError
from fp8slurm.core.processes import python_path

QUICK = Limits(timeout_s=60)
SHORT = Limits(timeout_s=1)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Where calls have their files: its name is in their processes' arguments."""
    (tmp_path / "calls").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "calls"))
    yield
    assert list((tmp_path / "calls").iterdir()) == []


@pytest.fixture(params=["apart", "as the kernel refuses"])
def sandbox(request):
    made = Sandbox(QUICK)
    if request.param == "apart" and made.steps != tuple(STEPS):
        pytest.skip(f"this kernel allows only {made.steps}")
    if request.param != "apart":
        made.steps = ()
    return made


def run(sandbox, *args, **kwargs):
    return asyncio.run(sandbox.run(*args, **kwargs))


def of_calls(tmp_path):
    """Processes of calls that live, children that have kept the arguments among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(tmp_path).encode() in (path / "cmdline").read_bytes():
                found.append(path.name)
        except OSError:
            pass
    return found


def wait_gone(tmp_path):
    """The kernel ends the rest of a killed call behind our back."""
    deadline = time.monotonic() + 20
    while of_calls(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return of_calls(tmp_path) == []


def test_what_it_prints_and_reads(sandbox):
    result = run(sandbox, "import sys\nprint(sys.stdin.read() + 'é'); print('and', file=sys.stderr)", stdin="given ")
    assert result.ok and result.text == result.output == "given é\nand\n"


def test_an_exception_is_shown_with_its_line_and_nothing_of_ours(sandbox):
    result = run(sandbox, "x = 1\ny = x / 0")
    assert (result.ended, result.status, result.ok) == ("exit", 1, False)
    assert "line 2" in result.output and "y = x / 0" in result.output and "confined" not in result.output
    assert result.text.endswith("ZeroDivisionError: division by zero\n[ended with status 1]")
    assert "SyntaxError" in run(sandbox, "a b").output


def test_one_that_hangs_is_killed(sandbox, tmp_path):
    result = run(sandbox, "print('begun')\nwhile True: pass", limits=SHORT)
    assert result.ended == "timeout" and result.text.endswith("[killed after 1 s]")
    assert wait_gone(tmp_path)


def test_one_that_prints_a_gigabyte_is_cut_off(sandbox):
    result = run(sandbox, "import sys\nfor _ in range(1024): sys.stdout.write('x' * 2**20)")
    assert result.ended == "output" and result.output == "x" * 16_384
    assert result.text.endswith("[cut off: more than 16384 bytes of output]")
    exact = run(sandbox, "print('x' * 99)", limits=Limits(output_bytes=100))
    assert exact.ok and len(exact.output) == 100


def test_memory_and_files_are_limited(sandbox):
    assert "MemoryError" in run(sandbox, "bytearray(10**9)").output
    assert "File too large" in run(sandbox, "f = open('x', 'wb')\nfor _ in range(99): f.write(b'x' * 2**20)").output


def test_children_do_not_outlive_it(sandbox, tmp_path):
    code = "import os, time\nif os.fork() == 0: time.sleep(600)\nprint('done')"
    for _ in range(3):
        assert run(sandbox, code).text == "done\n"
    assert run(sandbox, code + "\ntime.sleep(600)", limits=SHORT).ended == "timeout"
    assert wait_gone(tmp_path)


def test_children_in_a_session_of_their_own_do_not_outlive_it(tmp_path):
    sandbox = Sandbox(QUICK)
    if "namespaces" not in sandbox.steps:
        pytest.skip("only a process namespace reaches them")
    code = "import os, time\nfor _ in range(20):\n if os.fork() == 0: os.setsid(); os.fork(); time.sleep(600)\nprint('done')"
    assert run(sandbox, code).text == "done\n"
    assert wait_gone(tmp_path)


def test_standard_input_that_is_closed_or_not_read(sandbox):
    code = "import os, sys\ntry: os.write(0, b'x')\nexcept OSError: print('refused')\nsys.stdin.close(); os.close(1)"
    result = run(sandbox, code, stdin="x" * 10_000_000)
    assert result.ok and result.output == "refused\n"


def test_a_signal_is_named(sandbox):
    result = run(sandbox, "import ctypes; ctypes.string_at(0)")
    assert (result.ended, result.status, result.why) == ("signal", -11, "ended by signal SIGSEGV")


def test_a_cancelled_call_leaves_nothing(sandbox, tmp_path):
    async def cancel():
        call = asyncio.create_task(sandbox.run("import time; time.sleep(600)"))
        while not of_calls(tmp_path):
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(cancel())
    assert wait_gone(tmp_path)


def test_it_sees_nothing_of_the_environment(sandbox, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very secret")
    assert "secret" not in run(sandbox, "import os; print(dict(os.environ))").output


def test_calls_at_once_without_threads():
    """256 calls, 100 processes at a time: all are there, and no thread was added."""
    sandbox, most = Sandbox(QUICK, at_once=100), []

    async def one(i):
        result = await sandbox.run(f"print({i})", stdin="x")
        most.append(threading.active_count())
        return result.text

    async def all_of_them():
        return await asyncio.gather(*(one(i) for i in range(256)))

    before = threading.active_count()
    assert asyncio.run(all_of_them()) == [f"{i}\n" for i in range(256)]
    assert max(most) == before
    assert len(os.listdir("/proc/self/fd")) < 100


@pytest.fixture
def apart():
    sandbox = Sandbox(QUICK)
    if sandbox.steps != tuple(STEPS):
        pytest.skip(f"this kernel allows only {sandbox.steps}")
    return sandbox


def test_no_network_and_no_foreign_process(apart):
    server = subprocess.Popen(
        [sys.executable, "-c", "import socket as s; l = s.create_server(('127.0.0.1', 0)); print(l.getsockname()[1], flush=True); l.accept()"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        port = int(server.stdout.readline())
        result = run(apart, f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)")
        assert "unreachable" in result.output or "refused" in result.output
        code = "import os\nprint([p for p in os.listdir('/proc') if p.isdigit()])\n"
        result = run(apart, code + f"os.kill({server.pid}, 9)")
        assert "['1']" in result.output and "ProcessLookupError" in result.output
        assert server.poll() is None
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_files_can_be_read_but_not_written(apart, tmp_path):
    (tmp_path / "checkpoint").write_text("weights")
    path = str(tmp_path / "checkpoint")
    assert run(apart, f"print(open({path!r}).read())").output == "weights\n"
    for code in (f"open({path!r}, 'w')", f"import os; os.remove({path!r})", "open('/dev/shm/x', 'w')"):
        assert "Read-only file system" in run(apart, code).output
    undo = "import ctypes; print(ctypes.CDLL(None).mount(None, b'/', None, 4096 | 32, None))"
    assert run(apart, undo).output == "-1\n"
    assert (tmp_path / "checkpoint").read_text() == "weights"
    assert run(apart, "open('mine', 'w').write('x'); print(open('mine').read())").output == "x\n"


def test_hidden_folders(apart, tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "train.jsonl").write_text("42")
    hiding = Sandbox(QUICK, hidden=[tmp_path / "labels"])
    code = f"import os; print(os.listdir({str(tmp_path / 'labels')!r}))"
    assert run(hiding, code).output == "[]\n"
    assert run(apart, code).output == "['train.jsonl']\n"
    with pytest.raises(InputError, match="these folders look empty.*nowhere"):
        Sandbox(QUICK, hidden=[tmp_path / "nowhere"])


def test_a_step_that_fails_later_is_no_result(apart, tmp_path):
    (tmp_path / "labels").mkdir()
    hiding = Sandbox(QUICK, hidden=[tmp_path / "labels"])
    (tmp_path / "labels").rmdir()
    with pytest.raises(RuntimeError, match="could not be kept apart.*hidden"):
        run(hiding, "print(1)")


def test_what_the_kernel_refuses_is_said_at_the_start(tmp_path, monkeypatch):
    """Within a chroot no user namespace can be made."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1)")
    code = """
import asyncio, logging
from fp8slurm.agents.sandbox import Sandbox
logging.basicConfig()
sandbox = Sandbox()
print(sandbox.steps, asyncio.run(sandbox.run("print(6 * 7)")).text)
for arguments in ({"isolation": "required"}, {"hidden": ["/home"]}):
    try: Sandbox(**arguments)
    except Exception as error: print(type(error).__name__, error)
"""
    jail = tmp_path / "jail"
    jail.mkdir()
    inside = 'mount --rbind / $0 && exec chroot $0 $1 -c "$2"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, jail, sys.executable, code],
        env=os.environ | {"PYTHONPATH": python_path(), "TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if "mount" in done.stderr and done.returncode:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert "() 42" in done.stdout, done.stderr
    assert "no network" in done.stderr and "They run without" in done.stderr
    assert done.stdout.count("InputError the kernel does not let this user run tools with: no network") == 2


FORKS = """
import os, time
made = 0
try:
    while made < 40:
        if os.fork() == 0: time.sleep(600)
        made += 1
except OSError as error: print(error.strerror)
print(made)
"""


def test_processes_are_limited_for_each_call_by_itself(apart):
    """Linux does not count root's, so as root another user runs them, who may read what root may."""
    code = f"""
import asyncio
from fp8slurm.agents.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(timeout_s=60, processes=8), isolation="required")
async def both(): return await asyncio.gather(*(sandbox.run({FORKS!r}) for _ in range(2)))
for result in asyncio.run(both()): print(result.text)
"""
    command = [sys.executable, "-c", code]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv(1)")
        reads = "+dac_read_search,+dac_override"
        nobody = f"--reuid 65534 --regid 65534 --clear-groups --inh-caps {reads} --ambient-caps {reads}"
        command = ["setpriv", *nobody.split(), *command]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": python_path()}, capture_output=True, text=True, timeout=120
    )
    # of the eight one is the code's, and one waits for it
    assert done.stdout.split("\n\n") == ["Resource temporarily unavailable\n6"] * 2 + [""], done.stdout + done.stderr


def test_bad_limits():
    with pytest.raises(InputError, match="timeout_s=0"):
        Limits(timeout_s=0)
    with pytest.raises(InputError, match="at_once=0"):
        Sandbox(at_once=0)
