"""Saved rollouts (fp8slurm/rollout/files.py) as samples that a report shows: pieces of text with each token's gap."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fp8slurm.core.numbers import number
from fp8slurm.report.safe import visible
from fp8slurm.run.reader import Run

LIMIT = 300
"""Samples that are embedded unless --samples says otherwise."""
CHARACTERS = 1_500_000
"""Text of all embedded samples together; tokens count as eight more."""
READ_BYTES = 200 << 20
"""Where the saved files hold more, steps are left out evenly: a report is built in seconds."""
TEXT = 6_000
"""Longest prompt, and longest response, of one sample."""
_NAME = re.compile(r"step_(\d+)(?:\.(\d+))?\.jsonl")


@dataclass
class Piece:
    """One token, or a few that make one character together."""

    text: str
    trainer: float | None
    engine: float | None
    """Log-probabilities; the sum over the tokens of the piece."""
    gap: float | None
    """trainer - engine of the token of the piece where it is largest in size."""
    masked: bool = False
    """None of its tokens was trained on, though the sample was (loss_mask)."""
    given: bool = False
    """A tool said it, or whoever else: no token of it is the model's."""


@dataclass
class ShownSample:
    """One sample of a saved rollout."""

    step: int
    index: int | None
    prompt: str
    label: str
    response: str
    reward: float | None
    finish: str
    pieces: list[Piece]
    """Empty where tokens or log-probabilities were not saved."""
    mean_gap: float | None = None
    """Mean |d| over all its tokens."""
    max_gap: float | None = None
    cut: int = 0
    """Tokens left out at the end."""


@dataclass
class Samples:
    """What is shown, and what there was."""

    shown: list[ShownSample] = field(default_factory=list)
    saved: int = 0
    """Samples of the steps that were read."""
    read: int = 0
    """Steps that were read."""
    steps: list[int] = field(default_factory=list)
    with_gap: bool = False
    """Some sample has the trainer's log-probabilities."""
    decoded: bool = True
    """False: no tokenizer was found, tokens are shown by number."""


