"""The configuration of a run."""

from fp8slurm.config.load import parse, read_recipe, recipe_names, to_toml
from fp8slurm.config.schema import RunConfig

__all__ = ["RunConfig", "parse", "read_recipe", "recipe_names", "to_toml"]
