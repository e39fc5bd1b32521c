"""The model card of an exported checkpoint: how it is served, what it scored and on what, and the run's settings."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from fp8slurm import __version__
from fp8slurm.chain.serving import GENERATION
from fp8slurm.core.files import read_json
from fp8slurm.eval.checkpoints import Checkpoint
from fp8slurm.report import content
from fp8slurm.report.safe import figure, one_line
from fp8slurm.report.text import table_lines
from fp8slurm.run.evaluations import Interval
from fp8slurm.run.reader import Run

SECTIONS = ("model", "fp8", "data", "sft", "rollout", "reward", "algorithm", "teacher", "train", "optim", "moe")
"""Of the settings: what made the weights. How the cluster and the folders are called is nobody's business."""
PACKAGES = ("fp8slurm", "torch", "megatron-core", "sglang", "transformers", "transformer-engine")
FOLDERS = re.compile(r"""[^\s"'=,\[\]]*/""")


def model_card(run: Run, checkpoint: Checkpoint, origin: Path, fp8: bool, texts: Mapping[str, bytes]) -> str:
    """README.md of the folder, for people who have nothing else of the run. texts: what `serving_files` made."""
    run = replace(run, records=[r for r in run.records if _is_before(r["phase"], r["step"], checkpoint.name)])
    supervised, steps = run.last_step("sft") or 0, run.last_step() or 0
    trained = [f"{supervised} supervised steps"] * bool(supervised) + [f"{steps} steps of reinforcement learning"]
    form = "block FP8 (e4m3, 128 x 128, FP32 scales)" if fp8 else "BF16"
    tags = ["reinforcement-learning", "fp8slurm", *(["fp8"] if fp8 else [])]
    out = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(tags)}",
        "---",
        f"# {one_line(run.name)}, {checkpoint.name}",
        "",
        f"{one_line(origin.resolve().name)} after {' and '.join(trained)}, by fp8slurm {__version__} "
        f"({content.precision(run)}). The weights here are {form}.",
        "",
        "## How it is served",
        "",
        "```sh",
        "python -m sglang.launch_server --model-path THIS_FOLDER",
        "vllm serve THIS_FOLDER",
        "```",
        "",
        *_asked(run, checkpoint, origin, texts),
        "",
        "## Figures",
        "",
        *table_lines(("what", "figure", "measured on"), _figures(run, checkpoint)),
        "## Settings that are not the default",
        "",
        *table_lines(("setting", "value"), _settings(run)),
    ]
    if run.attempts and (packages := run.attempts[-1].packages):
        versions = [f"{p} {v}" for p in PACKAGES if (v := packages.get(p)) and v[0].isdigit()]
        out += [f"Made with {', '.join(versions)}.", ""]
    if switched := content.controls(run):
        out += [f"{content.CONTROL}: {', '.join(switched)}.", ""]
    return "\n".join(out).rstrip() + "\n"


def _is_before(phase: str, step: int, name: str) -> bool:
    """Whether a record is of a step that led to this checkpoint."""
    of, _, last = name.partition("_")
    return step <= int(last) if (phase == "sft") == (of == "sft") else phase == "sft"


def _asked(run: Run, checkpoint: Checkpoint, origin: Path, texts: Mapping[str, bytes]) -> Iterable[str]:
    """Template, end tokens and sampling, a line each."""
    assert checkpoint.config is not None
    data, rollout = checkpoint.config.data, checkpoint.config.rollout
    if data.chat_template_kwargs:
        given = ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in data.chat_template_kwargs.items())
        yield f"- The chat template has the run's arguments as its defaults: {given}. A request may set others."
    said = json.loads(texts[GENERATION]) if GENERATION in texts else {}
    if not said:
        path = origin / GENERATION
        said = read_json(path if path.is_file() else origin / "config.json")
    yield f"- A response ends with one of the tokens {said.get('eos_token_id')}."
    if checkpoint.config.engine.kv_cache == "fp8":
        yield (
            "- In training engines kept keys and values in e4m3, with the scales that are here (`k_scale`, `v_scale`). "
            "A server does so if it is told to, and with these scales if its model reads them: SGLang's Qwen3 (0.5.21) "
            "does not."
        )
    yield (
        f"- In training responses were sampled at temperature {rollout.temperature:g} with top-p {rollout.top_p:g}, at "
        f"most {rollout.max_tokens} tokens; what a server samples with by itself stands in {GENERATION}, if at all."
    )


def _figures(run: Run, checkpoint: Checkpoint) -> list[tuple[str, str, str]]:
    assert checkpoint.config is not None
    config, out = checkpoint.config, []
    train = ", ".join(_name(s) for s in [config.data.train, *(x.file for x in config.data.sources.values())] if s)
    rewards = [(step, value) for step, value in run.series("reward/mean") if value is not None][-content.EDGE :]
    if rewards:
        on = f"samples of training, {train}, reward {config.reward.kind}, temperature {config.rollout.temperature:g}"
        out.append((f"mean reward, steps {rewards[0][0]} to {rewards[-1][0]}", _mean(rewards), on))
    mine = [e for e in run.evaluations if e.checkpoint == checkpoint.name]
    for e in mine:
        who = "in training" if e.made_by == "training" else "by fp8slurm eval"
        of = f" of {_name(config.data.eval)}" if e.task == "held_out" and config.data.eval else ""
        on = f"{e.questions} questions{of}, {e.samples} answers, served in {e.served}, {who}"
        out.append((f"accuracy, {e.task}", _interval(e.accuracy), on))
    held_out = [(step, value) for step, value in run.series("eval/accuracy") if value is not None]
    if held_out and not mine:
        of = _name(config.data.eval) if config.data.eval else "held-out prompts"
        out.append((f"held-out accuracy, step {held_out[-1][0]}", figure(held_out[-1][1]), f"{of}, in training"))
    gaps = [(step, value) for step, value in run.series("gap/mean_abs") if value is not None][-content.EDGE :]
    if gaps:
        what = f"gap between trainer and engine, steps {gaps[0][0]} to {gaps[-1][0]}"
        out.append((what, f"{_mean(gaps)} nats", "mean |difference| of log-probabilities a token, the same samples"))
    return out or [("none", "", "the run has recorded no step before this checkpoint")]


def _mean(series: list[tuple[int, float]]) -> str:
    return figure(statistics.fmean(value for _, value in series))


def _interval(accuracy: Interval) -> str:
    value, low, high = accuracy
    return figure(value) if low is None or high is None else f"{figure(value)} (95%: {figure(low)} to {figure(high)})"


def _settings(run: Run) -> list[tuple[str, str]]:
    """Paths by their last part."""
    return [
        (s.key, FOLDERS.sub("", s.value))
        for s in content.settings(run)
        if s.changed and s.key.partition(".")[0] in SECTIONS
    ] or [("all", "as by default")]


def _name(path: Path | str) -> str:
    return Path(path).name
