"""Parts of tools/gpu/eight.py without a GPU: settings that can be, plans that fit, how a part goes on and ends."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_task

from fp8slurm.check.dry_run import Refusal
from fp8slurm.check.preflight import preflight
from fp8slurm.config.load import read_recipe
from fp8slurm.core.errors import InputError
from fp8slurm.plan.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools" / "gpu"))

import eight  # noqa: E402
import visit  # noqa: E402
from recipes import with_settings  # noqa: E402

KNOWN = ROOT / "fp8slurm" / "models" / "known"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Tiny models and their data, and folders with the large ones' shapes and no weights."""
    work = tmp_path_factory.mktemp("eight")
    for name in ("tiny", "tiny-moe", "data"):
        (work / name).mkdir()
    tiny.write_model(work / "tiny")
    tiny.write_model(work / "tiny-moe", moe=True)
    tiny_task.write_data(work / "data")
    rows = (work / "data" / "train.jsonl").read_text().splitlines(True)
    (work / "data" / "train.jsonl").write_text("".join(rows[:200]))  # each is tokenized by every check
    for model in {name for models in eight.MODELS.values() for name in models}:
        shape, _, layers = model.rpartition("-")
        known = json.loads((KNOWN / f"{shape if layers.isdigit() else model}.json").read_text())
        known |= {"eos_token_id": 258, "bos_token_id": 256, "pad_token_id": 256}
        known |= {"num_hidden_layers": int(layers)} if layers.isdigit() else {}
        (work / model).mkdir()
        for path in (work / "tiny").glob("*.json"):
            shutil.copy(path, work / model)
        (work / model / "config.json").write_text(json.dumps(known))
    return work


SETTINGS = [name for name in eight.PARTS if name not in ("4b-engine", "4b-rank")]
"""Parts, one of each run."""


def refusals(config) -> list[str]:
    # SGLang's parser and a process that imports the reward take seconds, and say the same of every part
    quick = with_settings(config, {"engine": {"extra_args": []}, "reward": {"kind": "digits"}})
    found = preflight(quick, dry_run=True)
    return [r for r in found if isinstance(r, Refusal)]


NOT_HERE = ("it is not installed", "only TransformerEngine's FusedAdam on a GPU", "neither model.safetensors nor")
"""What a machine without GPUs and without the weights refuses."""


@pytest.mark.parametrize("name", SETTINGS)
def test_a_part_fits_and_nothing_but_this_machine_refuses_it(name: str, work: Path) -> None:
    part = eight.PARTS[name]
    config = eight.Visit(work, work / "out").config(part)
    (fit,) = make_plan(config, eight.GPU).fits
    assert fit.fits, {phase.name: phase.bytes for phase in fit.phases}
    assert [r for r in refusals(config) if not any(text in r for text in NOT_HERE)] == []
    assert config.slurm.gpus_per_node == part.gpus and config.slurm.nodes == part.nodes
    assert part.until < config.run.steps or part.saved == part.until == config.run.steps
    assert part.saved is None or part.saved % config.checkpoint.every == 0 or part.saved == config.run.steps
    assert part.needs_s <= eight.PART_S


@pytest.mark.parametrize("name", SETTINGS)
def test_a_part_is_rehearsed_with_settings_that_can_be(name: str, work: Path) -> None:
    config = eight.Visit(work, work / "out", rehearse=True).config(eight.PARTS[name])
    assert refusals(config) == []
    assert config.slurm.gpus_per_node == 0 and config.fp8.backend in ("emulated", "off")


def test_parts_of_one_run_have_its_settings() -> None:
    first, *others = [part for part in eight.PARTS.values() if part.run == "4b-fp8"]
    assert len(others) == 2 and all(part.settings == first.settings for part in others)


