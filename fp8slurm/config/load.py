"""Recipes and the command line: defaults < recipe < flags."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent
from typing import Any

import tyro
from pydantic import BaseModel, ValidationError

from fp8slurm.config.schema import FROM_FLAGS, OutOfRange, RunConfig, SourceSection
from fp8slurm.core.errors import InputError

RECIPES = Path(__file__).parent / "recipes"

# Spellings that people know from other trainers.
ALIASES = {
    "--fp8-format": "--fp8.format",
    "--fp8-recipe": "--fp8.recipe",
    "--fp8-param-gather": "--fp8.param-gather",
    "--hf-checkpoint": "--model.hf-checkpoint",
    "--prompt-data": "--data.train",
    "--eval-data": "--data.eval",
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in RECIPES.glob("*.toml"))


def read_recipe(recipe: str | Path) -> RunConfig:
    """A recipe by its shipped name, or a TOML file by its path.

    Raises:
        InputError: no such recipe, not TOML, an unknown key or a value out of range; all of them are named.
    """
    path = Path(recipe)
    if path.suffix != ".toml":
        path = RECIPES / f"{recipe}.toml"
        if not path.is_file():
            raise InputError(
                f"--recipe {recipe}: no such recipe; allowed: {', '.join(recipe_names())}, or a .toml file"
            )
    if not path.is_file():
        raise InputError(f"--recipe {recipe}: there is no such file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:  # any other of the file system's may pass
        raise InputError(f"--recipe {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8, as a TOML file must be: byte {error.start}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and so is a number of 5,000 digits
        raise InputError(f"{path}: not a TOML file: {error}") from None
    return build(values, str(path))


def build(values: dict[str, Any], origin: str) -> RunConfig:
    """RunConfig from nested values; `origin` is named in errors. Raises InputError."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError("\n".join(f"{origin}: {line}" for line in _explain(error))) from None


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for e in error.errors():
        key = ".".join(str(k) for k in e["loc"])
        if e["type"] == "extra_forbidden":
            section: object = RunConfig
            if len(e["loc"]) > 1:
                section = RunConfig.model_fields[str(e["loc"][0])].annotation
            if e["loc"][:2] == ("data", "sources"):
                section = SourceSection
            known = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else ()
            lines.append(f"unknown key {key}; known here: {', '.join(known)}")
        else:
            lines.append(f"{key} = {e['input']!r}: {e['msg'].removeprefix('Value error, ')}")
    return lines


class _Once(argparse.Action):
    """A flag that is given once: of two, one would be forgotten without a word."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            raise InputError(f"{option_string} {values}, and before it {option_string} {before}; allowed: one of them")
        setattr(namespace, self.dest, values)


def recipe_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """For `parse_command`: --recipe; the command adds what else it has beside the settings of a run."""
    # No usage and no -h: they come from tyro, which lists the settings.
    description += " The settings below change the recipe; with --recipe R before --help their defaults are R's."
    hidden = argparse.SUPPRESS
    parser = argparse.ArgumentParser(prog, hidden, description, add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", action=_Once, help=f"{', '.join(recipe_names())}, or the path of a .toml file")
    return parser


def parse_command(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """(the command's own flags, the configuration) of a command line. Raises as `parse`; InputError: two recipes."""
    own, flags = parser.parse_known_args(argv)
    # tyro joins lines that begin with a letter
    return own, parse(own.recipe, flags, parser.prog, indent(parser.format_help(), " "))


def parse(
    recipe: str | None, flags: Sequence[str], prog: str = "fp8slurm train", description: str = "Settings of a run."
) -> RunConfig:
    """The configuration of a command line. Flags win over the recipe, the recipe over the defaults.

    description: what --help says before it lists the settings.

    Raises:
        InputError: as read_recipe, or a flag's value is out of range.
        SystemExit: a flag is unknown (2), or help was asked for (0).
    """
    default = read_recipe(recipe) if recipe else RunConfig()
    args = []
    for flag in flags:
        name, eq, value = flag.partition("=")
        args.append(ALIASES.get(name, name) + eq + value)
    with flags_named():
        return tyro.cli(RunConfig, prog=prog, args=args, default=default, description=description)


@contextmanager
def flags_named() -> Iterator[None]:
    """Around tyro.cli: what a section refuses is an InputError that names the flag, the value and what is allowed."""
    token = FROM_FLAGS.set(True)
    try:
        yield
    except OutOfRange as refused:
        sections = {field.annotation: name for name, field in RunConfig.model_fields.items()}
        sections[SourceSection] = "data.sources"
        lines = []
        for e in refused.error.errors(include_url=False):
            flag = ".".join(map(str, (sections.get(refused.section, "?"), *e["loc"]))).replace("_", "-")
            text = e["msg"].removeprefix("Value error, ").replace("Input should be", "allowed:")
            lines.append(text if text.startswith(f"--{flag} ") else f"--{flag} {e['input']}: {text}")
        raise InputError("\n".join(lines)) from None
    finally:
        FROM_FLAGS.reset(token)


def to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML; read_recipe reads it back to an equal value."""
    out = []
    for section, values in config.model_dump(mode="json").items():
        out.append(f"[{section}]")
        for key, value in values.items():
            if value is not None:
                out.append(f"{key} = {_toml_value(value)}")
        out.append("")
    return "\n".join(out)


def _toml_value(value: object) -> str:
    import json

    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return repr(value)
