"""The task that the tiny model learns: the sum of two 2-digit numbers, its digits written in reverse."""

from __future__ import annotations

import json
import random
from pathlib import Path

FORMAT = 1
"""Raised whenever the same seed gives other bytes, so that older files are made anew."""

HELD_OUT = 500


def question(a: int, b: int) -> str:
    """What the user says."""
    return f"{a}+{b}="


def answer(a: int, b: int) -> str:
    """The sum with its digits reversed: 47+85= is answered 231."""
    return str(a + b)[::-1]


def split(seed: int, held_out: int = HELD_OUT) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(training, held-out) pairs of numbers from 10 to 99, in random order.

    Held-out pairs differ as sums, too: where (a, b) is held out, (b, a) is in neither of the two.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(pairs)
    held = [p if rng.random() < 0.5 else p[::-1] for p in pairs[:held_out]]
    train = [ordered for a, b in pairs[held_out:] for ordered in sorted({(a, b), (b, a)})]
    rng.shuffle(train)
    return train, held


def write_data(folder: Path, seed: int = 0) -> None:
    """Fill a folder: train.jsonl, eval.jsonl (prompt, label) and sft.jsonl (prompt, response; the training pairs)."""
    train, held = split(seed)
    files = {"train.jsonl": (train, "label"), "eval.jsonl": (held, "label"), "sft.jsonl": (train, "response")}
    for name, (pairs, key) in files.items():
        with open(folder / name, "w", encoding="utf-8") as f:
            for a, b in pairs:
                row = {"prompt": [{"role": "user", "content": question(a, b)}], key: answer(a, b)}
                f.write(json.dumps(row) + "\n")