def test_the_4b_is_laid_out_as_shipped(work: Path) -> None:
    """What is otherwise is how long it runs, what it is asked, and what a bare machine needs."""
    config = eight.Visit(work, work / "out").config(eight.PARTS["4b"])
    assert set(eight.changed(config, "qwen3-4b-fp8")) == {
        "run.steps", "checkpoint.every", "data.eval", "rollout.stop_token_ids", "reward.kind", "engine.extra_args",
        "engine.ready_timeout_s", "watchdog.timeout_s", "observe.plot", "observe.tensorboard",
    }  # fmt: skip
    assert config.slurm.executor == read_recipe("qwen3-4b-fp8").slurm.executor == "slurm"


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("4b", {"engine": {"per_node": 9}}, "= 9 GPUs; a node has"),
        ("4b", {"parallel": {"tensor_parallel_size": 3}}, "tensor-parallel-size 3"),
        ("4b-split", {"engine": {"gpus": 3}}, "--engine.gpus 3"),
        ("30b", {"engine": {"tensor_parallel_size": 8}}, "= 8 GPUs; a node has"),
        ("30b", {"engine": {"expert_parallel_size": 1}}, "expert-parallel-size"),
        ("30b", {"parallel": {"expert_parallel_size": 3}}, "expert-parallel-size 3"),
        ("30b", {"slurm": {"ranks_per_node": 2}}, "every GPU trains"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(name: str, wrong: dict, says: str, work: Path) -> None:
    config = with_settings(eight.Visit(work, work / "out").config(eight.PARTS[name]), wrong)
    with pytest.raises(InputError, match=says):
        make_plan(config, eight.GPU)


def test_no_multicast_for_any_job_of_a_visit(tmp_path: Path, capsys) -> None:
    v = visit.Visit(tmp_path, tmp_path, 0)
    names = list(eight.MULTICAST_OFF)
    v.script("env", 0, 0.0, "-c", f"import os; print([os.environ[name] for name in {names}])")
    visit.run_all(v, time.time() + 60)
    assert (tmp_path / "env.log").read_text() == "['0', '1', '1']\n"
    assert (
        eight.MULTICAST_OFF.items()
        <= dict(
            pair.split("=")
            for pair in (ROOT / "tools/slurm_lab.sh").read_text().split('MULTICAST_OFF="')[1].split('"')[0].split()
        ).items()
    )


@pytest.mark.parametrize("which", ["eight", "nodes"])
def test_a_visit_calls_the_parts_with_flags_that_they_have(which: str, tmp_path: Path, monkeypatch) -> None:
    v = visit.Visit(tmp_path, tmp_path / "out", 8, rehearse=True)
    visit.PARTS[which](v)
    (job,) = v.jobs
    ran: dict[str, Any] = {}

    def run_parts(v: eight.Visit, names: list[str], seconds: float) -> bool:
        ran.update(work=v.work, rehearse=v.rehearse, names=names, seconds=seconds)
        return True

    monkeypatch.setattr(eight, "run_parts", run_parts)
    monkeypatch.setattr(sys, "argv", job.command[1:])
    monkeypatch.setattr(eight.signal, "signal", lambda *_: None)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(eight.os, "environ", {})
        eight.main()
    assert end.value.code == 0
    assert ran == {"work": tmp_path, "rehearse": True, "names": list(eight.VISITS[which]), "seconds": v.seconds}


# -- how a part goes on and ends --------------------------------------------------------------------------------------


class MadeUp:
    """A run that takes a step each time it is asked whether it is over, and resumes at its newest checkpoint."""

    def __init__(self, run: Path, ends_at: int, stuck_at: int = 99) -> None:
        self.run, self.ends_at, self.stuck_at, self.starts, self.killed = run, ends_at, stuck_at, 0, False
        self.stopped = 0

    def start(self) -> None:
        self.starts += 1
        self.killed = False
        self.attempt = self.run / "attempts" / str(len(list(self.run.glob("attempts/*"))))
        self.attempt.mkdir(parents=True)
        self.write(eight.newest_saved(self.run))

    def write(self, last: int) -> None:
        lines = [
            {"phase": "rl", "step": s, "time/step": 9.0 if s < 2 else 3.0, "time/train": 1.0, "time/rollout": 1.5,
             "time/sync": 0.25, "tokens": 64, "rollout/response_length": 4.0} for s in range(last + 1)
        ]  # fmt: skip
        (self.attempt / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def step(self) -> int:
        records = eight.records_of(self.run, eight.newest_attempt(self.run))
        return max((r["step"] for r in records), default=-1)

    def over(self) -> str | None:
        if self.killed:
            return "status 1"
        step = min(self.step() + 1, self.stuck_at, self.ends_at)
        self.write(step)
        if step in (4, 8, 10):
            (self.run / "checkpoints" / f"step_{step:06}").mkdir(parents=True, exist_ok=True)
            (self.run / "checkpoints" / f"step_{step:06}" / "COMPLETE").touch()
        return "COMPLETED" if step == self.ends_at else None

    def requeue(self) -> None:
        self.start()

    def stop(self) -> None:
        self.stopped += 1


@pytest.fixture
def made_up(work: Path, tmp_path: Path, monkeypatch) -> tuple[eight.Visit, MadeUp]:
    for name in ("tiny", "tiny-moe", "data"):
        (tmp_path / name).symlink_to(work / name)
    v = eight.Visit(tmp_path, tmp_path / "out", rehearse=True, executor="local")
    run = MadeUp(tmp_path / "runs" / "4b-fp8", ends_at=10)

    @contextmanager
    def started(*_):
        yield run
        run.stop()

    monkeypatch.setattr(eight, "started", started)
    monkeypatch.setattr(eight.time, "sleep", lambda _: None)
    monkeypatch.setattr(eight, "used_gb", lambda: None)
    monkeypatch.setattr(eight, "victim", lambda *_: 7)
    kinds = {"killed": []}

    def kill(pid: int, _: int) -> None:
        assert pid == 7
        kinds["killed"].append(run.step())
        run.killed = len(kinds["killed"]) == 2  # an engine comes back by itself, a rank ends the run

    monkeypatch.setattr(eight.os, "kill", kill)
    run.kills = kinds["killed"]
    return v, run


def test_three_parts_are_one_run_with_its_faults(made_up) -> None:
    v, run = made_up
    for name in ("4b", "4b-engine", "4b-rank"):
        assert eight.carry_out(v, name, time.monotonic() + 60), v.notes()[name]
    notes = v.notes()
    assert [r["step"] for r in notes["4b"]["records"]] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in notes["4b-engine"]["records"]] == [5, 6, 7, 8]
    assert run.kills == [5, 9] and run.starts == 4, "a part each, and the resume after the killed rank"
    assert [f["kind"] for n in notes.values() for f in n["faults"]] == ["engine", "rank"]
    assert all(f["seconds"] is not None for n in notes.values() for f in n["faults"])
    assert run.step() == 10 and not (run.run / "checkpoints").exists(), "not needed any more"
    text = (v.out / "table.md").read_text()
    assert "REHEARSAL" in text and "| 4b-rank | rank | 9 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| seconds a step"))
    assert row == "| seconds a step | 3 | 3 | 3 |", "the first step, which compiles, is left out"


