"""What a checkpoint is, by its contents, and the Hugging Face folder that an engine loads, made from it once."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fp8slurm.checkpoint.formats.complete import damage
from fp8slurm.checkpoint.formats.kv_scales import FILE as KV_SCALES
from fp8slurm.config import RunConfig
from fp8slurm.config.load import build
from fp8slurm.core.errors import InputError
from fp8slurm.core.files import read_json, write_atomic
from fp8slurm.run.directory import RunDirectory, RunState, is_run

Precision = Literal["fp8", "bf16"]
Kind = Literal["step of a run", "torch_dist", "Hugging Face", "Hugging Face, block FP8"]


@dataclass(frozen=True)
class Checkpoint:
    """A recognized checkpoint."""

    kind: Kind
    path: Path
    name: str
    """What its results are called."""
    eval_dir: Path
    """Where results and converted folders go."""
    config: RunConfig | None = None
    """Of its run, for a step of a run."""
    step: int | None = None
    origin: Path | None = None
    """Hugging Face folder with config and tokenizer, for torch_dist."""
    keep: tuple[str, ...] = ()
    """modules_to_not_convert of the engine's own checkpoint, kept when FP8 is made."""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder with the tokenizer and the end tokens."""
        return self.origin or self.path

    def describe(self) -> str:
        of = f" (config and tokenizer: {self.origin})" if self.origin else ""
        return f"{self.path}: {self.kind}{of}"


def recognize(
    path: Path | None, run: Path | None, step: str | None, origin: Path | None, eval_dir: Path | None
) -> Checkpoint:
    """A run (its newest complete checkpoint, or the one named `step`), a step of one, torch_dist, or Hugging Face.

    InputError: it is none of these, damaged, or torch_dist without `origin`.
    """
    if run is not None:
        return _of_run(run, step, eval_dir)
    assert path is not None
    if not path.is_dir():
        raise InputError(
            f"--checkpoint {path}: no such folder; give a run, a step of a run, a torch_dist folder, or a Hugging Face "
            f"folder (a step by its name alone needs --run)"
        )
    if is_run(path):
        return _of_run(path, None, eval_dir)
    resolved = path.resolve()
    if (path / "state.json").is_file() and is_run(resolved.parent.parent):
        run = path if path.parent.name == "checkpoints" else resolved
        return _of_run(run.parent.parent, resolved.name, eval_dir)
    eval_dir = eval_dir or Path("runs/eval")
    if (path / "config.json").is_file():
        from fp8slurm.checkpoint.contents import check_weights
        from fp8slurm.checkpoint.converters.convert_hf import is_fp8
        from fp8slurm.checkpoint.formats.hf_folder import open_hf
        from fp8slurm.models.spec import ModelSpec

        check_weights(path, ModelSpec.from_hf_dir(path), "--checkpoint")
        kind: Kind = "Hugging Face, block FP8" if is_fp8(open_hf(path)) else "Hugging Face"
        return Checkpoint(kind, path, resolved.name, eval_dir)
    if (path / ".metadata").is_file() or (path / "latest_checkpointed_iteration.txt").is_file():
        if origin is None:
            raise InputError(
                f"--checkpoint {path} is torch_dist, which has no config and no tokenizer: give the Hugging Face "
                f"folder of the model with --origin-hf-dir"
            )
        return Checkpoint("torch_dist", path, resolved.name, eval_dir, origin=origin, keep=_exclusions(origin))
    raise InputError(
        f"--checkpoint {path}: not recognized; allowed: a run (config.json, checkpoints/), a step of a run (COMPLETE, "
        f"state.json), torch_dist (.metadata), Hugging Face (config.json, safetensors)"
    )


