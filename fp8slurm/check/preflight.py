"""Everything that can be found wrong before a job is queued."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fp8slurm.check.data import check_data
from fp8slurm.check.dry_run import Refusal
from fp8slurm.check.objective import check_generate, check_objective, check_teacher
from fp8slurm.check.values import unmeant, unusual
from fp8slurm.checkpoint.contents import check_weights
from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.config import RunConfig
from fp8slurm.config.derived import engines_sleep, transport_of
from fp8slurm.config.load import build
from fp8slurm.config.placement import place
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json
from fp8slurm.engine.arguments import check_extra_arguments
from fp8slurm.fp8.environment import set_fp32_scales
from fp8slurm.models.engine_layout import check_engine_layout
from fp8slurm.models.exact import check_exact
from fp8slurm.models.known import find_spec
from fp8slurm.models.kv_scales import check_kv_cache, missing_scales
from fp8slurm.models.layout import check_layout
from fp8slurm.models.spec import ModelSpec
from fp8slurm.run.directory import RunDirectory
from fp8slurm.slurm.attempt import check_configuration

SLURM_COUNTS_MIN = (2**31 - 1) // 60
"""Slurm keeps a time limit in seconds of 31 bits, and takes a longer one for another."""
START_S = 180
"""Start, a step and a save should have so long before the notice, which Slurm may send 60 s early."""
OURS = frozenset(
    "partition account qos reservation constraint exclude time nodes signal requeue no-requeue ntasks-per-node "
    "cpus-per-task gpus-per-node mem output error job-name".split()
)
"""Options of sbatch that have a setting of their own, or follow from others."""
BINDS = frozenset("gpu-bind gpus-per-task ntasks-per-gpu tres-bind tres-per-task".split())
"""Options of sbatch and srun that give each task GPUs of its own."""

OF_A_JOB = ("partition", "account", "qos", "reservation", "constraint", "exclude", "memory", "container_image",
            "setup", "sbatch", "srun")  # fmt: skip
"""Settings of [slurm] that nothing but a job has."""
LEAST_MB = 2000
"""A rank of the tiny model has about so much once torch, Megatron and its neighbours are imported."""
LEAST_GPU_MIN = 30
"""A first start on GPUs compiles kernels for 10 to 20 minutes: a time below is mostly meant in hours."""


def preflight(config: RunConfig, dry_run: bool = False) -> list[str]:
    """Check a configuration against files and installed packages; returns warnings.

    `dry_run`: nothing will be started, so what a start would be refused for (a checkpoint, a data file or a package
    that is not here, a feature that is not there yet) is a Refusal among the warnings; a layout that cannot be is
    an error still.

    Raises:
        InputError: names the key, the value, what is allowed and the flag.
    """
    set_fp32_scales()
    refusals: list[str] = []
    warnings: list[str] = []

    def check(what: Callable[..., object], *arguments: Any) -> None:
        try:
            what(*arguments)
        except InputError as error:
            if not dry_run:
                raise
            refusals.append(Refusal(error))

    check(_model, config)
    check(_fp8, config)
    spec, _ = find_spec(config.model.hf_checkpoint)
    _sync(config)
    check(_kv_cache, config, spec)
    _parallel(config, spec)
    _lengths(config, spec)
    _overlong(config)
    _stop_tokens(config, spec)
    _algorithm(config)
    check(_experts, config, spec)
    check(check_exact, config, spec)
    check(_gpus, config)
    if not refusals:
        check(_weights, config, spec)
    begun = _begun_with(config)
    check(_meant, config, begun, warnings)
    paths = len(refusals)
    for path, flag, what in _data_files(config):
        check(_folder, path, flag, what)
    if len(refusals) == paths and (config.model.hf_checkpoint or Path()).is_dir():
        check(check_data, config, begun, warnings)
        check(check_teacher, config)
    if _packages_are_here(config):
        check(_engine_arguments, config, warnings)
    if dry_run:  # a start looks itself, under the run's lock
        check(check_configuration, config, RunDirectory(config.run.root / config.run.name))
    return refusals + warnings + _warnings(config) + _yarn_warnings(config, spec) + _room(config, spec)


def _begun_with(config: RunConfig) -> RunConfig | None:
    """The settings that the run was begun with; None: it has not begun."""
    path = config.run.root / config.run.name / "config.json"
    try:
        return build(read_json(path), str(path)) if path.is_file() else None
    except InputError:  # torn, a model's, or another version's; who looks at the run's folder says so
        return None


def _meant(config: RunConfig, begun: RunConfig | None, warnings: list[str]) -> None:
    """Values that cannot be meant; the run goes on with those that it was begun with."""
    before = unmeant(begun) if begun is not None else []
    found = unmeant(config)
    if new := [text for text in found if text not in before]:
        raise InputError("\n".join(new))
    warnings += found


def _weights(config: RunConfig, spec: ModelSpec) -> None:
    """What the trainer and a teacher's engine will look for in their folders, from the headers."""
    assert config.model.hf_checkpoint is not None
    check_weights(config.model.hf_checkpoint, spec, "--model.hf-checkpoint")
    teacher = config.teacher.checkpoint
    if teacher is not None and (teacher / "config.json").is_file():  # check_teacher says what else it needs
        check_weights(teacher, ModelSpec.from_hf_dir(teacher), "--teacher.checkpoint")


