"""The SGLang server as a supervised child process."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from fp8slurm.config.schema import EngineSection
from fp8slurm.core.errors import TransientInputError
from fp8slurm.core.processes import python_path
from fp8slurm.models.kv_scales import ATTENTION as KV_ATTENTION
from fp8slurm.run.phases import COMPILING, enter_phase

CPU_CACHE_TOKENS = 65536
LOOKS_S = 2.0
COMPILES = re.compile(r"DeepGEMM|CUDA graph begin|[Cc]ompil")
"""What SGLang logs when it compiles kernels or captures graphs, minutes at a first start on a GPU."""
_SOCKET_PATH_LIMIT = 60  # zmq appends up to 40 characters, and a socket's path ends at 107


class EngineError(RuntimeError):
    """The server did not come up, or died; the message ends with the last meaningful lines of its log."""


@dataclass(frozen=True)
class EngineSettings:
    """What a server needs to know of a run, besides its model."""

    section: EngineSection = EngineSection()
    cpu: bool | None = None
    """Run on the CPU, FP8 emulated; None: where no GPU is visible."""
    deterministic: bool = False
    """Only on GPUs does this change the server: seeds count there under --enable-deterministic-inference alone."""
    seed: int = 0
    """Seed of the samples that bring none of their own."""
    cpu_threads: int = 0
    """OMP_NUM_THREADS of each rank on the CPU (0: the engine's cores / ranks)."""
    share: tuple[int, int] = (0, 1)
    """Number of the engine on its machine, and how many share the machine's cores (on the CPU)."""
    exact: bool = False
    """Compute the trainer's bits (model.exact)."""
    return_routing: bool = False
    """Keep the experts of every token, for requests that ask for them."""
    sleeps: bool = False
    """Its memory can be released and resumed (GPUs only)."""
    gloo_interface: str = "lo"
    """Network interface of gloo: beyond this machine only where ranks on other nodes send weights over it."""
    gpus: tuple[str, ...] | None = None
    """Devices that the server may use, as CUDA_VISIBLE_DEVICES names them; None leaves that variable as it is."""

    @property
    def on_cpu(self) -> bool:
        if self.cpu is not None:
            return self.cpu
        import torch

        return torch.cuda.device_count() == 0


class Engine:
    """One SGLang server on 127.0.0.1: start, wait_ready, use (engine/client.py), stop or restart.

    It dies with this process, whatever ends it. Methods are for one thread at a time, but for `stop`, which also ends
    a server that another thread waits for.
    """

    def __init__(self, model_dir: Path, log_dir: Path, settings: EngineSettings, name: str = "engine-0") -> None:
        """model_dir: Hugging Face folder, whose config.json decides between FP8 and BF16. Logs to log_dir/name.log."""
        self.model_dir, self.settings, self.name = Path(model_dir), settings, name
        self.cpu = settings.on_cpu
        self.log_path = Path(log_dir) / f"{name}.log"
        self.api_key = secrets.token_hex(32)  # may not begin with a dash: SGLang's parser would take it for an option
        self.port = 0
        self._started_at = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        self._first_to_end = ""
        self._stopped = False
        self._stopping = threading.RLock()
        self._ready_pipe = -1
        self._log_start = 0
        self._temporary: Path | None = None

    @property
    def url(self) -> str:
        """http://127.0.0.1:PORT; the port changes with every start."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server without waiting for it. Raises RuntimeError if it runs, InputError for a missing model."""
        if self._process is not None and self.alive():
            raise RuntimeError(f"{self.name} is running already (pid {self._process.pid})")
        if not (self.model_dir / "config.json").is_file():
            raise TransientInputError(
                f"model directory {self.model_dir} has no config.json; give a Hugging Face checkpoint folder "
                "(--model.rollout-checkpoint)"
            )
        self._process = None
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = _temporary_dir(self.log_path.parent, self.name)
        self._exited, self._first_to_end, self._stopped = threading.Event(), "", False
        self._started_at = time.time()
        started: list[BaseException | None] = []
        launched = threading.Event()
        threading.Thread(
            target=self._supervise, args=(launched, started), name=f"{self.name}-supervisor", daemon=True
        ).start()
        launched.wait()
        if started[0] is not None:
            raise started[0]

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Block until the server answers. Raises EngineError, the server stopped, if it dies or the deadline passes."""
        timeout_s = self.settings.section.ready_timeout_s if timeout_s is None else timeout_s
        try:
            readable = self._wait_pipe(timeout_s)
            is_up = bool(readable) and bool(os.read(self._ready_pipe, 1))
        except (OSError, ValueError):  # another thread stopped it, and closed the pipe
            readable, is_up = [self._ready_pipe], False
        if is_up:
            family = self._family()
            _unlink_shared_memory(family)
            watch = (vital_of(family), self._exited)
            threading.Thread(target=self._end_together, args=watch, name=f"{self.name}-family", daemon=True).start()
            return
        what = (
            "died while starting"
            if readable
            else f"was not ready after {timeout_s:g} s (engine.ready_timeout_s; a first start compiles kernels)"
        )
        self.stop()
        raise EngineError(f"{self.name} {what}; the end of {self.log_path}:\n{self.log_tail()}")

    def _wait_pipe(self, timeout_s: float) -> list[int]:
        """Until the server says that it is ready or ends, which makes its pipe readable; empty: it is too late. Whether
        it compiles meanwhile stands in its log."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            readable, _, _ = select.select([self._ready_pipe], [], [], min(LOOKS_S, left))
            if readable or left <= LOOKS_S:
                return readable
            if COMPILES.search(self.log_tail(5)):
                enter_phase(COMPILING)

    def alive(self) -> bool:
        """Whether the server process runs (it takes its own children along when one of them dies)."""
        return self._process is not None and not self._exited.is_set()

    def wait_exit(self, timeout_s: float) -> bool:
        """Block until the server is gone, timeout_s at most; whether it is."""
        return self._process is None or self._exited.wait(timeout_s)

    def obituary(self) -> str:
        """Which process of a server that ended by itself was the first to end, and the end of its log; else ""."""
        process = self._process  # another thread's stop() takes it away
        if process is None or self._stopped or not self._exited.is_set():
            return ""
        first = self._first_to_end or f"the server (status {process.returncode})"
        return f"{first} ended; the end of {self.log_path}:\n{self.log_tail()}"

    def stop(self) -> None:
        """End the server and all its processes, now; remove what it left in /dev/shm and in its temporary folder."""
        with self._stopping:
            if self._process is not None:
                self._stopped = self._stopped or not self._exited.is_set()
                family = self._family()
                _kill_group(self._process.pid)
                self._exited.wait()
                deadline = time.monotonic() + 30
                while any(_runs(p) for p in family) and time.monotonic() < deadline:
                    time.sleep(0.02)
                os.close(self._ready_pipe)
                self._ready_pipe = -1
                self._process = None
                _unlink_orphans(self._started_at)
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def restart(self) -> None:
        """Stop, start and wait until ready: the weights are those of model_dir again, the port is another one."""
        self.stop()
        self.start()
        self.wait_ready()

    def log_tail(self, lines: int = 30) -> str:
        """The last meaningful lines that this start of the server has logged."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            return meaningful_tail(file.read().decode(errors="replace"), lines)

    def _supervise(self, launched: threading.Event, started: list[BaseException | None]) -> None:
        """Thread that creates the server and waits for its end: PDEATHSIG follows the creating thread."""
        try:
            self._launch()
            started.append(None)
        except BaseException as error:
            started.append(error)
            if self._process is None:
                return
            _kill_group(self._process.pid)  # begun, and never told what to do
        finally:
            launched.set()
        process = self._process
        assert process is not None
        process.wait()
        _kill_group(process.pid)
        self._exited.set()

    def _end_together(self, vital: list[psutil.Process], exited: threading.Event) -> None:
        """Thread that kills the server as soon as one of these processes ends; SGLang itself takes seconds for it."""
        if not vital:  # it has ended already; select would wait for ever
            return
        descriptors: dict[int, str] = {}
        try:
            for process in vital:
                title = f"{' '.join(process.cmdline()).strip()[:200]} (pid {process.pid})"  # setproctitle pads it
                descriptors[os.pidfd_open(process.pid)] = title
            ended, _, _ = select.select(list(descriptors), [], [])
            if not exited.is_set():
                self._first_to_end = descriptors[ended[0]]
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass
        for descriptor in descriptors:
            os.close(descriptor)
        if not exited.is_set():
            _kill_group(vital[0].pid)

    def _launch(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        ready_read, ready_write = os.pipe()
        self.port = listener.getsockname()[1]
        handover = {
            "arguments": server_arguments(self.model_dir, self.settings, self.port),
            "api_key": self.api_key,
            "exact": self.settings.exact,
            "fp8_cache": self.settings.section.kv_cache == "fp8",
            "listen_fd": listener.fileno(),
            "ready_fd": ready_write,
        }
        # inherited: a signal to the whole job cannot end the server before it ignores it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        with self.log_path.open("ab") as log, listener:
            self._log_start = log.tell()
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "fp8slurm.engine.child"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(), ready_write),
                start_new_session=True,
                env=self._environment(),
            )
        os.close(ready_write)
        self._ready_pipe = ready_read
        assert process.stdin is not None
        process.stdin.write(json.dumps(handover).encode() + b"\n")
        process.stdin.flush()

    def _environment(self) -> dict[str, str]:
        env = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",  # a queue.py in the working folder is none of the server's modules
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TMPDIR": str(self._temporary),
            # The rollout worker uses its connections again after a training step. A server that closes them meanwhile
            # (SGLang: after 5 s) may do so just as a request arrives, which is then lost.
            "SGLANG_TIMEOUT_KEEP_ALIVE": str(365 * 24 * 3600),
            "GLOO_SOCKET_IFNAME": self.settings.gloo_interface,
            # a file instead of a TCP port that listens on every interface
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self._temporary}/rendezvous",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            env.pop(name, None)  # the rollout worker's own process group is none of the server's business
        if self.settings.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.settings.gpus)
        if self.cpu:
            ranks = self.settings.section.tensor_parallel_size
            cores = share_of(sorted(os.sched_getaffinity(0)), *self.settings.share)
            threads = self.settings.cpu_threads or max(1, len(cores) // ranks)
            env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads)}
            env["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile would call the C++ compiler, and the triton stub
            env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost a busy machine ten times the work
            if ranks > 1:  # SGLang wants to be told which cores are whose
                shares = [cores[rank % len(cores) :: ranks] for rank in range(ranks)]
                env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
        return env

    def _family(self) -> list[psutil.Process]:
        """The server's processes that are there now."""
        assert self._process is not None
        try:
            server = psutil.Process(self._process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


def share_of(cores: list[int], number: int, count: int) -> list[int]:
    """The cores of engine `number` of `count`: as many as all others get, so that they compute the same bits."""
    each = max(1, len(cores) // count)
    return [cores[(number * each + i) % len(cores)] for i in range(each)]


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; makes no CUDA context."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def server_arguments(model_dir: Path, settings: EngineSettings, port: int) -> list[str]:
    """SGLang's command line for these settings, the API key left out."""
    cpu, section = settings.on_cpu, settings.section
    arguments = {
        "--model-path": str(model_dir),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": section.dtype,
        "--tp-size": str(section.tensor_parallel_size),
        "--ep-size": section.expert_parallel_size if section.expert_parallel_size > 1 else None,
        "--max-running-requests": str(section.max_running_requests),
        "--mem-fraction-static": str(section.mem_fraction),
        "--random-seed": str(settings.seed),
        "--log-level-http": "warning",
        "--context-length": section.context_length,
        "--max-total-tokens": section.max_total_tokens or (CPU_CACHE_TOKENS if cpu else None),
    }
    # token ids go in and come out: the rollout worker tokenizes
    switches = ["--skip-tokenizer-init"]
    if cpu:
        arguments |= {"--device": "cpu", "--attention-backend": "torch_native", "--sampling-backend": "pytorch"}
        # without --sleep-on-idle an idle server takes a whole core; without the radix cache a batch is computed the
        # same way whatever was computed before it
        switches += ["--disable-cuda-graph", "--disable-overlap-schedule", "--disable-radix-cache", "--sleep-on-idle"]
        switches += ["--skip-server-warmup"]
    elif section.kv_cache == "fp8":  # without a GPU it is emulated
        arguments["--kv-cache-dtype"] = "fp8_e4m3"
        if not any("--attention-backend" in text for text in section.extra_args):
            arguments["--attention-backend"] = KV_ATTENTION["cuda"]
    if not cpu and settings.deterministic:
        switches.append("--enable-deterministic-inference")
    if settings.sleeps:
        switches.append("--enable-memory-saver")
    if settings.return_routing:
        switches.append("--enable-return-routed-experts")
    line = [text for name, value in arguments.items() if value is not None for text in (name, str(value))]
    return [*line, *switches, *section.extra_args]


def meaningful_tail(log: str, lines: int = 30) -> str:
    """The lines of a server's log that say why it ended: the last before its other processes were ended for it."""
    noise = re.compile(r"Warning: |warnings\.warn|^\s*$")
    ending = re.compile(r"Received sigquit from a child process|SIGQUIT received")
    kept = [line for line in log.splitlines() if not noise.search(line)]
    end = next((i for i, line in enumerate(kept) if ending.search(line)), len(kept))
    return "\n".join(kept[max(0, end - lines) : end])


def vital_of(family: list[psutil.Process]) -> list[psutil.Process]:
    """Of a server and its descendants those that it cannot do without: itself and what it started, schedulers and
    detokenizer.

    What these start comes and goes: compilers, and torch's pool of them, which is closed when it has been idle for a
    while."""
    vital = []
    for process in family:
        try:
            helper = re.search(r"resource_tracker|compile_worker", " ".join(process.cmdline()))
            if process.pid == family[0].pid or process.ppid() == family[0].pid and not helper:
                vital.append(process)
        except psutil.NoSuchProcess:
            continue
    return vital


def _temporary_dir(log_dir: Path, name: str) -> Path:
    """A folder for the server's sockets: beside its log; in TMPDIR or in /tmp where that path is too long for one."""
    folder = log_dir.resolve() / f".{name}"
    if len(str(folder)) > _SOCKET_PATH_LIMIT:
        made = f"{tempfile.gettempdir()}/fp8slurm-12345678"
        return Path(tempfile.mkdtemp(prefix="fp8slurm-", dir=None if len(made) <= _SOCKET_PATH_LIMIT else "/tmp"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _unlink_shared_memory(family: list[psutil.Process]) -> None:
    """Remove SGLang's segments in /dev/shm that these processes have mapped; what is mapped stays usable.

    Done once all of them have come up, so that nothing is left over even when they are killed without notice.
    """
    for process in family:
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            continue
        for path in set(re.findall(r"/dev/shm/sgl_shm_\S+", maps)):
            Path(path).unlink(missing_ok=True)


def _unlink_orphans(since: float) -> None:
    """Remove segments made after `since` (Unix time) whose creator, named in sgl_shm_KIND_PID_RANDOM, is dead."""
    for path in Path("/dev/shm").glob("sgl_shm_*_*_*"):
        pid = path.name.split("_")[-2]
        try:
            if path.stat().st_mtime >= since and pid.isdigit() and not psutil.pid_exists(int(pid)):
                path.unlink()
        except FileNotFoundError:  # somebody else's server removed its own
            continue


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
