"""The flags of `fp8slurm eval`, checked, and the tasks that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fp8slurm.config import RunConfig
from fp8slurm.config.bounds import HOTTEST
from fp8slurm.config.schema import EngineSection, Fp8Section, Section
from fp8slurm.config.template import check_values, from_words
from fp8slurm.core.errors import InputError
from fp8slurm.eval.tasks import EvalTask, held_out, parse_task, run_tasks, shipped, unique

if TYPE_CHECKING:
    from fp8slurm.eval.checkpoints import Checkpoint
    from fp8slurm.models.spec import ModelSpec

WORSE = 3
"""Exit status: significantly worse than --fail-if-worse allows."""


class _Flags(Section):
    """What --engine.KEY may set."""

    engine: EngineSection = EngineSection()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fp8slurm eval",
        description="Ask a checkpoint the questions of one or more tasks, in FP8, in BF16, or in both and compare. The "
        "same command again goes on where an interrupted one stopped. docs/eval.md has the formats.",
    )
    p.add_argument("--run", type=Path, help="a run, such as runs/tiny-fp8; --checkpoint then names a step of it")
    p.add_argument(
        "--checkpoint",
        help="a run, a step of it, a torch_dist folder, or a Hugging Face folder in BF16 or FP8 (a run: its newest "
        "complete checkpoint)",
    )
    p.add_argument("--precision", choices=("fp8", "bf16", "both"), default="fp8", help="of the engine (default: fp8)")
    p.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"{', '.join(shipped())} (with =FILE, or --data), a JSONL or parquet file, or a definition MY.toml[=FILE] "
        "(default: a run's held-out prompts and its eval.tasks)",
    )
    p.add_argument("--data", type=Path, help="file with the questions, or folder with TASK.jsonl or TASK.parquet")
    p.add_argument("--grader", help="exact, numeric, choice, math or module:function, instead of the task's")
    sampling = p.add_argument_group("sampling (default: the task's)")
    sampling.add_argument("--n-samples", type=int, metavar="N", help="samples a question")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    sampling.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling; 1 is off")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="longest response")
    sampling.add_argument("--seed", type=int, help="default: the run's, or 0")
    talk = "module:function that holds a conversation for each answer, or none (default: the run's rollout.generate)"
    sampling.add_argument("--generate", metavar="F", help=talk)
    p.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    longest = "longer questions are left out (default: the run's, or none)"
    p.add_argument("--max-prompt-tokens", type=int, metavar="N", help=longest)
    p.add_argument("--on-bad-line", choices=("error", "skip"), help="a line that cannot be used: stop, or leave it out")
    template = """enable_thinking False, or as JSON '{"enable_thinking": false}' (default: the run's, or none)"""
    p.add_argument("--chat-template-kwargs", nargs="+", metavar="NAME VALUE", help=template)
    caches = "with the KV cache in the engine's dtype and in FP8, and compare (docs/eval.md)"
    p.add_argument("--both-kv-caches", action="store_true", help=caches)
    both = p.add_argument_group("with --precision both, or --both-kv-caches")
    worse = f"exit status {WORSE} when FP8 is significantly worse by more than X (0.02: two points)"
    both.add_argument("--fail-if-worse", type=float, metavar="X", help=worse)
    compared = "answers of each task whose log-probabilities are compared (default: 32)"
    both.add_argument("--score-questions", type=int, default=32, metavar="N", help=compared)
    model = p.add_argument_group("model and engines")
    model.add_argument("--origin-hf-dir", type=Path, metavar="HF", help="config and tokenizer for torch_dist")
    model.add_argument("--fp8-checkpoint", type=Path, metavar="HF", help="FP8 folder, instead of converting")
    model.add_argument("--modules-to-not-convert", nargs="+", default=[], metavar="MODULE", help="kept out of FP8")
    engines = "engines that share the work (default: as many as the GPUs carry, one without)"
    model.add_argument("--engines", type=int, default=0, metavar="K", help=engines)
    model.add_argument(
        "--nodes",
        type=int,
        metavar="N",
        help="as a Slurm step on N nodes, with that many engines on each: srun, in this allocation or in a new one "
        "(default: this node, or those of the step that this is a task of)",
    )
    srun = 'with --nodes, a flag of srun, such as --srun="--gpus-per-node=8"; may be repeated'
    model.add_argument("--srun", action="append", default=[], metavar="--NAME=VALUE", help=srun)
    batch = "samples in one request (default: 1 on GPUs, engine.max_running_requests on the CPU)"
    model.add_argument("--batch-size", type=int, metavar="N", help=batch)
    seeded = "on GPUs: engines for which --seed counts, slower (a run's run.deterministic is the default)"
    model.add_argument("--deterministic", action="store_true", help=seeded)
    limit = "seconds for one answer (default: the run's reward.timeout_s, or 5)"
    model.add_argument("--grader-timeout", type=float, metavar="S", help=limit)
    model.add_argument("--eval-dir", type=Path, metavar="DIR", help="for evaluations (default: RUN/eval, or runs/eval)")
    model.add_argument("--out", type=Path, metavar="DIR", help="folder of this evaluation (one precision)")
    model.add_argument("--dry-run", action="store_true", help="say what would be asked, start nothing")
    p.epilog = "--engine.KEY VALUE sets what [engine] of a run does, such as --engine.tensor-parallel-size 2"
    return p


def check(args: argparse.Namespace) -> None:
    """InputError: a value out of range, or flags that exclude each other."""
    if args.run is None and args.checkpoint is None:
        raise InputError("say what to evaluate: --checkpoint FOLDER, or --run RUN")
    for flag in ("n_samples", "max_tokens", "limit", "max_prompt_tokens", "batch_size", "engines", "nodes"):
        value, least = getattr(args, flag), 0 if flag == "engines" else 1
        if value is not None and value < least:
            raise InputError(f"--{flag.replace('_', '-')} {value}; allowed: {least} or more")
    if args.temperature is not None and not 0 <= args.temperature <= HOTTEST:
        raise InputError(f"--temperature {args.temperature:g}; allowed: 0 (greedy) to {HOTTEST:g}, commonly up to 1")
    for flag in ("seed", "score_questions"):
        value = getattr(args, flag)
        if value is not None and value < 0:
            raise InputError(f"--{flag.replace('_', '-')} {value}; allowed: 0 or more")
    for flag in ("eval_dir", "out"):
        path = getattr(args, flag)
        if path is not None and path.exists() and not path.is_dir():
            raise InputError(f"--{flag.replace('_', '-')} {path} is a file: give a folder")
    if args.run is not None and args.origin_hf_dir is not None:
        raise InputError(f"--origin-hf-dir {args.origin_hf_dir} with --run: a run knows its model; leave it out")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p}; allowed: above 0, at most 1")
    if args.srun and args.nodes is None:
        raise InputError(f"--srun {args.srun[0]} needs --nodes")
    wrong = [flag for flag in args.srun if not flag.startswith("--")]
    if wrong:
        raise InputError(f'--srun {wrong[0]}: flags of srun are written --name=value, as in --srun="--partition=gpu"')
    if args.grader_timeout is not None and not 0 < args.grader_timeout < float("inf"):
        raise InputError(f"--grader-timeout {args.grader_timeout}; allowed: above 0 seconds")
    if args.both_kv_caches and args.precision == "both":
        raise InputError("--both-kv-caches with --precision both: one difference at a time; allowed: fp8 or bf16")
    two = "--precision both" if args.precision == "both" else "--both-kv-caches" if args.both_kv_caches else None
    if args.fail_if_worse is not None and (two is None or not 0 <= args.fail_if_worse <= 1):
        raise InputError(
            f"--fail-if-worse {args.fail_if_worse} needs --precision both or --both-kv-caches; allowed: 0 to 1 (0.02: "
            f"two points)"
        )
    if args.out is not None and two is not None:
        raise InputError(f"--out names one evaluation; with {two} give --eval-dir")
    if args.fp8_checkpoint is not None and args.precision == "bf16":
        raise InputError("--fp8-checkpoint is not used with --precision bf16")
    if args.chat_template_kwargs is not None:
        try:
            check_values(from_words(args.chat_template_kwargs))
        except InputError as error:
            raise InputError(f"--chat-template-kwargs {error}") from None