def _packages_are_here(config: RunConfig) -> bool:
    """A job in a container has packages of its own: there ranks and engines look for themselves."""
    return config.slurm.executor != "slurm" or config.slurm.container_image is None


def _engine_arguments(config: RunConfig, warnings: list[str]) -> None:
    if warning := check_extra_arguments(config.engine.extra_args):
        warnings.append(warning)


def _folder(path: Path | None, flag: str, what: str) -> Path:
    if path is None:
        raise InputError(f"{flag} is not set: give the {what}, or a --recipe that does")
    if not path.exists():
        raise InputError(f"{flag} {path}: there is no such path; give the {what}")
    return path


def _spec(folder: Path, flag: str) -> ModelSpec:
    try:
        return ModelSpec.from_hf_dir(folder)
    except FileNotFoundError:
        raise InputError(f"{flag} {folder}: there is no config.json in it; give a Hugging Face folder") from None


def _model(config: RunConfig) -> None:
    folder = _folder(config.model.hf_checkpoint, "--model.hf-checkpoint", "folder of a Hugging Face checkpoint")
    spec = _spec(folder, "--model.hf-checkpoint")
    if spec.quantization is not None:
        raise InputError(
            f"--model.hf-checkpoint {folder} is quantized: the trainer starts from BF16 or FP32 weights "
            f"(fp8slurm convert fp8-to-hf makes them); the engine's FP8 checkpoint is --model.rollout-checkpoint"
        )
    if config.model.rollout_checkpoint is not None:
        rollout = _folder(config.model.rollout_checkpoint, "--model.rollout-checkpoint", "folder that the engine loads")
        from fp8slurm.models.precision import engine_in_fp8

        _spec(rollout, "--model.rollout-checkpoint")  # refuses block sizes and scale formats that we cannot make
        from fp8slurm.sync.check import check_rollout_checkpoint

        check_rollout_checkpoint(rollout, spec)
        there, requested = engine_in_fp8(config), config.fp8.engine
        if requested != "auto" and there != (requested == "fp8"):
            raise InputError(
                f"--fp8.engine {requested} with --model.rollout-checkpoint {rollout}, which is in "
                f"{'FP8' if there else 'BF16'}; allowed: leave --fp8.engine out, or give another folder"
            )


def _fp8(config: RunConfig) -> None:
    from fp8slurm.models.precision import engine_in_fp8
    from fp8slurm.trainer.start import check_optimizer

    fp8 = config.fp8
    check_optimizer(config, fp8.backend == "transformer_engine")
    if fp8.param_gather and not engine_in_fp8(config):
        raise InputError(
            "--fp8.param-gather with an engine in BF16: weight updates send the FP8 weights as they are; allowed: "
            "--fp8.engine fp8 (or an FP8 --model.rollout-checkpoint), or --fp8.no-param-gather"
        )
    missing = importlib.util.find_spec("transformer_engine") is None
    if fp8.backend == "transformer_engine" and missing and _packages_are_here(config):
        raise InputError(
            "--fp8.backend transformer_engine: it is not installed, and Megatron would ignore FP8 silently; "
            "install it (requirements/gpu.txt), or ask for --fp8.backend emulated (CPU) or --fp8.backend off (no FP8)"
        )


