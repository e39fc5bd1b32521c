"""`fp8slurm eval` and `fp8slurm compare`: flags in, evaluations out (docs/eval.md)."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp8slurm.config.derived import spare_cores
from fp8slurm.config.schema import DataSection, EngineSection, RewardSection, RolloutSection
from fp8slurm.config.template import from_words
from fp8slurm.core.errors import InputError
from fp8slurm.core.signals import ended_is_interrupted
from fp8slurm.engine.arguments import check_extra_arguments
from fp8slurm.eval.checkpoints import Checkpoint, Precision, prepare, recognize
from fp8slurm.eval.flags import WORSE, check, check_engine, check_kv_cache, engine_section, parser, tasks_of
from fp8slurm.eval.questions import load_questions, task_doubts
from fp8slurm.eval.records import Records, choose_folder
from fp8slurm.eval.tasks import EvalTask
from fp8slurm.run.evaluations import served_title

if TYPE_CHECKING:
    from fp8slurm.config import RunConfig
    from fp8slurm.eval.nodes import Place, StepRendezvous
    from fp8slurm.eval.run import EvalSpec, Serving

KvCache = Literal["auto", "fp8"]


def main(argv: list[str]) -> int:
    """Exit status 0, 1 (an engine failed), 3 (--fail-if-worse); bad input is an InputError that names it."""
    args, rest = parser().parse_known_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    check(args)
    from fp8slurm.eval.nodes import Place

    place = Place.here()
    if args.nodes is not None and place is not None and args.nodes != place.count:
        raise InputError(f"--nodes {args.nodes} in a Slurm step on {place.count} nodes; leave one of them out")
    step = args.checkpoint if args.run is not None else None
    path = Path(args.checkpoint) if args.run is None and args.checkpoint is not None else None
    checkpoint = recognize(path, args.run, step, args.origin_hf_dir, args.eval_dir)
    starts_step = args.nodes is not None and place is None
    if (place is None or place.number == 0) and (args.dry_run or not starts_step):
        print(checkpoint.describe(), flush=True)
    engine = engine_section(checkpoint.config, rest, args.both_kv_caches)
    tasks = tasks_of(args, checkpoint.config)
    if warning := check_extra_arguments(engine.extra_args):
        _warn([warning])
    plan = _Plan.make(args, checkpoint, tasks, engine)
    command = step_command(args.nodes, args.srun, argv) if starts_step else None
    if args.dry_run:
        plan.describe(place, command)
        return 0
    if command is not None:
        return _start_step(command)
    from fp8slurm.engine.server import EngineError

    try:
        with ended_is_interrupted():
            return plan.run() if place is None else _run_on_nodes(plan, place)
    except EngineError as error:
        print(f"fp8slurm eval: {error}\nThe same command goes on with the samples that are there.", file=sys.stderr)
        return 1


def _conversations(
    args: argparse.Namespace, config: RunConfig | None, tasks: Sequence[EvalTask]
) -> RolloutSection | None:
    """The settings of rollout.generate, the run's or --generate's. InputError: it cannot be called, or not there."""
    from fp8slurm.eval.nodes import Place
    from fp8slurm.rewards.pool import GENERATE
    from fp8slurm.sessions.runner import load_generate

    rollout = config.rollout if config is not None else RolloutSection()
    name = args.generate if args.generate is not None else rollout.generate
    if name in (None, "none"):
        if alone := [t.name for t in tasks if t.grader == GENERATE]:
            raise InputError(f"task {alone[0]}: grader {GENERATE} keeps the rewards of --generate, which is not given")
        return None
    load_generate(name, "--generate")
    if args.nodes is not None or Place.here() is not None:
        raise InputError(f"--generate {name} on several nodes: conversations are held on one; leave --nodes out")
    return rollout.model_copy(update={"generate": name})


def _start_step(command: list[str]) -> int:
    """Become the step, of this allocation or of a new one."""
    if shutil.which(command[0]) is None:
        raise InputError("--nodes: there is no srun on this machine; leave it out to evaluate here")
    os.execvp(command[0], command)


def step_command(nodes: int, flags: Sequence[str], argv: Sequence[str]) -> list[str]:
    """What --nodes starts: the same command with one task a node; in an allocation each gets all cores."""
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    command = ["srun", f"--nodes={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    if "SLURM_JOB_ID" in os.environ and cores:
        command.append(f"--cpus-per-task={cores}")
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--nodes")
    own.add_argument("--srun")
    return [*command, *flags, sys.executable, "-P", "-m", "fp8slurm.cli", "eval", *own.parse_known_args(argv)[1]]


def _run_on_nodes(plan: _Plan, place: Place) -> int:
    """This task's part of an evaluation on several nodes."""
    from fp8slurm.engine.server import EngineError
    from fp8slurm.eval.nodes import StepRendezvous
    from fp8slurm.eval.run import assist

    rendezvous = StepRendezvous(plan.checkpoint.eval_dir, place)
    try:
        if place.number:
            for precision, kv_cache in plan.ways:
                assist(plan.spec, plan.with_cache(kv_cache), precision, rendezvous)
            return 0
        rendezvous.remove_old()
        rendezvous.wait_started()
        return plan.run(rendezvous)
    except Exception as error:
        ours = isinstance(error, (EngineError, InputError))
        rendezvous.fail(str(error) if ours else f"{type(error).__name__}: {error}")
        where = f"node {place.number} ({socket.gethostname()})"  # the log of a step is that of all its tasks
        if ours and place.number:
            raise type(error)(f"{where}: {error}") from error
        error.add_note(where)
        raise
    finally:
        if not place.number:
            rendezvous.remove()


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        print(f"fp8slurm eval: warning: {text}", file=sys.stderr)


