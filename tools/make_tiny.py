"""Make the tiny Qwen3 checkpoint and the data of its task.

python tools/make_tiny.py --out models/tiny --data data/tiny
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import tiny_task

STAMP = "made_by_make_tiny.json"


def build(folder: Path, recipe: dict, write: Callable[[Path], None], force: bool = False) -> bool:
    """Fill `folder` by write(folder) unless it is there already, made from the same recipe and complete.

    The files are written beside it and renamed into place, so that the folder is complete or absent. Returns whether
    anything was written. ValueError: the folder holds something that this program did not make.
    """
    stamp = _read_stamp(folder)
    if folder.exists() and stamp is None and any(folder.iterdir()) and not force:
        raise ValueError(f"{folder} was not made by this program; give another folder or --force to replace it")
    if not force and stamp is not None and stamp["recipe"] == recipe and stamp["sizes"] == _sizes(folder):
        return False
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    fresh.mkdir(parents=True)
    try:
        write(fresh)
        document = {"recipe": recipe, "sizes": _sizes(fresh)}
        (fresh / STAMP).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in fresh.iterdir():
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def _sizes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.name != STAMP}


def _read_stamp(folder: Path) -> dict | None:
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) and {"recipe", "sizes"} <= stamp.keys() else None


def main(argv: list[str] | None = None) -> int:
    """Parse and build; 0, or 2 with a message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (none: not made)")
    parser.add_argument("--data", type=Path, help="folder of train.jsonl, eval.jsonl and sft.jsonl (none: not made)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    parser.add_argument("--moe", action="store_true", help="a mixture of 8 experts in place of the dense model")
    parser.add_argument("--force", action="store_true", help="make anew what is there already")
    args = parser.parse_args(argv)
    if args.out is None and args.data is None:
        parser.error("nothing to do: give --out, --data or both")
    jobs = []
    if args.out is not None:
        recipe = {"kind": "model", "format": tiny.FORMAT, "seed": args.seed, "moe": args.moe}
        jobs.append((args.out, recipe, lambda folder: tiny.write_model(folder, args.seed, args.moe)))
    if args.data is not None:
        recipe = {"kind": "tiny_task", "format": tiny_task.FORMAT, "seed": args.seed}
        jobs.append((args.data, recipe, lambda folder: tiny_task.write_data(folder, args.seed)))
    for folder, recipe, write in jobs:
        try:
            written = build(folder, recipe, write, args.force)
        except ValueError as error:
            print(f"make_tiny: {error}", file=sys.stderr)
            return 2
        print(f"{folder}: {'made' if written else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