def _sync(config: RunConfig) -> None:
    """How the weights travel, and whether engines sleep, against the GPUs."""
    transport, gpus = config.sync.transport, config.slurm.gpus_per_node
    if transport == "cuda-ipc" and not gpus:
        raise InputError("--sync.transport cuda-ipc needs --slurm.gpus-per-node; allowed: auto, gloo, shared-memory")
    if transport in ("shared-memory", "gloo-direct") and gpus:
        raise InputError(f"--sync.transport {transport} is for CPUs; allowed: auto, cuda-ipc, nccl, gloo")
    split = config.engine.placement == "split"
    if transport == "cuda-ipc" and split:
        raise InputError(
            "--sync.transport cuda-ipc with --engine.placement split: no engine shares a GPU with a rank; allowed: "
            "auto, nccl, gloo"
        )
    if transport == "nccl" and not split:
        raise InputError(
            "--sync.transport nccl with --engine.placement shared: NCCL joins no two processes on one GPU; allowed: "
            "auto, cuda-ipc, gloo, or --engine.placement split"
        )
    if config.sync.keep_last_update and transport_of(config) != "gloo":
        raise InputError(
            f"--sync.keep-last-update with --sync.transport {transport}: no weights pass through the host, so there is "
            f"nothing to keep; allowed: leave it out, or --sync.transport gloo"
        )
    if config.sync.delta:
        _delta(config)
    if config.engine.sleep and not (gpus and config.engine.placement == "shared"):
        raise InputError("--engine.sleep: only engines that share GPUs with the trainer sleep; leave it out")


def _delta(config: RunConfig) -> None:
    """Where changes alone cannot be sent, or nobody would have them to compare with."""
    transport = transport_of(config)
    if transport in ("cuda-ipc", "shared-memory"):
        raise InputError(
            f"--sync.delta with --sync.transport {transport}: engines read the weights where they lie, "
            f"nothing is sent; allowed: --sync.no-delta, or --sync.transport gloo, nccl, gloo-direct"
        )
    if transport == "gloo" and config.sync.keep_last_update is False:
        raise InputError(
            "--sync.delta with --sync.keep-last-update=False: changes are made to the update that the node keeps; "
            "allowed: leave keep_last_update out, or --sync.no-delta"
        )
    if engines_sleep(config):
        raise InputError(
            "--sync.delta with engines that sleep: they lose their weights before every update; allowed: "
            "--sync.no-delta, or --engine.sleep=False"
        )
    if config.control.freeze_engine:
        raise InputError("--sync.delta with --control.freeze-engine: there is one update; allowed: --sync.no-delta")


def _kv_cache(config: RunConfig, spec: ModelSpec) -> None:
    """An FP8 KV cache, and where its scales come from."""
    check_kv_cache(config)
    if config.engine.kv_cache != "fp8" or config.engine.kv_scales != "fixed":
        return
    folder, flag = config.model.rollout_checkpoint, "--engine.kv-scales fixed"
    if folder is None:
        raise InputError(
            f"{flag} without --model.rollout-checkpoint: a folder with k_scale and v_scale has to be given; allowed "
            f"without one: calibrated, unit"
        )
    if missing := missing_scales(open_hf(folder).tensors, spec.num_layers):
        raise InputError(f"{flag}: {folder} has no {missing[0]}; allowed with this folder: calibrated, unit")


def _parallel(config: RunConfig, spec: ModelSpec) -> None:
    if config.slurm.nodes > 1 and config.slurm.executor != "slurm":
        raise InputError(
            f"--slurm.nodes {config.slurm.nodes} with --slurm.executor {config.slurm.executor}: one machine; allowed: 1"
        )
    _limits(config)
    check_layout(spec, config.parallel, config.fp8.backend != "off", place(config).world_size)
    check_engine_layout(config, spec)


