"""The weights' path is chosen in one place, and nobody outside sync/ knows which one a run takes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import fp8slurm
from fp8slurm.config import RunConfig
from fp8slurm.engine.server import EngineError
from fp8slurm.sync import groups, paths
from fp8slurm.sync.direct import DirectReceiver, GroupGeneration
from fp8slurm.sync.receiver import Receiver
from fp8slurm.sync.transport import Transport

KINDS = {"host", "mapped", "direct"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def test_only_paths_imports_the_paths():
    package = Path(fp8slurm.__file__).parent
    knows = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(name.startswith(("fp8slurm.sync.direct", "fp8slurm.sync.mapped")) for name in imports(path))
    }
    assert knows == {"sync/paths.py"}


@pytest.mark.parametrize("transport", paths.PATHS)
def test_every_transport_has_its_ends(transport):
    config = RunConfig().model_copy(update={"sync": RunConfig().sync.model_copy(update={"transport": transport})})
    receiver = paths.receiver(config, 0, SimpleNamespace(), [])
    engine = paths.transport(config, ())
    assert isinstance(receiver, Receiver) and isinstance(engine, Transport) and set(paths.PATHS.values()) == KINDS
    kind = {"host": "Host", "mapped": "Mapped", "direct": "Direct"}[paths.PATHS[transport]]
    assert type(receiver).__name__ == f"{kind}Receiver" and list(receiver.held) == []


class Engines:
    """Two engines of node 1 of 2, of which one does not join; `told` are the ranks with which they joined."""

    def __init__(self, transports: list[Transport]) -> None:
        self.transports, self.restarted = transports, 0
        self.failed: list[int] = []

    def restart_dead(self) -> None:
        self.restarted += 1

    def tell(self, call: Callable[[Transport, int], None]) -> None:
        for number, transport in enumerate(self.transports):
            try:
                call(transport, number)
            except EngineError:
                self.failed.append(number)


def test_an_engine_that_does_not_join_ends_the_generation():
    store, _ = groups.host_store("127.0.0.1")
    signed = SimpleNamespace(plain=store, set=store.set, check=store.check)
    receiver = DirectReceiver(signed, [("stage0", None, ()), ("stage1", None, ())], node=1, nodes=2, engine_ranks=3)
    config = RunConfig().model_copy(update={"sync": RunConfig().sync.model_copy(update={"transport": "gloo-direct"})})
    engines = Engines([paths.transport(config, ()) for _ in range(2)])
    asked: list[tuple] = []

    def join_group(name: str, port: int, size: int, backend: str, address: str, first: int) -> None:
        asked.append((name, size, backend, first))
        if first == 10 and len(asked) > 2:
            raise EngineError("it is gone")

    client = SimpleNamespace(join_group=join_group, leave_group=lambda name: None)
    for transport in engines.transports:
        transport.open(client, 3)
    receiver.sources = ["stage0"]
    assert receiver.prepare(engines, {"generation": 1, "join": False}) == {"linked": False} and engines.restarted == 1
    receiver.prepare(engines, {"generation": 1, "join": True})
    assert asked == [("fp8slurm-1-stage0", 13, "gloo", 7), ("fp8slurm-1-stage0", 13, "gloo", 10)]
    assert receiver.prepare(engines, {"generation": 1, "join": False}) == {"linked": True} and not engines.failed
    assert receiver.prepare(engines, {"generation": 2, "join": False}) == {"linked": False}
    receiver.prepare(engines, {"generation": 2, "join": True})
    assert engines.failed == [1] and GroupGeneration(signed, 2).failed()
    assert receiver.prepare(engines, {"generation": 2, "join": False}) == {"linked": False}
