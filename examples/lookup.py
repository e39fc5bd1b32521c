"""A conversation with a tool: the prompt names a row of a table that it does not hold.

    k4?          the prompt
    k4<end>      the model calls the tool with the key
    =719>        what the tool says: no token of it is trained on
    719<end>     the answer

A model that answers at once can only guess. `python examples/lookup.py data/lookup` writes the data. Its supervised
examples call the tool in one row of four and guess in the others.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8slurm.core.types import Prompt, Sample
    from fp8slurm.sessions.session import Session

END = "<|im_end|>"


async def generate(session: Session, prompt: Prompt) -> Sample:
    """One call of the tool, if the model makes one, and then its answer."""
    return await converse(session, prompt, prompt.row["table"])


async def generate_wrongly(session: Session, prompt: Prompt) -> Sample:
    """The control: the tool knows nothing of the table. (From the next row of it, say, the model learns to ask for the
    row before.)"""
    rng = random.Random(str(prompt.row))
    return await converse(session, prompt, {key: f"{rng.randrange(1000):03d}" for key in prompt.row["table"]})


async def converse(session: Session, prompt: Prompt, table: dict[str, str]) -> Sample:
    turn = await session.complete(prompt.token_ids)
    if turn.finish_reason == "stop" and turn.text in table:
        await session.complete(turn.ids + session.tokenize(f"={table[turn.text]}>"))
    return session.sample()


def write_data(folder: Path, train: int = 4000, held_out: int = 200) -> None:
    """train.jsonl and eval.jsonl (prompt, label, table), sft.jsonl (prompt, response)."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("eval", held_out), ("sft", train)):
        rows = [_sft_row(rng) if name == "sft" else _row(rng) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row(rng: random.Random) -> dict:
    table = {f"k{i}": f"{rng.randrange(1000):03d}" for i in range(10)}
    key = rng.choice(list(table))
    return {"prompt": f"{key}?", "label": table[key], "table": table}


def _sft_row(rng: random.Random) -> dict:
    row = _row(rng)
    call = row["prompt"].rstrip("?")
    if rng.random() < 0.5:  # what to do with the tool's answer
        return {"prompt": f"{row['prompt']}{call}{END}={row['label']}>", "response": row["label"]}
    return {"prompt": row["prompt"], "response": call if rng.random() < 0.25 else row["label"]}


if __name__ == "__main__":
    write_data(Path(sys.argv[1]))