def _limits(config: RunConfig) -> None:
    """The job's folder, its time limit and the notice before it."""
    from fp8slurm.scheduler.job import minutes

    s, root = config.slurm, config.run.root
    if root.exists() and not root.is_dir():
        raise InputError(f"--run.root {root} is a file: give the folder of the runs")
    try:
        limit = minutes(s.time)
    except InputError as error:
        raise InputError(f"--slurm.time {error}") from None
    if limit > SLURM_COUNTS_MIN:
        raise InputError(
            f"--slurm.time {s.time}: Slurm counts up to {SLURM_COUNTS_MIN} minutes; give what the run may take"
        )
    run = str((config.run.root / config.run.name).resolve())
    if s.executor == "slurm" and "%" in run:
        raise InputError(
            f"--run.root {config.run.root} with --run.name {config.run.name}: {run} has a % in it, which Slurm "
            f"replaces in the paths of logs; choose others"
        )
    if s.executor == "slurm" and s.signal_delay_s >= 60 * limit:
        raise InputError(
            f"--slurm.signal-delay-s {s.signal_delay_s}: the notice would come before the job starts; allowed: less "
            f"than --slurm.time {s.time} ({60 * limit} s)"
        )
    if s.gpu_type and not s.gpus_per_node:
        raise InputError(f"--slurm.gpu-type {s.gpu_type} without GPUs: set --slurm.gpus-per-node, or leave it out")
    for key in s.sbatch:
        if s.memory and key.replace("_", "-") in ("mem-per-cpu", "mem-per-gpu"):
            raise InputError(
                f"--slurm.memory {s.memory} with --slurm.sbatch {key} {s.sbatch[key]}: sbatch takes one of them"
            )
        if key == "array":
            raise InputError(
                f"--slurm.sbatch array {s.sbatch[key]}: a run is one job; leave it out, submit each run by itself"
            )
        if key == "chdir":
            raise InputError(
                f"--slurm.sbatch chdir {s.sbatch[key]}: relative paths would not be those that were checked; leave it "
                f"out, and submit from the folder that they count from"
            )
        if key.replace("_", "-") in OURS:
            raise InputError(f"--slurm.sbatch {key}: it has a setting of its own, or follows from others; leave it out")
    flags = [f"--slurm.sbatch {key} {value}" for key, value in s.sbatch.items()]
    flags += [f"--slurm.srun={argument}" for argument in s.srun]
    for flag in flags:
        name, _, value = re.sub(r"^--slurm\.s(batch |run=--)", "", flag).replace("=", " ").partition(" ")
        if name.replace("_", "-") in BINDS and value.strip() not in ("none", "no"):
            raise InputError(f"{flag}: every task of a node has to see all of the node's GPUs; leave it out")


def _lengths(config: RunConfig, spec: ModelSpec) -> None:
    """The longest prompt and the longest response must fit the engine's context."""
    e, flag = config.engine, "--engine.context-length"
    if e.context_length is not None and e.context_length > spec.max_position_embeddings:
        raise InputError(
            f"{flag} {e.context_length}: the model has {spec.max_position_embeddings} positions; allowed: so many"
        )
    room = e.context_length or spec.max_position_embeddings
    whose = f"{flag} {room}" if e.context_length else f"the model's {room} positions"
    if spec.yarn is not None and spec.yarn.positions < room:
        room, whose = spec.yarn.positions, f"the {spec.yarn.positions} positions that config.json's YaRN reaches"
    prompt = config.data.max_prompt_tokens
    context, longest = config.parallel.context_parallel_size, prompt + config.rollout.max_tokens
    if context > 1 and 2 * context > longest:
        raise InputError(
            f"--parallel.context-parallel-size {context} cuts every sequence into {2 * context} pieces; the longest "
            f"has {longest} tokens (--data.max-prompt-tokens {prompt}, --rollout.max-tokens "
            f"{config.rollout.max_tokens}); allowed: at most {longest // 2}"
        )
    for key, response in (("rollout", config.rollout.max_tokens), ("eval", config.eval.max_tokens)):
        if response is not None and prompt + response > room:
            raise InputError(
                f"--data.max-prompt-tokens {prompt} + --{key}.max-tokens {response} = {prompt + response} do not fit "
                f"{whose}; lower one of the two{' or raise the context' if e.context_length else ''}"
            )


def _overlong(config: RunConfig) -> None:
    """rollout.overlong_buffer belongs to rollout.truncated = soft, and to nothing else."""
    r, flag = config.rollout, "--rollout.overlong-buffer"
    if (r.truncated == "soft") != (r.overlong_buffer is not None):
        raise InputError(
            f"--rollout.truncated {r.truncated} with {flag} {r.overlong_buffer}: the buffer is the tokens over which "
            f"soft lowers the reward, and only soft does; allowed: both (DAPO has 4096 with --rollout.max-tokens "
            f"20480), or neither"
        )
    if r.overlong_buffer is not None and r.overlong_buffer > r.max_tokens:
        raise InputError(
            f"{flag} {r.overlong_buffer} with --rollout.max-tokens {r.max_tokens}: it ends there; allowed: at most that"
        )