def test_a_part_without_time_goes_on_in_the_next_call(made_up) -> None:
    v, run = made_up
    run.stuck_at = 3
    clock = iter(range(10_000))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(eight.time, "monotonic", lambda: float(next(clock)))
        assert not eight.carry_out(v, "4b", 200.0)
    note = v.notes()["4b"]
    assert note["why"].startswith("no time left") and not note["over"] and run.stopped == 1
    assert (v.out / "4b-logs.txt").exists()
    run.stuck_at = 99
    assert eight.run_parts(v, ["4b"], 60.0) and v.notes()["4b"]["over"]
    run.starts = 0
    assert eight.run_parts(v, ["4b"], 60.0) and run.starts == 0, "what is over is not run again"


def test_a_run_that_ends_by_itself_says_so(made_up) -> None:
    v, run = made_up
    run.ends_at = 2
    assert not eight.carry_out(v, "4b", time.monotonic() + 60)
    assert v.notes()["4b"]["why"] == "the run ended before: COMPLETED"


def test_what_does_not_fit_the_time_is_left_to_the_next_call(tmp_path: Path, monkeypatch, capsys) -> None:
    v = eight.Visit(tmp_path, tmp_path / "out")
    done: list[str] = []
    monkeypatch.setattr(eight, "prepare", lambda v, name: done.append(name) or v.save(name, PREPARED) or True)
    monkeypatch.setattr(eight, "carry_out", lambda v, name, deadline: done.append(name) or True)
    assert not eight.run_parts(v, list(eight.VISITS["eight"]), 300.0)
    assert done == ["prepare-4b"] and "call this again" in capsys.readouterr().out


PREPARED = {"part": "prepare-4b", "over": True, "why": None, "spent_s": 1.0}


@pytest.mark.parametrize(("model", "weights"), [("Qwen3-4B", 4.02e9), ("Qwen3-30B-A3B", 3.04e9)])
def test_model_flop_is_six_a_weight_and_attention(model: str, weights: float, work: Path) -> None:
    """Published: 4.0 G parameters, the embedding is the output layer; 3.3 G active, 0.31 G of them the embedding."""
    spec = eight.ModelSpec.from_hf_dir(work / model)
    assert eight.model_flop(spec, 10.0, 0.0) == pytest.approx(60 * weights, rel=0.01)
    more = eight.model_flop(spec, 10.0, 1000.0) - eight.model_flop(spec, 10.0, 0.0)
    assert more == 60 * spec.num_layers * spec.num_heads * spec.head_dim * 1000


def test_the_reward_of_every_part_is_there() -> None:
    import coin

    assert {part.settings["reward"]["kind"] for part in eight.PARTS.values()} == {"coin:even"}
    assert (coin.even("ab", ""), coin.even("a", "")) == (1.0, 0.0)