def _meant(args: argparse.Namespace, unmeant: Mapping[str, Sequence[str]]) -> None:
    """InputError: what the command line says cannot be meant. What a run says it was trained with: a warning."""
    given = {"--chat-template-kwargs": args.chat_template_kwargs, "--tasks": args.tasks or args.data}
    if wrong := [f"{flag} {text}" for flag, texts in unmeant.items() if given[flag] for text in texts]:
        raise InputError("\n".join(wrong))
    _warn([text for texts in unmeant.values() for text in texts])


def _given_fp8(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """--fp8-checkpoint. InputError: it is none."""
    given = recognize(args.fp8_checkpoint, None, None, None, checkpoint.eval_dir)
    if not given.kind.endswith("FP8"):
        raise InputError(f"--fp8-checkpoint {given.path} is {given.kind}, not block FP8")
    return given


@dataclass(frozen=True)
class _Plan:
    """A checked command, before anything is converted or started."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    spec: EvalSpec
    serving: Serving

    @classmethod
    def make(
        cls, args: argparse.Namespace, checkpoint: Checkpoint, tasks: list[EvalTask], section: EngineSection
    ) -> _Plan:
        from fp8slurm.data.chat_template import unused_arguments
        from fp8slurm.data.prompts import end_token_ids, load_tokenizer
        from fp8slurm.engine.server import EngineSettings
        from fp8slurm.engine.settings import engine_settings
        from fp8slurm.eval.engines import gpu_shares
        from fp8slurm.eval.nodes import Place
        from fp8slurm.eval.run import EvalSpec, Serving
        from fp8slurm.models.spec import ModelSpec

        config = checkpoint.config
        data = config.data if config is not None else DataSection(max_prompt_tokens=10**9)
        changes = {k: getattr(args, k) for k in ("max_prompt_tokens", "on_bad_line")}
        if args.chat_template_kwargs is not None:
            changes["chat_template_kwargs"] = from_words(args.chat_template_kwargs)
        data = data.model_copy(update={k: v for k, v in changes.items() if v is not None})
        folder = checkpoint.tokenizer_folder
        tokenizer = load_tokenizer(folder)
        more = config.rollout.stop_token_ids if config is not None else []
        questions, left_out = {}, {}
        unmeant: dict[str, list[str]] = {"--chat-template-kwargs": [], "--tasks": []}
        if unused := unused_arguments(tokenizer, data.chat_template_kwargs):
            unmeant["--chat-template-kwargs"].append(unused)
        for task in tasks:
            found, left_out[task.name] = load_questions(task, tokenizer, data, args.limit)
            questions[task.name] = found
            doubts = task_doubts(task, found, None if args.limit else len(found) + left_out[task.name])
            unmeant["--tasks"] += doubts.unmeant
            _warn(doubts.unusual)
        _meant(args, unmeant)
        most = check_engine(args, section, ModelSpec.from_hf_dir(folder))
        _warn(
            [
                f"{t.name}: answers end where {most} tokens are reached with the question, not at {t.max_tokens} "
                f"(--engine.context-length, --engine.max-total-tokens)"
                for t in tasks
                if t.max_tokens > most
            ]
        )
        if args.fp8_checkpoint is not None:
            _given_fp8(args, checkpoint)
        seed = args.seed if args.seed is not None else config.run.seed if config is not None else 0
        settings = engine_settings(config) if config is not None else EngineSettings()
        elsewhere = args.nodes is not None and Place.here() is None
        check_kv_cache(args, section, checkpoint, "cpu" if settings.on_cpu and not elsewhere else "cuda")
        deterministic = settings.deterministic or args.deterministic
        settings = replace(settings, section=section, seed=seed, deterministic=deterministic)
        engines = args.engines if elsewhere else len(gpu_shares(settings, args.engines))
        if settings.on_cpu and engines > 1 and not settings.cpu_threads:
            cores = len(os.sched_getaffinity(0))
            settings = replace(settings, cpu_threads=max(1, cores // engines // section.tensor_parallel_size))
        size = args.batch_size or (section.max_running_requests if settings.on_cpu else 1)
        spec = EvalSpec(
            tasks,
            questions,
            left_out,
            seed,
            sorted({*end_token_ids(folder, tokenizer), *more}),
            tokenizer,
            dict(data.chat_template_kwargs),
            _conversations(args, config, tasks),
        )
        spec.check_context(most)
        limits = config.reward if config is not None else RewardSection()
        limits = limits.model_copy(update={"workers": limits.workers or spare_cores(max(1, engines))})
        if args.grader_timeout is not None:
            limits = limits.model_copy(update={"timeout_s": args.grader_timeout})
        return cls(args, checkpoint, spec, Serving(settings, engines, size, limits))

    @property
    def ways(self) -> tuple[tuple[Precision, KvCache], ...]:
        """(precision, engine.kv_cache), in the order in which they are evaluated: of two the baseline first."""
        precision, kv_cache = self.args.precision, self.serving.engine.section.kv_cache
        if self.args.both_kv_caches:
            return (precision, "auto"), (precision, "fp8")
        return (("bf16", kv_cache), ("fp8", kv_cache)) if precision == "both" else ((precision, kv_cache),)

    def with_cache(self, kv_cache: KvCache) -> Serving:
        """How it is served with this engine.kv_cache."""
        engine = self.serving.engine
        section = engine.section.model_copy(update={"kv_cache": kv_cache})
        return replace(self.serving, engine=replace(engine, section=section))

    def describe(self, place: Place | None, command: list[str] | None) -> None:
        """Say what would be asked and started; of several tasks task 0 does."""
        if place is not None and place.number:
            return
        from fp8slurm.eval.display import count

        for task in self.spec.tasks:
            print(
                f"{task.name}: {count(len(self.spec.questions[task.name]), 'question')} of {task.data}, "
                f"{count(task.n_samples, 'sample')} each, temperature {task.temperature:g}, top-p {task.top_p:g}, at "
                f"most {task.max_tokens} tokens, grader {task.grader}"
            )
            print(f"  the first: {self.spec.questions[task.name][0].text!r}")
        of = place.count if place is not None else self.args.nodes or 1
        nodes = f" on each of {of} nodes" if of > 1 else ""
        engines = count(self.serving.engines, "engine") if self.serving.engines else "as many engines as the GPUs carry"
        print(
            f"{count(self.spec.samples, 'sample')} in {' and in '.join(served_title(*w) for w in self.ways)}, by "
            f"{engines}{nodes}; results in {self.checkpoint.eval_dir}"
        )
        if command is not None:
            print(f"as this step: {shlex.join([word for word in command if word != '--dry-run'])}")

    def run(self, rendezvous: StepRendezvous | None = None) -> int:
        """Evaluate; the exit status. rendezvous: of the step's task 0."""
        from rich.console import Console

        from fp8slurm.eval.display import show_comparison, show_summary

        console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        first, *second = self.ways
        base, summary = self.evaluate(*first, Path() if second else None, rendezvous)
        show_summary(summary, console)
        if not second:
            print(f"{base}/summary.json, samples.jsonl")
            return 0
        folder, summary = self.evaluate(*second[0], base, rendezvous)
        show_summary(summary, console)
        name = f"compare-{folder.name if self.args.both_kv_caches else folder.name.replace('-fp8', '', 1)}"
        return report(folder, base, self.checkpoint.eval_dir / name, self.args.fail_if_worse, console, show_comparison)

    def evaluate(
        self, precision: Precision, kv_cache: KvCache, score_of: Path | None, rendezvous: StepRendezvous | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """(folder, summary) of one way. score_of: see run.evaluate; Path() stands for its own."""
        from fp8slurm.eval.run import evaluate

        source, serving = self.checkpoint, self.with_cache(kv_cache)
        if precision == "fp8" and self.args.fp8_checkpoint is not None:
            source = replace(_given_fp8(self.args, source), name=source.name, step=source.step)
        model, how = prepare(source, precision, tuple(self.args.modules_to_not_convert))
        print(f"{serving.title(precision)}: {model} ({how})", flush=True)
        settings = self.spec.settings(source, precision, model, serving.engine)
        folder = choose_folder(source.eval_dir, f"{source.name}-{serving.name(precision)}", settings, self.args.out)
        with Records(folder, settings) as records:
            if records.rows and not records.complete:
                print(f"{folder}: going on, {len(records.rows)} of {self.spec.samples} samples are there", flush=True)
            of = folder if score_of == Path() else score_of
            return folder, evaluate(
                self.spec, serving, source, precision, model, records, of, self.args.score_questions, rendezvous
            )


def report(a: Path, b: Path, out: Path, fail_if_worse: float | None, console: Any, show: Any) -> int:
    """Compare, write, show; the exit status."""
    from fp8slurm.eval.compare import compare, write

    comparison = compare(a, b, fail_if_worse)
    path = write(comparison, out)
    show(comparison, console)
    print(path)
    return WORSE if comparison["worse"] else 0


def compare_main(argv: Sequence[str]) -> int:
    """`fp8slurm compare A B`: exit status 0, or 3 with --fail-if-worse; bad input is an InputError."""
    p = argparse.ArgumentParser(
        prog="fp8slurm compare",
        description="Compare two finished evaluations of the same questions; B is the baseline.",
    )
    p.add_argument("a", type=Path, metavar="A", help="folder of an evaluation, such as runs/NAME/eval/step_000040-fp8")
    p.add_argument("b", type=Path, metavar="B", help="the baseline's, such as runs/NAME/eval/step_000040-bf16")
    p.add_argument(
        "--fail-if-worse",
        type=float,
        metavar="X",
        help=f"exit status {WORSE} when A is significantly worse by more than X",
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="of compare.json (default: compare-A-with-B beside A)")
    args = p.parse_args(argv)
    if args.fail_if_worse is not None and not 0 <= args.fail_if_worse <= 1:
        raise InputError(f"--fail-if-worse {args.fail_if_worse}; allowed: 0 to 1 (0.02: two points)")
    from rich.console import Console

    from fp8slurm.eval.display import show_comparison

    out = args.out or args.a.resolve().parent / f"compare-{args.a.resolve().name}-with-{args.b.resolve().name}"
    return report(args.a, args.b, out, args.fail_if_worse, Console(highlight=False), show_comparison)