def read_samples(run: Run, limit: int = LIMIT) -> Samples:
    """At most `limit` samples: of every saved step as many, half of them those with the largest gap, half spread
    evenly.

    Steps are left out evenly where there are more than `limit`, or more than READ_BYTES; samples where the text of a
    step is longer than its part of CHARACTERS.
    """
    out = Samples()
    files = rollout_files(run.path)
    out.steps = sorted(files)
    if not files or limit <= 0:
        return out
    whole = sum(_size(p) for paths in files.values() for p in paths) or 1
    count = max(1, min(len(files), limit, READ_BYTES * len(files) // whole))
    chosen = [out.steps[i * len(out.steps) // count] for i in range(count)]
    decode = Decoder(run)
    room = 0
    for step in chosen:
        rows = list(_rows(files[step], run.notes))
        out.saved += len(rows)
        gaps = _trainer_rows(run.path / "rollouts" / "trainer" / f"step_{step:06d}.jsonl", rows, run.notes)
        room += CHARACTERS // count
        fitting = []
        for i in _choose(rows, gaps, max(1, limit // count)):
            cost = _cost(rows[i])
            if cost <= room:
                room -= cost
                fitting.append(i)
        out.shown += [_sample(step, rows[i], gaps[i] if gaps else None, decode) for i in sorted(fitting)]
    out.read, out.decoded = count, decode.found
    out.with_gap = any(s.max_gap is not None for s in out.shown)
    return out


def _cost(row: dict[str, Any]) -> int:
    """About the characters that a sample takes."""
    texts = sum(min(TEXT, len(str(row.get(key, "")))) for key in ("prompt", "response"))
    return texts + 8 * min(TEXT, len(row["tokens"]) if isinstance(row.get("tokens"), list) else 0) + 200


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def rollout_files(run: Path) -> dict[int, list[Path]]:
    """The saved files of every step, rollout workers in order."""
    by_step: dict[int, list[tuple[int, Path]]] = {}
    try:
        paths = list((run / "rollouts").glob("step_*.jsonl"))
    except OSError:
        return {}
    for path in paths:
        if m := _NAME.fullmatch(path.name):
            by_step.setdefault(int(m[1]), []).append((int(m[2] or 0), path))
    return {step: [p for _, p in sorted(files)] for step, files in by_step.items()}


def _rows(files: list[Path], notes: list[str]) -> Iterator[dict[str, Any]]:
    for path in files:
        broken = 0
        try:
            with open(path, "rb") as f:
                for line in f:
                    try:
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise TypeError
                    except (ValueError, TypeError, RecursionError):
                        broken += 1
                        row = {}  # keeps its place: the trainer's file goes by lines
                    yield row
        except OSError as error:
            notes.append(f"rollouts/{path.name} cannot be read: {error.strerror}")
        if broken:
            notes.append(f"rollouts/{path.name}: {broken} lines cannot be read (torn?)")


def _trainer_rows(path: Path, rows: list[dict[str, Any]], notes: list[str]) -> list[list[float | None] | None] | None:
    """The trainer's log-probabilities by line; None where there are none, or where they belong to other samples."""
    if not path.is_file():
        return None
    trained = list(_rows([path], notes))
    fits = len(trained) == len(rows) and all(t.get("index") == r.get("index") for t, r in zip(trained, rows) if t and r)
    if not fits:
        notes.append(f"rollouts/trainer/{path.name} belongs to other samples and is left out")
        return None
    return [_numbers(t.get("trainer_logprobs")) for t in trained]


def _gaps(row: dict[str, Any], trainer: list[float | None] | None) -> list[float | None]:
    engine = _numbers(row.get("logprobs"))
    if trainer is None or engine is None or len(trainer) != len(engine):
        return []
    return [None if t is None or e is None else t - e for t, e in zip(trainer, engine)]


def _choose(rows: list[dict[str, Any]], gaps: list[list[float | None] | None] | None, count: int) -> list[int]:
    """Indices, most wanted first: those with the largest gap and those spread evenly by turns."""
    usable = [i for i, row in enumerate(rows) if row]
    if len(usable) <= count:
        return usable
    largest: list[int] = []
    if gaps is not None:
        worst = {i: max((abs(d) for d in _gaps(rows[i], gaps[i]) if d is not None), default=-1.0) for i in usable}
        largest = sorted((i for i in usable if worst[i] >= 0), key=lambda i: -worst[i])[: count // 2]
    rest = [i for i in usable if i not in set(largest)]
    want = count - len(largest)
    even = [rest[k * len(rest) // want] for k in range(want)]
    return [i for pair in zip_longest(even, largest) for i in pair if i is not None]


def _sample(step: int, row: dict[str, Any], trainer: list[float | None] | None, decode: Decoder) -> ShownSample:
    tokens, engine = row.get("tokens"), _numbers(row.get("logprobs"))
    gaps = _gaps(row, trainer)
    mask = row["loss_mask"] if isinstance(row.get("loss_mask"), list) else []
    turns = _spans(row.get("turns"))
    pieces: list[Piece] = []
    cut = 0
    if isinstance(tokens, list) and engine is not None and len(tokens) == len(engine):
        groups = decode.groups(tokens)
        known = trainer if gaps else None
        length = 0
        for text, a, b in groups:
            length += len(text)
            if length > TEXT:
                cut = len(tokens) - a
                break
            ds = [d for d in gaps[a:b] if d is not None]
            own, worst = (_sum(known[a:b]) if known else None), (max(ds, key=abs) if ds else None)
            masked = bool(mask) and not any(mask[a:b])
            given = bool(turns) and not any(start < b and a < end for start, end in turns)
            pieces.append(Piece(text, own, _sum(engine[a:b]), worst, masked, given))
    sizes = [abs(d) for d in gaps if d is not None]
    index = number(row.get("index"))
    prompt = row.get("prompt", "")
    if isinstance(row.get("prompt_tokens"), list):  # a branch: what was said before is in its prompt
        prompt = decode.text(row["prompt_tokens"])
    finish = row.get("finish_reason", "") if not row.get("error") else f"error: {row['error']}"
    return ShownSample(
        step, None if index is None else int(index), clip(prompt), clip(row.get("label", ""), 500),
        clip(row.get("response", "")), number(row.get("reward")), visible(finish)[:200], pieces,
        sum(sizes) / len(sizes) if sizes else None, max(sizes) if sizes else None, cut,
    )  # fmt: skip


def clip(text: Any, limit: int = TEXT) -> str:
    """`visible`, and what was cut off said."""
    raw = str(text)
    shown = visible(raw[:limit])
    return shown if len(raw) <= limit else f"{shown} \u2026 [{len(raw) - limit:,} more characters]"


def _numbers(value: Any) -> list[float | None] | None:
    return [number(v) for v in value] if isinstance(value, list) else None


def _spans(value: Any) -> list[tuple[int, int]]:
    """turns of a saved sample, [first token, the one behind the last] of each; nothing where they cannot be read."""
    spans = value if isinstance(value, list) else []
    return [(s[0], s[1]) for s in spans if isinstance(s, list) and len(s) == 2 and all(type(x) is int for x in s)]


def _sum(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if len(known) == len(values) else None


class Decoder:
    """Token ids to text by the run's tokenizer.json; without one, tokens are shown as numbers."""

    def __init__(self, run: Run) -> None:
        self._tokenizer: Any = None
        folders = [
            run.path / "engine_model",
            run.setting("model.rollout_checkpoint"),
            run.setting("model.hf_checkpoint"),
        ]
        for folder in [Path(f) for f in folders if f]:
            for path in (folder, run.path / ".." / ".." / folder):
                if self._tokenizer is None and (path / "tokenizer.json").is_file():
                    self._tokenizer = _load(path / "tokenizer.json", run.notes)
        self.found = self._tokenizer is not None

    def groups(self, ids: list[Any]) -> list[tuple[str, int, int]]:
        """(text, first token, token behind it); tokens that end within a character are put together, four at most."""
        out, at = [], 0
        while at < len(ids):
            end = at + 1
            text = self.text(ids[at:end])
            while "\ufffd" in text and end < len(ids) and end - at < 4:
                longer = self.text(ids[at : end + 1])
                end += 1
                text = longer
            if "\ufffd" in text:  # bytes that make no character at all
                end, text = at + 1, self.text(ids[at : at + 1])
            out.append((visible(text).replace("\n", "\u21b5\n"), at, end))
            at = end
        return out

    def text(self, ids: list[Any]) -> str:
        """All of them in one."""
        if self._tokenizer is not None:
            try:
                return self._tokenizer.decode(ids, skip_special_tokens=False)
            except (OverflowError, TypeError, ValueError):
                pass
        return "".join(f"\u27e8{visible(i)[:12]}\u27e9" for i in ids)


def _load(path: Path, notes: list[str]) -> Any:
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        notes.append(f"{path.name} cannot be read, tokens are shown by number: {str(error)[:100]}")
        return None
