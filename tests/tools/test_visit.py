"""Parts of tools/gpu/visit.py, laid out without a GPU: recipes that parse, scripts that are there; and turns."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "gpu"))

import turns  # noqa: E402
import visit  # noqa: E402


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> visit.Visit:
    """A visit whose models are not written: their recipes name folders only."""
    monkeypatch.setattr(visit, "write_model", lambda folder, *_: folder)
    monkeypatch.setattr(visit.Visit, "tiny", lambda self, moe=False: self.work / ("tiny-moe" if moe else "tiny"))
    monkeypatch.setattr(visit.Visit, "fp8", lambda self, model: model.with_name(f"{model.name}-FP8"))
    return visit.Visit(tmp_path / "work", tmp_path / "out", 2)


@pytest.mark.parametrize("part", sorted(visit.PARTS))
def test_every_part_has_jobs_whose_recipes_parse_and_whose_scripts_are_there(part: str, place: visit.Visit) -> None:
    visit.PARTS[part](place)
    assert place.jobs
    for job in place.jobs:
        for text in job.command:
            if text.startswith("tools/"):
                assert (ROOT / text).is_file(), job.command
        assert 0 <= job.share <= 1 and 1 <= job.gpus <= place.gpus
    together = [job for job in place.jobs if job.turn]
    assert sum(job.share for job in together) <= 1, "jobs that wait for one another must run at the same time"


@pytest.mark.parametrize(
    "script",
    [
        "bench/bench_rollout.py",
        "bench/bench_train.py",
        "gpu/update_peer.py",
        "gpu/seed_probe.py",
        "gpu/grouped_probe.py",
        "gpu/kv_probe.py",
        "gpu/host_adam_probe.py",
        "gpu/delta_probe.py",
    ],
)
def test_scripts_of_a_visit_take_the_flags_that_it_gives(script: str, place: visit.Visit) -> None:
    for part in ("rollout", "update", "moe-train", "moe-grouped", "seeds", "kv", "host-adam", "delta"):
        visit.PARTS[part](place)
    said = subprocess.run(
        [sys.executable, ROOT / "tools" / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = [job.command for job in place.jobs if f"tools/{script}" in job.command]
    assert commands
    for command in commands:
        assert [flag for flag in command if flag.startswith("--") and flag not in said] == []


def test_jobs_wait_for_one_another_and_measure_one_by_one(tmp_path: Path) -> None:
    code = f"""
import sys, time
sys.path.append({str(ROOT / "tools" / "gpu")!r})
from turns import alone
with alone(sys.argv[1]):
    print(sys.argv[1], "begins", flush=True)
    time.sleep(0.3)
    print(sys.argv[1], "ends", flush=True)
"""
    environment = {"TURNS": f"{tmp_path / 'turns'}:3", "PATH": ""}
    log = tmp_path / "log"
    with log.open("a") as out:
        jobs = [subprocess.Popen([sys.executable, "-c", code, name], stdout=out, env=environment) for name in "ab"]
        time.sleep(0.5)
        assert log.read_text() == "", "the third one is not ready"
        turns.arrive(tmp_path / "turns", "c")  # as the visit does for a job that has failed
        assert [job.wait(20) for job in jobs] == [0, 0]
    lines = log.read_text().split("\n")[:4]
    assert lines in (["a begins", "a ends", "b begins", "b ends"], ["b begins", "b ends", "a begins", "a ends"])


def test_what_jobs_left_is_packed_when_each_of_them_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    v = visit.Visit(tmp_path, tmp_path / "out", 0, archive=tmp_path / "out" / "all.tar.gz")
    v.out.mkdir()
    packed: list[list[str]] = []
    pack = visit.pack

    def look(folder: Path, archive: Path) -> None:
        pack(folder, archive)
        with tarfile.open(archive) as tar:
            packed.append(sorted(name for name in tar.getnames() if name.endswith(".log")))

    monkeypatch.setattr(visit, "pack", look)
    for name, wait in (("a", "0"), ("b", "1")):
        v.jobs.append(visit.Job(name, [sys.executable, "-c", f"import time; time.sleep({wait})"], gpus=0))
    visit.run_all(v, time.time() + 60)
    assert packed == [["./a.log", "./b.log"]] * 2 and [p.name for p in v.out.glob("*.tar.gz*")] == ["all.tar.gz"]


def test_what_setting_up_took_is_said_once_and_stays(tmp_path: Path) -> None:
    assert visit.setup_seconds(tmp_path) is None
    (tmp_path / "began").write_text(f"{int(time.time()) - 100}\n")
    took = visit.setup_seconds(tmp_path)
    assert took is not None and took >= 100
    (tmp_path / "began").write_text("0\n")
    assert visit.setup_seconds(tmp_path) == took, "a later call of the visit is not part of it"


def test_outside_a_visit_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURNS", raising=False)
    with turns.alone("rollout"):
        pass
