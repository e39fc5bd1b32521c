"""fp8slurm plan --from-run, --rates: one layout predicted from another one's rates; recorded on H100s (docs/gpu.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fp8slurm.config import RunConfig
from fp8slurm.core.errors import InputError
from fp8slurm.plan import balance
from fp8slurm.plan.cli import main

RECORDED = {
    # docs/log/2026-11-28.md, Loops of the 4B: way, training and engine GPUs, generate s, log-probabilities and training
    # s, the rest, whole step s (of two machines or steps the mean)
    "four shared": ("shared", 4, 4, 2.9, 1.0 + 3.0, 0.22 + 0.14 + 0.14, 7.4),
    "two shared": ("shared", 2, 2, 5.8, 1.5 + 5.1, 0.3 + 0.08 + 0.13, 12.85),
    "one and one": ("split", 1, 1, 8.4, 3.55 + 11.8, 0.11 + 0.1, 23.95),
}
GENERATED, TRAINED = 131_072, 135_000


def rates_from(name: str) -> balance.Rates:
    _, training, serving, generate, train, rest, _ = RECORDED[name]
    return balance.Rates(GENERATED / generate / serving, TRAINED / train / training, GENERATED, TRAINED, rest)


@pytest.mark.parametrize("source", RECORDED)
@pytest.mark.parametrize("target", RECORDED)
def test_a_layout_is_predicted_from_anothers_rates(source, target):
    """Within 15% where GPUs are twice or half as many or as many. Four shared ones and one and one are 17% apart: the
    engine that had a GPU for itself was 1.4 times as fast as those that shared theirs, which a GPU's rate does not say."""
    way, training, serving, *_, measured = RECORDED[target]
    predicted = balance.predict(rates_from(source), way, training, serving).step_s
    off = predicted / measured - 1
    bound = 0.2 if {source, target} == {"four shared", "one and one"} else 0.15
    assert abs(off) < bound, f"{target} from {source}: {predicted:.2f} s, measured {measured} s, off by {off:+.1%}"


def run_folder(path: Path, **settings) -> Path:
    path.mkdir()
    config = {"slurm": {"nodes": 1, "gpus_per_node": 2, "ranks_per_node": 2}, "engine": {"per_node": 2}, **settings}
    (path / "config.json").write_text(json.dumps(config))
    records = [{"phase": "rl", "step": 0, "time/generate": 5.0, "rollout/tokens": 9}]
    for step, slow in ((1, 9.0), (2, 1.0), (3, 1.0)):  # the first one compiles
        records.append({"phase": "rl", "step": step, "rollout/tokens": GENERATED, "tokens": TRAINED,
                        "time/generate": 5.8 * slow, "time/logprobs": 1.5, "time/train": 5.1 * slow, "time/sync": 0.3,
                        "time/sleep": 0.08, "time/step": 12.8})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_from_a_run(tmp_path, capsys):
    run = run_folder(tmp_path / "two")
    wide = ["--recipe", "qwen3-4b-fp8", "--from-run", str(run)]
    assert main([*wide, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rates"]["generate"] == pytest.approx(GENERATED / 5.8 / 2)
    assert told["rates"]["train"] == pytest.approx(TRAINED / 6.6 / 2) and told["rates"]["update_s"] == pytest.approx(
        0.38
    )
    ways = {(x["way"], x["training_gpus"], x["engine_gpus"]): x for x in told["layouts"]}
    assert set(ways) == {("shared", 8, 8), *((w, 8 - n, n) for n in (2, 4, 6) for w in ("split", "one ahead"))}
    assert [x["step_s"] for x in told["layouts"]] == sorted(x["step_s"] for x in told["layouts"])
    assert told["layouts"][0]["way"] == "shared" and told["layouts"][0]["step_s"] == pytest.approx(12.4 / 4 + 0.38)
    assert main([*wide, "--json", "--longest", "5"]) == 0
    told = json.loads(capsys.readouterr().out)
    best = told["layouts"][0]
    assert (best["way"], best["training_gpus"]) == ("one ahead", 4)
    assert best["step_s"] == pytest.approx(5 + 0.38) and best["trainer_waits"] == pytest.approx(1 - 3.3 / 5.38)
    assert best["flags"] == (
        "--engine.placement split --slurm.ranks-per-node 4 --engine.per-node 4 --engine.gpus 4 --rollout.max-staleness 1"
    )
    assert main(wide) == 0
    shown = capsys.readouterr().out
    assert "fastest: --engine.placement shared" in shown and "one ahead" in shown
    assert main(["--recipe", "qwen3-4b-fp8", "--rates", "11000", "10000", "131072"]) == 0


def test_what_cannot_be_balanced(tmp_path):
    with pytest.raises(InputError, match="no RL step that trained"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "metrics.jsonl").write_text("")
        (tmp_path / "empty" / "config.json").write_text(json.dumps({"slurm": {"gpus_per_node": 8}}))
        balance.rates_of(tmp_path / "empty")
    with pytest.raises(InputError, match="on how many GPUs it ran"):
        balance.rates_of(run_folder(tmp_path / "cpu", slurm={"gpus_per_node": 0}))
    with pytest.raises(InputError, match="--slurm.gpus-per-node 0"):
        balance.layouts(RunConfig(), balance.Rates(1, 1, 1, 1))
    three = RunConfig.model_validate(
        {"slurm": {"gpus_per_node": 1, "nodes": 3}, "parallel": {"tensor_parallel_size": 2}}
    )
    with pytest.raises(InputError, match="a multiple of 2"):
        balance.layouts(three, balance.Rates(1, 1, 1, 1))
    with pytest.raises(InputError, match="all three must be above 0"):
        main(["--recipe", "qwen3-4b-fp8", "--rates", "1", "0", "1"])
    with pytest.raises(InputError, match="--longest 5: seconds"):
        main(["--recipe", "qwen3-4b-fp8", "--longest", "5"])
