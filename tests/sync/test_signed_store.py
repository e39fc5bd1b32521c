"""Values in the job's store: only those made with the attempt's key are taken."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fp8slurm.sync import groups
from fp8slurm.sync.signed_store import ForgedError, SignedStore, new_key, read_key


@pytest.fixture
def stores(tmp_path):
    """(the plain store, a task's, a stranger's connection)."""
    plain, port = groups.host_store("127.0.0.1")
    groups.publish(tmp_path / "store.json", "127.0.0.1", port)
    assert (tmp_path / "store.json").stat().st_mode & 0o777 == 0o600
    other = groups.connect_store(tmp_path / "store.json", 10)
    return SignedStore(plain, read_key(tmp_path / "store.json")), other


def test_what_one_task_says_another_reads(stores, tmp_path):
    mine, other = stores
    again = SignedStore(other, read_key(tmp_path / "store.json"))
    for value in ("", "text", b"\x00\xff"):
        mine.set("name", value)
        assert again.get("name") == (value.encode() if isinstance(value, str) else value)
    assert again.check(["name"]) and not again.check(["nothing"])
    with pytest.raises(dist.DistStoreError, match="timeout"):
        mine.wait(["nothing"], timedelta(milliseconds=200))


@pytest.mark.parametrize("how", ["plain", "other key", "moved", "changed"])
def test_a_forged_value_is_refused(stores, how):
    mine, stranger = stores
    mine.set("command/1", "stop")
    good = stranger.get("command/1")
    if how == "plain":
        stranger.set("command/2", "stop")
    elif how == "other key":
        SignedStore(stranger, new_key()).set("command/2", "stop")
    else:  # a true value under another name, or with a changed end
        stranger.set("command/2", good if how == "moved" else good[:-1] + b"x")
    with pytest.raises(ForgedError, match="command/2"):
        mine.get("command/2")
    assert mine.get("command/1") == b"stop"


def test_gloo_meets_over_it(stores):
    mine, _ = stores
    group = groups.Group(mine, "one", 0, 1, "127.0.0.1")
    tensor = torch.arange(3)
    group.broadcast(tensor, 0)
    assert tensor.tolist() == [0, 1, 2]
