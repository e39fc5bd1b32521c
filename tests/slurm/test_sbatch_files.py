"""The job scripts in sbatch/ ask for what `submit` and `chain` ask for, and give the same run."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fp8slurm.chain.links import links
from fp8slurm.chain.links import script as link_script
from fp8slurm.config import parse
from fp8slurm.observe.metrics import read_metrics, without_times
from fp8slurm.slurm.script import script

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "sbatch"
TRAINING = {
    "train_qwen3_4b_fp8.sbatch": "qwen3-4b-fp8", "train_qwen3_30b_a3b_fp8_2node.sbatch": "qwen3-30b-a3b-fp8",
    "rehearse_tiny.sbatch": "tiny-fp8",
}  # fmt: skip
SHORT = {"rehearse_tiny.sbatch": ["--slurm.time=30", "--slurm.signal-delay-s=60"]}
"""Settings beside the recipe's of what a script asks for."""
OWN = {"output", "error", "job-name"}
"""Directives that each has for itself: where the log goes, and under which name."""


def directives(text: str) -> dict[str, str]:
    pairs = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.M)
    return {name: value for name, value in pairs if name not in OWN}


def lines(text: str) -> list[str]:
    """Commands, continuation lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def srun_flags(text: str) -> list[str]:
    """Flags of the srun that starts the tasks, less those for its logs."""
    line = next(x for x in lines(text) if re.match(r"(exec )?srun ", x))
    words = shlex.split(line)
    flags = []
    for word in words[words.index("srun") + 1 :]:
        if word == "--cpus-per-task=$SLURM_CPUS_PER_TASK":
            word = f"--cpus-per-task={directives(text)['cpus-per-task']}"
        if word.startswith("--") and word not in ("--output", "--error"):
            flags.append(word)
        elif "python" in word or "FP8SLURM" in word:
            break
    return flags


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_a_training_script_is_what_submit_queues(name, tmp_path):
    written = (FOLDER / name).read_text()
    config = parse(TRAINING[name], ["--slurm.executor=slurm", *SHORT.get(name, [])])
    made = script(config, tmp_path)
    assert directives(written) == directives(made)
    assert srun_flags(written) == srun_flags(made) != []
    assert "trap : TERM USR2" in lines(written) and "trap : TERM USR2" in lines(made)
    assert lines(made)[-1].startswith("exec ") and "fp8slurm.slurm.epilogue $?" in lines(made)[-1]
    assert lines(written)[-1] == 'exec "$FP8SLURM" after $? "${ARGS[@]}"'
    assert f'ARGS=(--recipe {TRAINING[name]} "$@")' in lines(written)
    assert lines(written)[-2].endswith('"$FP8SLURM" worker "${ARGS[@]}"')
    assert f"#SBATCH --job-name={TRAINING[name]}\n" in written


def test_the_evaluation_script_is_what_the_chain_queues(tmp_path):
    written = (FOLDER / "eval_fp8.sbatch").read_text()
    config = parse("qwen3-4b-fp8", ["--slurm.executor=slurm"])
    link = links(config, tmp_path)[-1]
    made = link_script(link, 6, config, tmp_path)
    assert directives(written) == directives(made)
    flags = ["--ntasks-per-node=1", "--kill-on-bad-exit=1", "--cpus-per-task=108"]
    assert srun_flags(written) == srun_flags(made) == flags
    assert lines(written)[-1].endswith('"$FP8SLURM" eval "$@"') and " fp8slurm.cli eval " in lines(made)[-1]


def test_every_script_is_tested_here():
    assert {p.name for p in FOLDER.iterdir()} == {*TRAINING, "eval_fp8.sbatch"}
    for path in FOLDER.iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
@pytest.mark.slurm
def test_a_hand_written_script_gives_the_run_that_submit_gives(start_lab, runs):
    """The 4B script as it stands, but for the tiny recipe and less to ask for; then the evaluation script."""
    lab = start_lab("linuxproc")
    more = [
        "--run.steps=2", "--checkpoint.every=2", "--sft.max-steps=4", "--eval.every=0",
        "--slurm.nodes=1", "--slurm.ranks-per-node=1",
    ]  # fmt: skip
    text = (FOLDER / "train_qwen3_4b_fp8.sbatch").read_text()
    recipe = "--recipe qwen3-4b-fp8 "
    assert text.count(recipe) == 1
    file = runs.folder / "train.sbatch"
    file.write_text(text.replace(recipe, "--recipe tiny-fp8 "))
    command = ["sbatch", "--parsable", "--gpus-per-node=0", "--mem=8G", "--time=30", f"--chdir={ROOT}"]
    less = ["--ntasks-per-node=2", "--cpus-per-task=1", f"--output={runs.folder}/hand-%j.log"]
    by_hand = lab.ask(*command, *less, str(file), *runs.flags("hand", *more)[2:]).strip()
    by_submit = runs.submit(lab, "submitted", *more)
    runs.wait_end(lab, "submitted", by_submit)
    runs.wait_end(lab, "hand", by_hand)
    got, want = ([without_times(r) for r in read_metrics(runs.path(n))] for n in ("hand", "submitted"))
    assert got == want and len(got) == 4 + 3
    owner = json.loads((runs.path("hand") / "attempts" / "0" / "owner.json").read_text())
    assert owner["job"] == by_hand

    less = ["--cpus-per-task=2", f"--output={runs.folder}/eval-%j.log"]
    job = lab.ask(*command, *less, str(FOLDER / "eval_fp8.sbatch"), f"--run={runs.path('hand')}", "--dry-run").strip()
    runs.wait_end(lab, "hand", job)
    log = (runs.folder / f"eval-{job}.log").read_text()
    assert "step_000002" in log and "held_out" in log, log
