"""The whole loop: real Megatron ranks, a real SGLang engine in emulated FP8, real faults."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import TIMEOUT_S, task_pids, weights

from fp8slurm.core.processes import process_start
from fp8slurm.models.spec import ModelSpec
from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.run.directory import RunState

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tiny_runs):
    return tiny_runs(
        64, run__steps=10, sft__max_steps=20, sft__batch_size=64, rollout__prompts_per_step=6, rollout__n_samples=8,
        rollout__max_replacements=1, rollout__save_every=3, checkpoint__every=5, eval__every=4, sync__verify="always",
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(runs):
    """An undisturbed run of ten steps."""
    before = shared_memory()
    out = runs.finish(runs.start("reference"))
    assert shared_memory() <= before, "segments were left in /dev/shm"
    return runs.path("reference"), out


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith(("sgl", "torch", "gloo", "psm", "sem"))}


def test_a_run_leaves_what_it_should(reference):
    run, out = reference
    records = read_metrics(run)
    assert [(r["phase"], r["step"]) for r in records] == [("sft", s) for s in range(1, 21)] + [
        ("rl", s) for s in range(11)
    ]
    for r in records[21:]:
        assert 0 <= r["gap/mean_abs"] <= r["gap/p99"] <= r["gap/max"] and r["gap/k3"] >= 0
        assert r["rollout/groups"] > 0 and r["grad_norm"] > 0
    assert "gap/mean_abs" in records[20] and "final_gap/mean_abs" in records[-1]
    assert {r["step"] for r in records if "eval/accuracy" in r and r["phase"] == "rl"} == {0, 4, 8, 10}
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000005", "step_000010"]
    saved = ["step_000003.jsonl", "step_000006.jsonl", "step_000009.jsonl"]
    assert sorted(p.name for p in (run / "rollouts").glob("*.jsonl")) == saved
    for step in (3, 6, 9):  # the gap of the metrics, token by token
        engine, trainer = (
            [
                json.loads(line)
                for line in (run / "rollouts" / folder / f"step_{step:06d}.jsonl").read_text().splitlines()
            ]
            for folder in ("", "trainer")
        )
        assert [e["index"] for e in engine] == [t["index"] for t in trainer]
        pairs = [(e["logprobs"], t["trainer_logprobs"]) for e, t in zip(engine, trainer) if t["trainer_logprobs"]]
        sizes = [abs(a - b) for e, t in pairs for a, b in zip(t, e, strict=True)]
        record = next(r for r in records if (r["phase"], r["step"]) == ("rl", step))
        assert sum(sizes) / len(sizes) == pytest.approx(record["gap/mean_abs"], rel=1e-6)
        assert max(sizes) == pytest.approx(record["gap/max"], rel=1e-6)
    assert (run / "plot.png").stat().st_size > 10_000 and list((run / "tb").rglob("events*"))
    assert "rl 10/10" in out and oct(run.stat().st_mode)[-3:] == "700"
    state = RunState.read(run / "checkpoints" / "step_000010")
    assert state.step == 10 and state.sft_steps == 20 and state.cursor >= 60


def test_the_engine_held_the_converters_bytes(reference, tmp_path):
    """Codes and scales of every parameter after ten updates: what the converter writes for the same weights, to the byte."""
    from safetensors.torch import load_file

    from fp8slurm.checkpoint import hf_to_fp8
    from fp8slurm.engine.inside.digest import expected_digests, first_difference

    run, _ = reference
    weights(run, tmp_path / "hf")
    hf_to_fp8(tmp_path / "hf", tmp_path / "fp8")
    spec = ModelSpec.from_hf_dir(tmp_path / "fp8")
    tensors = {k: v for f in (tmp_path / "fp8").glob("*.safetensors") for k, v in load_file(f).items()}
    held = json.loads((run / "attempts" / "0" / "digests_0.json").read_text())
    assert held["version"] == 30

    def difference() -> str | None:
        expected = expected_digests(
            tensors.items(), num_key_value_heads=spec.num_kv_heads, tie_word_embeddings=spec.tie_word_embeddings
        )
        return first_difference(held["digests"], expected)

    assert difference() is None
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale_inv"]
    scale[1, 2] = torch.nextafter(scale[1, 2], torch.tensor(1.0))
    assert "layers.1.mlp.down_proj" in difference(), "one ulp of one scale must be seen"


def test_an_interrupted_run_is_the_same_run(runs, reference, tmp_path):
    """The engine is killed, then a rank, both without notice; the second attempt ends with the same metrics and weights."""
    process = runs.start("broken")
    run = runs.path("broken")
    runs.wait_for_step(process, "broken", 2)
    (engine,) = runs.engines(process)
    assert engine.ppid() == task_pids(run, 0)[2]
    engine.send_signal(signal.SIGKILL)
    runs.wait_for_step(process, "broken", 7)
    pids = task_pids(run, 0)
    os.kill(pids[1], signal.SIGKILL)
    killed = time.monotonic()
    out = runs.finish(process, status=1)
    assert time.monotonic() - killed < 60 and "task 1 (process" in out
    assert all(process_start(pid) is None for pid in pids.values())
    log = "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))
    assert "restart 1" in log, "the engine's death went unnoticed"
    assert [p.name for p in (run / "checkpoints").glob("step_*[0-9]")].count("step_000010") == 0

    runs.finish(runs.start("broken"))
    whole, again = read_metrics(reference[0]), read_metrics(run)
    assert [without_times(r) for r in again] == [without_times(r) for r in whole]
    want, got = weights(reference[0], tmp_path / "want"), weights(run, tmp_path / "got")
    assert sorted(want) == sorted(got)
    for name, tensor in want.items():
        assert torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)), name
    log = "".join(p.read_text() for p in (run / "attempts" / "1" / "logs").glob("*_log.err"))
    assert "continuing from" in log and "step_000005" in log


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_tasks_and_engines_end_with_the_command_that_started_them(runs, number):
    """A terminal is closed, the command is killed, or, under nohup, it outlives its terminal and is then ended: nothing
    goes on in the background, and the run can be started again."""
    name, nohup = f"left-{number.name}", number == signal.SIGTERM
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)  # what the run inherits
    try:
        process, run = runs.start(name), runs.path(name)
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not (runs.engines(process) and len(task_pids(run, 0)) == 3):
            assert process.poll() is None and time.monotonic() < deadline, runs.said(process)
            time.sleep(0.1)
        started = [*task_pids(run, 0).values(), runs.engines(process)[0].pid]
        if nohup:
            for pid in (process.pid, *started):
                os.kill(pid, signal.SIGHUP)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
            assert all(process_start(pid) for pid in started), "nohup ended with its terminal"
        process.send_signal(number)
        assert process.wait(30) != 0
        while any(process_start(pid) for pid in started):
            assert time.monotonic() < deadline, "tasks went on alone"
            time.sleep(0.1)
    finally:
        runs.stop(process)
    said = "".join(p.read_text() for p in (run / "attempts" / "0" / "logs").glob("*_log.err"))
    assert ("is gone" if number == signal.SIGKILL else "ended by SIGTERM") in said


HELD_COMMIT = """
import os, sys, time
if os.environ.get("HOLD_COMMIT"):  # in every process of the run, before anything else
    from fp8slurm.run.directory import RunDirectory

    commit = RunDirectory.commit_checkpoint

    def held(self, tmp, state):
        if state.name == os.environ["HOLD_COMMIT"]:
            time.sleep(3600)
        return commit(self, tmp, state)

    RunDirectory.commit_checkpoint = held