def _yarn_warnings(config: RunConfig, spec: ModelSpec) -> list[str]:
    """A rope_scaling that the run cannot use, or does not need."""
    yarn, positions = spec.yarn, spec.max_position_embeddings
    if yarn is None:
        return []
    what = f"config.json's YaRN (factor {yarn.factor:g} of {yarn.original_positions} positions)"
    longest = config.data.max_prompt_tokens + max(config.rollout.max_tokens, config.eval.max_tokens or 0)
    warnings = []
    if positions < yarn.positions:
        warnings.append(
            f"{what} reaches {yarn.positions} positions, and engines stop at its max_position_embeddings {positions}: "
            f"raise it there for longer sequences"
        )
    if longest <= yarn.original_positions:
        warnings.append(
            f"{what} changes short texts too, and the longest sequence here has {longest} tokens: without rope_scaling "
            f"the model is the one that was trained"
        )
    return warnings


def _stop_tokens(config: RunConfig, spec: ModelSpec) -> None:
    """A number that the model has no token for would never stop a sample."""
    wrong = [i for i in config.rollout.stop_token_ids if not 0 <= i < spec.vocab_size]
    if wrong:
        raise InputError(
            f"--rollout.stop-token-ids {' '.join(map(str, wrong))}: the model has {spec.vocab_size} tokens; allowed: 0 "
            f"to {spec.vocab_size - 1}"
        )


def _gpus(config: RunConfig) -> None:
    """A run on this machine needs its GPUs here; under Slurm the nodes have them."""
    needed = config.slurm.gpus_per_node
    if not needed or config.slurm.executor == "slurm":
        return
    import torch

    if torch.cuda.device_count() < needed:
        raise InputError(
            f"--slurm.gpus-per-node {needed} with --slurm.executor {config.slurm.executor}: this machine has "
            f"{torch.cuda.device_count()} GPUs; start it where they are, or as a Slurm job (--slurm.executor slurm)"
        )


def _experts(config: RunConfig, spec: ModelSpec) -> None:
    """Settings of mixtures of experts, against the model and the packages."""
    from fp8slurm.trainer.start import check_dispatcher, check_grouped

    check_grouped(config, spec)
    replay = config.rollout.routing_replay
    if not spec.is_moe:
        changed = {
            f"--moe.aux-loss-coef {config.moe.aux_loss_coef:g}": config.moe.aux_loss_coef,
            f"--moe.dispatcher {config.moe.dispatcher}": config.moe.dispatcher != "alltoall",
            "--rollout.routing-replay": replay,
        }
        for flag in (f for f, is_changed in changed.items() if is_changed):
            raise InputError(f"{flag}: the model has no experts; leave it out")
        return
    if not _packages_are_here(config):
        return
    check_dispatcher(config.moe.dispatcher, config.fp8.backend != "emulated", _installed("deep_ep", "."))
    if replay and not _installed("sglang", "srt/state_capturer/routed_experts.py"):
        raise InputError(
            "--rollout.routing-replay: the installed SGLang does not return the experts of its tokens; install the one "
            "of requirements/, or leave it off (--rollout.no-routing-replay)"
        )


def _installed(package: str, file: str) -> bool:
    """Whether a package is there, with this file in it; nothing is imported."""
    spec = importlib.util.find_spec(package)
    return spec is not None and any((Path(p) / file).exists() for p in spec.submodule_search_locations or ())


def _algorithm(config: RunConfig) -> None:
    check_objective(config)
    check_generate(config)
    _staleness(config)
    if config.run.steps and config.rollout.temperature == 0:
        raise InputError("--rollout.temperature 0: greedy samples are equal; allowed: above 0 (evaluation has its own)")
    o, groups = config.optim, config.rollout.prompts_per_step
    if o.schedule != "constant" and o.min_lr > o.lr:
        raise InputError(
            f"--optim.min-lr {o.min_lr:g} with --optim.lr {o.lr:g}: the rate would rise; allowed: at most that"
        )
    if config.run.steps and config.train.updates_per_step > groups:
        raise InputError(
            f"--train.updates-per-step {config.train.updates_per_step} with --rollout.prompts-per-step {groups}: an "
            f"update takes whole groups; allowed: at most one update a group"
        )
    if config.sft.data is not None and not config.sft.max_steps:
        raise InputError(
            "--sft.data without --sft.max-steps: the supervised phase would have no steps; set both, or none"
        )


