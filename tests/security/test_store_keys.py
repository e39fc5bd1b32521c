"""Every name that anything reads, waits for or looks for in the job's store, written there by somebody without the key.

The names are collected from the source: a new one is tried without being listed here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import fp8slurm
from fp8slurm.core.stopping import StopRequested
from fp8slurm.rl.boundary import StepBoundary
from fp8slurm.rollout import channel
from fp8slurm.rollout.channel import RankChannel, WorkerChannel
from fp8slurm.run.step_times import StepTimes
from fp8slurm.sync import groups
from fp8slurm.sync.signed_store import ForgedError, SignedStore, new_key, read_key

PACKAGE = Path(fp8slurm.__file__).parent
READS = ("get", "wait", "check")
CONNECTION = "sync/signed_store.py"
"""Where the signed store itself reads the plain one."""


def names_in(call: ast.Call, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The names that a call is made with, 0 for what is filled in; "?" for one that is somebody else's argument."""
    argument = call.args[0]
    for part in argument.elts if isinstance(argument, ast.List) else [argument]:
        value = part.value if isinstance(part, ast.NamedExpr) else part
        for given in assigned.get(value.id, [value]) if isinstance(value, ast.Name) else [value]:
            if isinstance(given, ast.Constant):
                yield str(given.value)
            elif isinstance(given, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "0" for v in given.values)
            else:
                yield "?"


def read_names() -> dict[str, set[str]]:
    """By name: how it is read (get, wait, check)."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if str(inside) == CONNECTION or "check" in inside.parts:  # the doctor has a store of its own
            continue
        tree = ast.parse(path.read_text())
        assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pairs = [(target, node.value)]
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        pairs = list(zip(target.elts, node.value.elts))
                    for left, right in pairs:
                        if isinstance(left, ast.Name):
                            assigned.setdefault(left.id, []).append(right)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS):
                continue
            owner = ast.unparse(node.func.value)
            if owner.endswith("store") or (owner.endswith("channel") and node.func.attr == "get"):
                for name in names_in(node, assigned):
                    found.setdefault(name, set()).add("get" if owner.endswith("channel") else node.func.attr)
    return found


NAMES = read_names()


def test_the_names_are_found() -> None:
    """Those that stop a run, keep it alive or say what it does are among them, so the search has not gone blind."""
    some = {"noticed", "boundary/0", "resume", "save/0", "stop/saved", "progress/0", "direct/0/failed", "left/0"}
    some |= {"answer/0/0", "taken/0", "resident/0", "kept/0/0/0", "sync/sources", "sync/plan/0", "saver/0/error"}
    missing = some - set(NAMES)
    assert missing <= {"saver/0/error"}, missing  # its first part is an argument: "0/error"
    assert "0/error" in NAMES and "command/0" not in NAMES  # WorkerChannel.get waits for what it is given: below


@pytest.fixture
def stores(tmp_path):
    """(a task's, a stranger's) connection."""
    plain, port = groups.host_store("127.0.0.1")
    groups.publish(tmp_path / "store.json", "127.0.0.1", port)
    stranger = groups.connect_store(tmp_path / "store.json", 10)
    return SignedStore(plain, read_key(tmp_path / "store.json")), stranger


def arrived(stranger, name: str) -> None:
    """Return when the store has what this connection wrote: set() does not wait for an answer."""
    assert stranger.check([name])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_no_name_is_taken_from_a_stranger(stores, name):
    mine, stranger = stores
    for number, forge in enumerate((stranger.set, SignedStore(stranger, new_key()).set)):
        forge(name, "1")
        arrived(stranger, name)
        for how in sorted(NAMES[name]):
            with pytest.raises(ForgedError, match="was not written by this run"):
                getattr(mine, how)(name if how == "get" else [name])
        mine.set(name, f"mine {number}")
        assert mine.check([name]) and mine.get(name) == f"mine {number}".encode()


def test_a_stranger_cannot_count(stores):
    mine, stranger = stores
    stranger.add("progress", 1)
    with pytest.raises(RuntimeError):
        mine.add("progress", 1)


def test_a_stranger_does_not_stop_a_run(stores):
    mine, stranger = stores
    policy = SimpleNamespace(noticed=lambda: False, at_step_boundary=lambda noticed, *_: "notice" if noticed else "")
    saver = SimpleNamespace(collect=lambda wait: None, left_s=lambda: 0.0, failed=False)
    boundary = StepBoundary(mine, True, policy, saver, StepTimes())
    boundary.cross()
    stranger.set("noticed", "")
    arrived(stranger, "noticed")
    with pytest.raises(ForgedError, match="noticed"):
        boundary.cross()
    mine.set("noticed", "")  # another rank's
    with pytest.raises(StopRequested, match="notice"):
        boundary.cross()


def test_a_stranger_keeps_no_hung_job_alive(stores, monkeypatch):
    """Neither by a count of its own nor by what a worker once wrote, again and again."""
    mine, stranger = stores
    monkeypatch.setattr(channel, "ABANDON_POLL", timedelta(milliseconds=1))
    worker = WorkerChannel(mine, SimpleNamespace(rank=1, size=2), 1, 0)
    beats: list[int] = []
    turns = iter(range(1000))
    rank = RankChannel(mine, SimpleNamespace(rank=0), 1, 1, lambda: beats.append(next(turns)))
    kept: list[bytes] = []

    def looks(until: int) -> str:
        """One look of the rank after the other, until it gives up."""
        seen = iter(range(until))
        return rank._wait("answer/0/0", lambda: "" if next(seen, None) is not None else "enough")

    worker.progress()
    kept.append(stranger.get("progress/0"))
    assert looks(2) == "enough" and len(beats) == 1
    worker.progress()
    kept.append(stranger.get("progress/0"))
    assert looks(2) == "enough" and len(beats) == 2
    for value in kept * 3:
        stranger.set("progress/0", value)
        arrived(stranger, "progress/0")
        assert looks(1) == "enough"
    assert len(beats) == 2
    stranger.set("progress/0", "1000")
    arrived(stranger, "progress/0")
    with pytest.raises(ForgedError, match="progress/0"):
        looks(1)


def test_what_a_worker_waits_for_is_signed(stores, monkeypatch):
    mine, stranger = stores
    monkeypatch.setattr(channel, "IDLE_HEARTBEAT", timedelta(milliseconds=50))
    for name in ("command/0", "resident/0", "kept/0/0/0"):
        stranger.set(name, '{"kind": "stop"}')
        with pytest.raises(ForgedError, match=name):
            WorkerChannel(mine, SimpleNamespace(rank=1, size=2), 1, 0).get(name)


def test_the_wait_of_a_group_is_for_its_peers(stores):
    """gloo's own reads go through the signed store: a stranger that says where a peer is ends the group."""
    mine, stranger = stores
    dist.PrefixStore("group/one", stranger).set("0/0", "somewhere else")
    with pytest.raises((ForgedError, RuntimeError)):
        dist.PrefixStore("group/one", mine).wait(["0/0"])