def engine_section(config: RunConfig | None, flags: list[str], both_kv_caches: bool = False) -> EngineSection:
    """[engine] of the run, or its defaults, with the --engine.KEY flags on top.

    InputError: any other flag; another source of an FP8 KV cache's scales than the checkpoint; a cache, where both are
    asked for."""
    import tyro

    from fp8slurm.config.load import flags_named

    unknown = [f for f in flags if f.startswith("-") and not f.startswith("--engine.")]
    if unknown or (flags and not flags[0].startswith("--engine.")):
        raise InputError(f"{(unknown or flags)[0]}: no such flag (fp8slurm eval --help)")
    section = config.engine if config is not None else EngineSection()
    with flags_named():
        chosen = tyro.cli(_Flags, prog="fp8slurm eval", args=flags, default=_Flags(engine=section)).engine
    if both_kv_caches and any(flag.replace("_", "-").startswith("--engine.kv-cache") for flag in flags):
        raise InputError("--engine.kv-cache with --both-kv-caches, which sets it; leave one of the two out")
    if chosen.kv_scales != section.kv_scales:
        raise InputError(
            f"--engine.kv-scales {chosen.kv_scales}: an evaluation takes the checkpoint's own scales; leave it out"
        )
    return chosen


def check_kv_cache(args: argparse.Namespace, section: EngineSection, checkpoint: Checkpoint, device: str) -> None:
    """InputError: an FP8 KV cache is asked for, and a folder that would be served has not all scales, or the engine's
    arguments do not go with it; BadCheckpoint. device: cpu or cuda."""
    from fp8slurm.checkpoint.formats.kv_scales import check_scales
    from fp8slurm.models.kv_scales import check_arguments
    from fp8slurm.models.spec import ModelSpec

    if args.both_kv_caches:
        flag = "--both-kv-caches"
    elif section.kv_cache == "fp8":
        flag = "--engine.kv-cache fp8"
    else:
        return
    check_arguments(section.extra_args, device)
    layers = ModelSpec.from_hf_dir(checkpoint.tokenizer_folder).num_layers
    served = [checkpoint.path] if args.precision != "fp8" or args.fp8_checkpoint is None else []
    for folder in [*served, *([args.fp8_checkpoint] if args.fp8_checkpoint is not None else [])]:
        check_scales(folder, layers, flag)