def _of_run(path: Path, step: str | None, eval_dir: Path | None) -> Checkpoint:
    saved = path / "config.json"
    if not saved.is_file():
        raise InputError(f"--run {path}: no config.json there; give the directory of a run (runs/NAME)")
    try:
        values = read_json(saved)
    except InputError as error:
        raise InputError(f"{error}; give a run (runs/NAME), or a Hugging Face folder that is whole") from None
    if "run" not in values:  # a model's folder
        raise InputError(
            f"--run {path}: its config.json is not a run's; give a run's folder (runs/NAME), or --checkpoint"
        )
    config = build(values, str(saved))
    folder, state = pick_checkpoint(RunDirectory(path), step)
    made_from = config.model.rollout_checkpoint
    return Checkpoint(
        "step of a run",
        folder,
        folder.name,
        eval_dir or path / "eval",
        config=config,
        step=state.step,
        origin=config.model.hf_checkpoint,
        keep=_exclusions(made_from) if made_from is not None else (),
    )


def pick_checkpoint(run: RunDirectory, name: str | None) -> tuple[Path, RunState]:
    """The named checkpoint, or the newest complete one. Raises InputError."""
    if name is not None:
        why = damage(run.checkpoints / name) if name in run.checkpoint_names() else "it does not exist"
        if why is not None:
            there = ", ".join(run.checkpoint_names()) or "none"
            raise InputError(f"--checkpoint {name}: cannot be used, {why}; in {run.checkpoints} there are: {there}")
        return run.checkpoints / name, RunState.read(run.checkpoints / name)
    for folder, why in run.checked_checkpoints():
        if why is None:
            return folder, RunState.read(folder)
        print(f"checkpoint {folder} is skipped: {why}", file=sys.stderr)
    raise InputError(f"{run.checkpoints} has no usable checkpoint")


def _exclusions(folder: Path) -> tuple[str, ...]:
    from fp8slurm.models.spec import ModelSpec

    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there; give a Hugging Face folder")
    quantization = ModelSpec.from_hf_dir(folder).quantization
    return quantization.modules_to_not_convert if quantization is not None else ()


def files_stamp(folder: Path) -> list[list]:
    """Name, size and time of every file of a folder: what must be unchanged for a result of it to be used again."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def prepare(checkpoint: Checkpoint, precision: Precision, keep: tuple[str, ...] = ()) -> tuple[Path, str]:
    """(the folder that an engine loads, what was done for it). Conversions are kept in eval_dir/models.

    keep: further modules that stay out of FP8. InputError: a damaged checkpoint; OSError: a full disk.
    """
    from fp8slurm import checkpoint as converters

    kept = tuple(dict.fromkeys([*checkpoint.keep, *keep]))
    source = checkpoint.path
    from_dist = checkpoint.origin is not None
    if precision == ("fp8" if checkpoint.kind.endswith("FP8") else "bf16") and not from_dist:
        return source, "as it is"
    target = checkpoint.eval_dir / "models" / f"{checkpoint.name}-{precision}"
    expected: dict[str, Any] = {
        "source": str(source.resolve()),
        "files": files_stamp(source),
        "precision": precision,
        "origin": str(checkpoint.origin.resolve()) if checkpoint.origin else None,
        "modules_to_not_convert": list(kept) if precision == "fp8" else [],
    }
    if (source / KV_SCALES).is_file():  # earlier states converted without them
        expected["kv_scales"] = True
    stamp = target.with_name(target.name + ".source.json")
    if target.is_dir() and stamp.is_file() and read_json(stamp) == expected:
        return target, "converted earlier"
    target.parent.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    settings = {"overwrite": True, "progress": sys.stderr.isatty()}
    if precision == "bf16" and from_dist:
        report = converters.torch_dist_to_hf(source, target, origin_hf_dir=checkpoint.origin, **settings)
    elif precision == "bf16":
        report = converters.fp8_to_hf(source, target, **settings)
    elif from_dist:
        report = converters.torch_dist_to_fp8(
            source, target, origin_hf_dir=checkpoint.origin, modules_to_not_convert=kept, **settings
        )
    else:
        report = converters.hf_to_fp8(source, target, modules_to_not_convert=kept, **settings)
    write_atomic(stamp, json.dumps(expected))
    return target, f"converted: {report.written_bytes / 1e9:.3f} GB in {report.seconds:.1f} s"
