"""The task that the tiny model learns: the larger of two numbers in every place, 473|829= is answered 879.

It is learned digit by digit, so a group of samples seldom agrees, and a model that is right in most places gains
from every step. (Addition with reversed digits was tried first: docs/results.md.)
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FORMAT = 2
"""Raised whenever the same seed gives other bytes, so that older files are made anew."""

DIGITS = 3
TRAIN, HELD_OUT = 8000, 500


def question(a: str, b: str) -> str:
    """What the user says; a and b have DIGITS digits each."""
    return f"{a}|{b}="


def answer(a: str, b: str) -> str:
    """The larger digit of every place."""
    return "".join(max(x, y) for x, y in zip(a, b, strict=True))


def split(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training, held-out) pairs of digit strings, all different; where (a, b) is held out, (b, a) is in neither."""
    rng = random.Random(seed)
    seen: set[frozenset[str]] = set()
    pairs: list[tuple[str, str]] = []
    while len(pairs) < TRAIN + HELD_OUT:
        a, b = (f"{rng.randrange(10**DIGITS):0{DIGITS}d}" for _ in range(2))
        if frozenset((a, b)) not in seen:
            seen.add(frozenset((a, b)))
            pairs.append((a, b))
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def write_data(folder: Path, seed: int = 0) -> None:
    """train.jsonl and eval.jsonl (prompt, label) and sft.jsonl (prompt, response; the training pairs) into a folder."""
    train, held = split(seed)
    files = {"train.jsonl": (train, "label"), "eval.jsonl": (held, "label"), "sft.jsonl": (train, "response")}
    for name, (pairs, key) in files.items():
        with open(folder / name, "w", encoding="utf-8") as f:
            for a, b in pairs:
                row = {"prompt": [{"role": "user", "content": question(a, b)}], key: answer(a, b)}
                f.write(json.dumps(row) + "\n")
