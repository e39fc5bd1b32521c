"""A running job is asked for a trace, and nothing but its next step is another."""

import gzip
import json

import pytest

from fp8slurm.cli import main

pytestmark = pytest.mark.slow


def test_a_running_job_writes_its_next_step(tiny_runs) -> None:
    runs = tiny_runs(
        16, "--rollout.no-drop-no-signal", "--observe.no-plot", "--observe.no-tensorboard", data__eval=None,
        run__steps=4, sft__max_steps=14, rollout__truncated="keep", sft__batch_size=64, rollout__prompts_per_step=6, rollout__n_samples=4, rollout__max_replacements=0,
        checkpoint__every=10, eval__every=0,
    )  # fmt: skip
    process = runs.start("traced")
    try:
        runs.wait_for_step(process, "traced", 1)
        assert main(["trace", str(runs.path("traced"))]) == 0
        runs.finish(process)
    finally:
        runs.stop(process)
    attempt = runs.path("traced") / "attempts" / "0"
    (step,) = (attempt / "trace").iterdir()
    assert step.name in ("step_000003", "step_000004") and not (attempt / "trace.json").exists()
    (file,) = step.iterdir()
    names = {event.get("name") for event in json.loads(gzip.open(file).read())["traceEvents"]}
    assert file.name == "rank_0.json.gz" and {"FP8Matmul", "FP8MatmulBackward"} <= names