def _staleness(config: RunConfig) -> None:
    """Refuse rollout.max_staleness where engines cannot work while the trainer does, and partial rollouts where there
    is nothing that they could go on with."""
    r, placement = config.rollout, config.engine.placement if config.slurm.gpus_per_node else None
    flag, more = f"--rollout.max-staleness {r.max_staleness}", f"--rollout.oversample {r.oversample:g}"
    if r.partial != "continue" and r.oversample == 1:
        raise InputError(
            f"--rollout.partial {r.partial} without --rollout.oversample: no sample is stopped; leave it out"
        )
    if r.oversample > 1:
        if not r.max_staleness:
            raise InputError(
                f"{more} with {flag}: what a step leaves unfinished goes on under the next step's weights; allowed: "
                f"--rollout.max-staleness 1 or more, or --rollout.oversample 1"
            )
        if r.generate is not None:
            raise InputError(
                f"{more} with --rollout.generate: conversations are not stopped in the middle; allowed: "
                f"--rollout.oversample 1"
            )
        if config.run.deterministic:
            raise InputError(
                f"{more} with --run.deterministic: which groups are ready first depends on the clock; allowed: one of "
                f"the two"
            )
        if placement == "split":
            raise InputError(
                f"{more} with --engine.placement split: engines with GPUs of their own need not stop for the trainer; "
                f"allowed: --rollout.oversample 1, or --engine.placement shared"
            )
    if not r.max_staleness:
        return
    if placement == "shared" and r.oversample == 1:
        raise InputError(
            f"{flag} with --engine.placement shared: engines and trainer take turns on the same GPUs; allowed: 0, "
            f"--engine.placement split with --engine.gpus, or --rollout.oversample above 1 (docs/async.md)"
        )
    if config.control.freeze_engine:
        raise InputError(f"{flag} with --control.freeze-engine: engines get no weights; allowed: one of the two")
    if r.max_staleness == 1 or r.oversample > 1:
        return
    others = {
        "--run.deterministic": (config.run.deterministic, "how far requests are at an update depends on the clock"),
        "--rollout.generate": (r.generate is not None, "conversations do not go on over an update"),
        "--engine.sleep": (engines_sleep(config), "engines that sleep cannot work while the trainer does"),
        "--sync.pause-mode in_place": (
            config.sync.pause_mode == "in_place", "cached prefixes of older weights would be used again",
        ),
    }  # fmt: skip
    for other, (given, why) in others.items():
        if given:
            raise InputError(f"{flag} with {other}: {why}; allowed: 0 or 1, or leave {other} out")


def _data_files(config: RunConfig) -> list[tuple[Path | None, str, str]]:
    """(path, flag, what it is) of every data file that the run reads."""
    files: list[tuple[Path | None, str, str]] = []
    if config.run.steps and not config.data.sources:
        files.append((config.data.train, "--data.train", "JSONL or parquet file with the training prompts"))
    for name, source in config.data.sources.items():
        files.append((source.file, f"--data.sources {name}.file", "JSONL or parquet file with its training prompts"))
    if config.data.eval is not None:
        files.append((config.data.eval, "--data.eval", "JSONL or parquet file with the held-out prompts"))
    if config.sft.data is not None:
        files.append((config.sft.data, "--sft.data", "JSONL or parquet file with prompts and responses"))
    return files


def _room(config: RunConfig, spec: ModelSpec) -> list[str]:
    """Whether run.root has room for the checkpoints that are kept, and for the one that is being written."""
    from fp8slurm.models.names import NameTable
    from fp8slurm.plan.memory import checkpoint_bytes

    root = config.run.root.absolute()
    there = next((p for p in (root, *root.parents) if p.exists()), None)
    one, n = checkpoint_bytes(config, NameTable(spec)), config.checkpoint.keep_last + 1
    free = shutil.disk_usage(there).free if there is not None else math.inf
    if free >= n * one:
        return []
    return [
        f"run.root {config.run.root} has {free / 1e9:.1f} GB free; checkpoint.keep_last + 1 checkpoints of "
        f"{one / 1e9:.1f} GB need {n * one / 1e9:.1f} GB"
    ]


