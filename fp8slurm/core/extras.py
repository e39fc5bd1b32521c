"""Packages that only some users want; requirements/NAME.txt installs each beside the set."""

from __future__ import annotations

from importlib import metadata

from fp8slurm.core.errors import InputError


def require(package: str, version: str) -> None:
    """InputError, with the command that installs it: it is not there in this version."""
    try:
        there = metadata.version(package)
    except metadata.PackageNotFoundError:
        there = "none"
    if there != version:
        raise InputError(
            f"{package} {version} is needed, there is {there}: pip install --no-deps -r requirements/{package}.txt"
        )
