"""The engine under all converters: shards written piece by piece by a few threads, read back, checked, and only then
given their name."""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open

from fp8slurm.checkpoint.converters.output import OutputFolder, disk_full
from fp8slurm.checkpoint.converters.progress import Progress
from fp8slurm.checkpoint.converters.works import Work
from fp8slurm.checkpoint.formats.safetensors_file import Located, ShardLayout, read_header
from fp8slurm.checkpoint.formats.sources import Files, as_bytes, scratch
from fp8slurm.core.errors import BadCheckpoint, InputError

T = TypeVar("T")
PIECE_BYTES = 4 << 20
BUFFERS_PER_PIECE = 6
"""Scratch that a piece needs, in multiples of its input: codes, fp32 panels, and rows of a fused parameter."""


@dataclass(frozen=True)
class ConvertOptions:
    """How a conversion runs; none of it changes a byte of the output except max_shard_bytes."""

    jobs: int | None = None
    """Threads; None: all cores, or as many of them as memory_mib has buffers for."""
    memory_mib: int = 512
    """Memory for buffers, in MiB above what the imports take."""
    max_shard_bytes: int = 2 << 30
    """Largest output file (a larger tensor gets one of its own)."""
    verify: bool = True
    """Read everything back and check it."""
    overwrite: bool = False
    """Replace an output folder that exists."""
    progress: bool = False
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name, flag in (("jobs", "--jobs"), ("memory_mib", "--max-memory"), ("max_shard_bytes", "--max-shard-size")):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{flag} {getattr(self, name)}: must be at least 1")

    @property
    def threads(self) -> int:
        """How many threads are at work."""
        return len(os.sched_getaffinity(0)) if self.jobs is None else self.jobs

    def piece_bytes(self) -> int:
        """Input bytes that one thread takes at a time."""
        return min(PIECE_BYTES, (self.memory_mib << 20) // (self.threads * BUFFERS_PER_PIECE))

    def fitted(self, works: Sequence[Work]) -> ConvertOptions:
        """The same with so many jobs that the buffers of the widest matrix's smallest pieces fit into memory_mib.

        InputError: they do not, with the jobs that were asked for or with one.
        """
        widest = max((w.row_bytes * min(w.align, w.rows) for w in works), default=0)
        most = (self.memory_mib << 20) // max(1, widest * BUFFERS_PER_PIECE)
        jobs = self.jobs or max(1, min(self.threads, most))
        if jobs > most:
            needed = -(-widest * BUFFERS_PER_PIECE * jobs >> 20)
            raise InputError(f"--max-memory {self.memory_mib} MiB with --jobs {jobs}: at least {needed} are needed")
        return replace(self, jobs=jobs)


@dataclass(frozen=True)
class Shard:
    """An output file and the works that fill it."""

    layout: ShardLayout
    works: tuple[Work, ...]


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a work."""

    work: Work
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.work.row_bytes


def pieces(works: Sequence[Work], piece_bytes: int) -> list[Piece]:
    """Cut works into pieces of at most piece_bytes of input, or of `align` rows where that is more."""
    cut = []
    for work in works:
        step = max(1, piece_bytes // max(1, work.row_bytes * work.align)) * work.align
        cut += [Piece(work, start, min(start + step, work.rows)) for start in range(0, work.rows, step)]
    return cut


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Our threads share the cores out among themselves: torch must not start more inside each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(jobs: int, items: Sequence[T], do: Callable[[T], None]) -> None:
    """do(item) for all items on `jobs` threads; the first error stops the others and is raised here."""
    lock, queue = threading.Lock(), iter(items)
    errors: list[BaseException] = []

    def loop() -> None:
        while not errors:
            with lock:
                item = next(queue, None)
            if item is None:
                return
            try:
                do(item)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=loop, name=f"convert-{i}", daemon=True) for i in range(min(jobs, len(items)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: let the threads end before files are closed under them
        errors.append(error)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


Digests = dict[tuple[str, int], tuple[int, int]]
"""(output name, byte offset) -> (bytes, crc32) of everything that was written."""


def write_shard(shard: Shard, path: Path, options: ConvertOptions, progress: Progress) -> Digests:
    """Fill the file `path` with a shard; nothing is left of it if that fails."""
    digests: Digests = {}
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(piece: Piece) -> None:
        for name, offset, tensor in piece.work.produce(piece.start, piece.stop):
            data = as_bytes(tensor)
            at, done = shard.layout.tensors[name][1] + offset, 0
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], at + done)
            if options.verify:
                digests[name, offset] = (len(data), zlib.crc32(data))
        progress.advance(piece.nbytes)

    try:
        os.ftruncate(descriptor, shard.layout.nbytes)
        os.pwrite(descriptor, shard.layout.header, 0)
        in_threads(options.threads, pieces(shard.works, options.piece_bytes()), write)
        os.fsync(descriptor)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_full(error, path) from None
        raise
    finally:
        os.close(descriptor)
    return digests


def _check_header(shard: Shard, path: Path) -> dict[str, Located]:
    """The file's tensors, after a comparison with the plan, by our parser and by the safetensors library."""
    located, _ = read_header(path)
    expected = {name: info for name, (info, _) in shard.layout.tensors.items()}
    if {name: t.info for name, t in located.items()} != expected:
        raise BadCheckpoint(f"{path}: its header is not the one that was planned")
    with safe_open(path, "pt") as file:
        if set(file.keys()) != set(expected):
            raise BadCheckpoint(f"{path}: the safetensors library reads other names from it")
    return located


def verify_shard(shard: Shard, path: Path, digests: Digests, options: ConvertOptions, progress: Progress) -> None:
    """Read the whole file back by its own header: every tensor complete, every byte as it was made, samples against
    the input. BadCheckpoint otherwise."""
    located = _check_header(shard, path)
    covered = {name: 0 for name in located}
    for (name, _), (nbytes, _) in digests.items():
        covered[name] += nbytes
    for name, tensor in located.items():
        if covered[name] != tensor.info.nbytes:
            raise BadCheckpoint(f"{path}: {covered[name]} of {tensor.info.nbytes} bytes of {name} were written")
    files = Files()

    def read_back(name: str, offset: int, nbytes: int) -> torch.Tensor:
        got = scratch.take("verify", torch.uint8, 1, nbytes)
        files.read_into(path, located[name].offset + offset, as_bytes(got))
        return got[0].clone() if nbytes < 1 << 16 else got[0]

    def check(item: Work | tuple[str, int]) -> None:
        if not isinstance(item, tuple):
            item.check(read_back)
            return
        nbytes, digest = digests[item]
        if zlib.crc32(as_bytes(read_back(*item, nbytes))) != digest:
            raise BadCheckpoint(f"{path}: {item[0]} does not read back as it was written (at byte {item[1]})")
        progress.advance(nbytes)

    items: list[Work | tuple[str, int]] = [*digests, *shard.works]
    try:
        in_threads(options.threads, items, check)
    finally:
        files.close()


def run(shards: Sequence[Shard], output: OutputFolder, options: ConvertOptions, progress: Progress) -> int:
    """Write every shard that OUT.tmp does not hold yet; returns how many were there already.

    BadCheckpoint: verification failed, or another conversion took OUT.tmp over.
    """
    resumed = 0
    with one_thread_each():
        for shard in shards:
            path = output.tmp / shard.layout.file_name
            if path.is_file():
                with path.open("rb") as file:
                    same = file.read(len(shard.layout.header)) == shard.layout.header
                if same and path.stat().st_size == shard.layout.nbytes:
                    resumed += 1
                    progress.advance(
                        sum(w.rows * w.row_bytes for w in shard.works) + options.verify * shard.layout.data_bytes
                    )
                    continue
                output.check_owner()
                path.unlink()
            progress.describe(shard.layout.file_name)
            part = output.part(shard.layout.file_name)
            digests = write_shard(shard, part, options, progress)
            try:
                if options.verify:
                    verify_shard(shard, part, digests, options, progress)
                output.check_owner()
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            os.rename(part, path)
    return resumed


def stopwatch() -> Callable[[], float]:
    """Seconds since now, when called."""
    begun = time.perf_counter()
    return lambda: time.perf_counter() - begun