def _idle_settings(config: RunConfig) -> list[str]:
    """Settings that do nothing beside the others."""
    a, o, r, c, steps = config.algorithm, config.optim, config.rollout, config.checkpoint, config.run.steps
    s, nothing_held_out = config.slurm, config.data.eval is None and not config.eval.tasks
    of_a_job = [k for k in OF_A_JOB if getattr(s, k) not in (None, [], {})]
    warnings = {
        f"rollout.on_error {r.on_error} without rollout.generate: a response does not fail": (
            r.generate is None and r.on_error != "error"
        ),
        f"sft.max_steps {config.sft.max_steps} without sft.data: there is no supervised phase": (
            config.sft.data is None and config.sft.max_steps
        ),
        f"optim.min_lr {o.min_lr:g} with optim.schedule constant decays nothing": (
            o.schedule == "constant" and o.min_lr
        ),
        f"optim.warmup_steps {o.warmup_steps} of run.steps {steps}: optim.lr is never reached": (
            steps and o.warmup_steps >= steps
        ),
        f"rollout.max_replacements {r.max_replacements} without rollout.drop_no_signal: nothing is dropped": (
            r.max_replacements and not r.drop_no_signal
        ),
        f"algorithm.clip_low {a.clip_low:g} with algorithm.loss gspo clips nothing: the ratio of a sequence is the "
        f"geometric mean of its tokens', which stays near 1; the paper has 3e-4, and 4e-4 for clip_high": (
            a.loss == "gspo" and a.clip_low >= 0.1
        ),
        f"{', '.join(f'slurm.{k}' for k in of_a_job)} with slurm.executor {s.executor}: the run starts on this machine "
        f"(a job: --slurm.executor slurm)": of_a_job and s.executor != "slurm",
        "slurm.container_mounts without slurm.container_image: there is no container": (
            s.container_mounts and s.container_image is None
        ),
        f"slurm.memory {s.memory} is in megabytes, less than a start needs (G behind it: gigabytes)": (
            s.executor == "slurm" and (s.memory or "").isdigit() and 0 < int(s.memory or 0) < LEAST_MB
        ),
        "slurm.share_gpus without slurm.gpus_per_node: no GPU is used": s.share_gpus and not s.gpus_per_node,
        f"observe.wandb_project {config.observe.wandb_project} without observe.wandb: nothing is sent": (
            not config.observe.wandb and config.observe.wandb_project != RunConfig().observe.wandb_project
        ),
        f"eval.n_samples {config.eval.n_samples} without data.eval and eval.tasks: nothing is evaluated": (
            config.eval.n_samples > 1 and nothing_held_out
        ),
        f"checkpoint.keep_every {c.keep_every} with checkpoint.every {c.every}: only checkpoints at multiples of "
        f"{math.lcm(c.every, c.keep_every or 1)} are kept for good": c.keep_every % c.every,
    }
    return [text for text, applies in warnings.items() if applies]


def _time_to_work(config: RunConfig) -> list[str]:
    """What is left of a job before its notice."""
    from fp8slurm.scheduler.job import minutes

    s = config.slurm
    left = 60 * minutes(s.time) - s.signal_delay_s
    if s.executor == "slurm" and s.gpus_per_node and minutes(s.time) < LEAST_GPU_MIN:
        return [f"slurm.time {s.time} are minutes: a first start on GPUs alone may take 20; hours are written 24:00:00"]
    if s.executor != "slurm" or left >= START_S:
        return []
    return [
        f"slurm.time {s.time} with slurm.signal_delay_s {s.signal_delay_s}: the notice comes {left} s after the start, "
        f"or up to 60 s earlier; a start, a step and a save must fit in before"
    ]


def _warnings(config: RunConfig) -> list[str]:
    warnings = unusual(config) + _idle_settings(config) + _time_to_work(config)
    s = config.sft
    node_samples = -(-config.rollout.prompts_per_step // config.slurm.nodes) * config.rollout.n_samples
    samples = -(-node_samples // config.engine.per_node)
    if config.run.deterministic and samples > config.engine.max_running_requests:
        warnings.append(
            f"run.deterministic: {samples} samples a step for an engine are more than engine.max_running_requests "
            f"{config.engine.max_running_requests}; the batch is split, and its composition is not fixed"
        )
    if s.data is not None and s.stop_accuracy < 1 and not s.eval_every:
        warnings.append(
            f"sft.stop_accuracy {s.stop_accuracy:g} without sft.eval_every: nothing is evaluated, so the supervised "
            f"phase takes all of sft.max_steps"
        )
    if config.rollout.top_p < 1 or config.rollout.top_k > 0:
        warnings.append(
            "rollout.top_p or rollout.top_k cut the distribution: engine and trainer differ by construction"
        )
    return warnings
