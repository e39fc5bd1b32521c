"""What can be wrong with a file: bytes, text, JSON values, torn ends. Everything follows from a random.Random."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Callable
from typing import Any

NESTED: Any = 1
for _ in range(60):
    NESTED = [NESTED]

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 7, 1.5, -0.5, math.nan, math.inf, -math.inf, 1e308, 2**31, 2**63, 10**400, "", "x", "1",
    "true", "NaN", "x" * 5000, "\ud800", "\x00", "../../etc/passwd", "/dev/zero", [], {}, [1], ["a", None], [[]],
    {"a": 1}, {"": None}, NESTED, list(range(300)),
]  # fmt: skip
"""What may stand where something else should."""
PIECES = [
    b"", b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN", b"1e999", b"-", b"\\ud800", b"[" * 2000, b'{"a":' * 2000, b"9" * 5000,
    b"9" * 400, b'"', b"\n", b"\r\n", b",", b"null", b"true", b"'", b"=", b"#", b"\x1b[2J",
]  # fmt: skip


def bytes_damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of bytes anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, length = rng.randrange(len(out) + 1), rng.choice([0, 1, 1, 2, 8, 200])
        kind = rng.randrange(6)
        if kind == 0:
            for i in range(at, min(at + max(1, length), len(out))):
                out[i] = rng.randrange(256)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + max(1, length)]
        elif kind == 3:
            out[at : at + length] = rng.choice(PIECES)
        elif kind == 4:
            out[at:at] = out[at : at + rng.randrange(1, 400)]
        elif at < len(out):
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in it."""
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        held = left.pop()
        keys = list(held) if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else []
        for key in keys:
            found.append((held, key))
            left.append(held[key])
    return found


def value_damaged(value: Any, rng: random.Random) -> Any:
    """One to three values that are others, away, or under another name."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = places(value)
        if not found or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        held, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del held[key]
        elif kind == 1 and isinstance(held, dict):
            held[rng.choice(["unknown", "", f"{key}_", str(key).upper(), "a.b", "x" * 2000])] = held.pop(key)
        elif kind == 2 and isinstance(held, dict):
            held["unknown"] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and type(held[key]) in (int, float) and abs(held[key]) < 1e300:
            held[key] = rng.choice([-held[key], held[key] + 1, held[key] * 1000, held[key] / 3.0, str(held[key])])
        else:
            held[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def json_damaged(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with other values in it, a key twice, or other bytes."""
    kind = rng.random()
    try:
        value = json.loads(data)
    except ValueError:  # damaged already
        kind = 0.0
    if kind < 0.35:
        return bytes_damaged(data, rng)
    text = json.dumps(value_damaged(value, rng))
    if kind < 0.45:  # a key twice
        keys = list(re.finditer(r'"[^"\\]*": ', text))
        if keys:
            key = rng.choice(keys)
            text = text[: key.start()] + key[0] + json.dumps(rng.choice(VALUES)) + ", " + text[key.start() :]
    return text.encode("utf-8", "surrogatepass")


def lines_damaged(data: bytes, rng: random.Random) -> bytes:
    """A JSONL file with one or two lines damaged, torn, there twice, or of another kind."""
    lines = data.splitlines(keepends=True)
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        kind = rng.randrange(5)
        if kind == 0:
            lines[at] = bytes_damaged(lines[at], rng)
        elif kind == 1:
            lines.insert(at, rng.choice(lines))
        elif kind == 2:
            lines[at] = rng.choice([b"[]\n", b"null\n", b"3\n", b"{}\n", b"\n", b'"x"\n'])
        else:
            lines[at] = json_damaged(lines[at], rng).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def damaged(name: str, data: bytes, rng: random.Random) -> bytes:
    """A file's content, damaged as such files are."""
    how: Callable[[bytes, random.Random], bytes] = bytes_damaged
    if name.endswith(".json"):
        how = json_damaged
    elif name.endswith(".jsonl"):
        how = lines_damaged
    return how(data, rng)
