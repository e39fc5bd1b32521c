"""The configuration of a run."""

from fp8slurm.config.load import parse, parse_command, read_recipe, recipe_names, recipe_parser, to_toml
from fp8slurm.config.schema import RunConfig

__all__ = ["RunConfig", "parse", "parse_command", "read_recipe", "recipe_names", "recipe_parser", "to_toml"]