def check_engine(args: argparse.Namespace, section: EngineSection, spec: ModelSpec) -> int:
    """The most tokens of a question with its answer. InputError: the engine or the conversion cannot be as asked."""
    from fp8slurm.fp8.policy import has_effect
    from fp8slurm.models.engine_layout import check_engine_layout
    from fp8slurm.models.names import NameTable

    positions, cache = spec.max_position_embeddings, section.max_total_tokens
    context = section.context_length or positions
    if context > positions:
        raise InputError(f"--engine.context-length {context}: the model has {positions} positions; allowed: so many")
    engine = "bf16" if args.precision == "bf16" else "fp8"
    check_engine_layout(RunConfig(engine=section, fp8=Fp8Section(backend="off", engine=engine)), spec)
    modules = [name.rpartition(".")[0] for name in NameTable(spec).hf_tensors()]
    if wrong := [entry for entry in args.modules_to_not_convert if not has_effect(entry, modules)]:
        raise InputError(
            f"--modules-to-not-convert {wrong[0]}: the model has no such module; allowed: a full name, an ancestor's, "
            f"or last components, such as {modules[1]}"
        )
    return min(context, cache or context)


def tasks_of(args: argparse.Namespace, config: RunConfig | None) -> list[EvalTask]:
    """The tasks, the flags for sampling on top. InputError."""
    if args.tasks is not None:
        kind = config.reward.kind if config is not None else None
        own = args.grader or ("exact" if kind == "digits" else kind)
        bare = [t.endswith((".jsonl", ".parquet")) and "=" not in t for t in args.tasks]
        tasks = [parse_task(t, args.data, own if b else args.grader) for t, b in zip(args.tasks, bare)]
        named = sum("=" not in t and not b for t, b in zip(args.tasks, bare))
        if args.data is not None and args.data.is_file() and named > 1:
            raise InputError(f"--data {args.data} is one file for several tasks; give each its own: NAME=FILE")
    elif config is None:
        if args.data is None:
            raise InputError(f"say what to ask: --tasks {', '.join(shipped())}, or a JSONL or parquet file")
        tasks = [parse_task(str(args.data), None, args.grader)]
    elif args.data is not None:
        first = held_out(config, args.data)
        assert first is not None
        tasks = [first if args.grader is None else first.model_copy(update={"grader": args.grader})]
    else:
        tasks = run_tasks(config)
        if not tasks:
            raise InputError("the run has no held-out prompts: give questions with --tasks or --data")
        if args.grader is not None:
            raise InputError("--grader needs --tasks or --data: the run's own prompts are graded by its reward")
    flags = {k: getattr(args, k) for k in ("n_samples", "temperature", "top_p", "max_tokens")}
    tasks = [t.model_copy(update={k: v for k, v in flags.items() if v is not None}) for t in unique(tasks)]
    for task in tasks:
        if task.n_samples > 1 and task.temperature == 0:
            raise InputError(
                f"{task.name}: {task.n_samples} samples at temperature 0 are all the same; set --temperature, or "
                f"--n-samples 1"
            )
    return tasks