"""


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(runs, reference, tmp_path):
    """Steps go on beside the save; killed then, it leaves no checkpoint; the next attempt ends as an undisturbed run."""
    (tmp_path / "sitecustomize.py").write_text(HELD_COMMIT)
    path = f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"
    environment = os.environ | {"PYTHONPATH": path, "HOLD_COMMIT": "step_000005"}
    process, run = runs.start("half", environment=environment), runs.path("half")
    runs.wait_for_step(process, "half", 7)
    left = [p.name for p in (run / "checkpoints").iterdir()]
    assert "step_000005.0.tmp" in left and "step_000005" not in left, left
    written = [p.name for p in (run / "checkpoints" / "step_000005.0.tmp").iterdir()]
    assert ".metadata" in written and "COMPLETE" not in written
    for pid in task_pids(run, 0).values():
        os.kill(pid, signal.SIGKILL)
    runs.finish(process, status=1)
    runs.finish(runs.start("half"))
    log = "".join(p.read_text() for p in (run / "attempts" / "1" / "logs").glob("*_log.err"))
    assert "continuing from" in log and "step_000000" in log
    whole, again = read_metrics(reference[0]), read_metrics(run)
    assert [without_times(r) for r in again] == [without_times(r) for r in whole]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000005", "step_000010"]
    want, got = weights(reference[0], tmp_path / "want"), weights(run, tmp_path / "got")
    assert all(torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)) for name, tensor in want.items())


def test_a_finished_run_says_so_and_a_held_one_is_refused(runs, reference):
    assert "is finished: 10 steps" in runs.finish(runs.start("reference"))
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from fp8slurm.run.directory import RunDirectory\n"
         "RunDirectory(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(120)", str(reference[0])],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    holder.stdout.readline()
    try:
        assert f"held by process {holder.pid}" in runs.finish(runs.start("reference"), status=2)
    finally:
        holder.kill()
        holder.wait()


def test_tensor_and_pipeline_parallel_runs_start_like_one_rank(runs):
    """In FP32 without FP8 the first loss agrees within 1e-5, and updates arrive from two shards and from two stages."""
    losses = {}
    for name, layout in {
        "one": ["--slurm.ranks-per-node=1"],
        "tp2": ["--parallel.tensor-parallel-size=2"],
        "pp2": ["--parallel.pipeline-parallel-size=2"],
    }.items():
        runs.finish(
            runs.start(
                name, *layout, "--fp8.backend=off", "--fp8.engine=fp8", "--model.dtype=float32", "--run.steps=1", "--sft.max-steps=2",
                "--rollout.no-drop-no-signal", "--eval.every=0", "--observe.no-plot",
            )
        )  # fmt: skip
        losses[name] = read_metrics(runs.path(name))[0]["loss"]
        assert (runs.path(name) / "attempts" / "0" / "digests_0.json").is_file()
    assert abs(losses["tp2"] - losses["one"]) < 1e-5 and abs(losses["pp2"] - losses["one"]) < 1e-5, losses


def test_a_rank_that_hangs_ends_the_run_with_stacks(runs):
    """A stopped rank answers nobody: after watchdog.timeout_s the others say so, dump their stacks, and all are ended."""
    process = runs.start("hung", "--watchdog.timeout-s=25", "--sft.max-steps=4", "--rollout.no-drop-no-signal")
    runs.wait_for_step(process, "hung", 1)
    pids = task_pids(runs.path("hung"), 0)
    os.kill(pids[1], signal.SIGSTOP)
    out = runs.finish(process, status=1)
    assert "no progress for watchdog.timeout_s = 25 s" in out
    assert all(process_start(pid) is None for pid in pids.values())
    stacks = runs.path("hung") / "attempts" / "0" / "stacks"
    assert "loop.py" in (stacks / "task_0.txt").read_text() and "worker.py" in (stacks / "task_2.txt").read_text()


def test_the_reason_of_a_failing_run_is_the_last_thing_said(runs, tmp_path):
    """A reward function that raises ends the run in seconds; its reason stands at the end, once."""
    module = tmp_path / "bad_reward.py"
    module.write_text("def reward(response, label):\n    raise KeyError('no such answer')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = runs.command("bad", "--reward.kind=bad_reward:reward", "--sft.max-steps=0", "--sft.data=None")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "bad_reward:reward" in done.stderr and "no such answer" in done.stderr and "reward.on_error" in done.stderr
