import json
import os
import socket
import subprocess
import sys

import pytest

from fp8slurm.core.processes import process_start
from fp8slurm.eval.records import Records, choose_folder, settings_hash


def row(i, attempt=0):
    return {"task": "t", "id": str(i), "sample": 0, "response": "é", "response_ids": [1], "attempt": attempt, "at": 0.5}


def test_any_prefix_of_the_file_is_taken_up_without_a_loss(tmp_path):
    """A crash may leave any number of bytes: complete lines count, the rest is asked again."""
    with Records(tmp_path / "e", {"a": 1}) as records:
        records.append([row(0), row(1)])
        records.append([row(2)])
    path = tmp_path / "e" / "samples.jsonl"
    whole = path.read_bytes()
    for cut in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        with Records(tmp_path / "e", {"a": 1}) as records:
            assert len(records.rows) == lines and records.attempt == (1 if lines else 0)
            records.append([row(9, records.attempt)])
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [r["id"] for r in rows] == [str(i) for i in range(lines)] + ["9"]


def test_other_settings_go_to_another_folder(tmp_path):
    first = choose_folder(tmp_path, "x-fp8", {"seed": 0}, None)
    with Records(first, {"seed": 0}):
        pass
    assert first == tmp_path / "x-fp8" == choose_folder(tmp_path, "x-fp8", {"seed": 0}, None)
    other = choose_folder(tmp_path, "x-fp8", {"seed": 1}, None)
    assert other == tmp_path / f"x-fp8-{settings_hash({'seed': 1})}" != first
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        choose_folder(tmp_path, "x-fp8", {"seed": 1}, first)
    assert choose_folder(tmp_path, "x-fp8", {"seed": 0}, first) == first


def test_one_writer_at_a_time(tmp_path):
    with Records(tmp_path / "e", {}) as records:
        records.append([row(0)])
        with pytest.raises(ValueError, match=f"being written by process {os.getpid()} on {socket.gethostname()}"):
            Records(tmp_path / "e", {}).__enter__()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = tmp_path / "e" / "owner.json"
    owner.write_text(json.dumps({"host": socket.gethostname(), "pid": child.pid, "start": process_start(child.pid)}))
    with pytest.raises(ValueError, match=f"process {child.pid}"):
        Records(tmp_path / "e", {}).__enter__()
    child.communicate()
    for left in (owner.read_text(), "", "{torn"):  # its writer was killed
        owner.write_text(left)
        with Records(tmp_path / "e", {}) as records:
            assert len(records.rows) == 1
        assert not owner.exists()


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "samples.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl:1 is not JSON"):
        Records(tmp_path, {}).__enter__()
    assert not (tmp_path / "owner.json").exists()
