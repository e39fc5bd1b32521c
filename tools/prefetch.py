"""Fetch what a run needs, where there is a network: compute nodes often have none.

    python tools/prefetch.py --model Qwen/Qwen3-4B               models/Qwen3-4B and the two files in data/
    python tools/prefetch.py --model Qwen/Qwen3-4B --no-data     the checkpoint alone
    python tools/prefetch.py --dapo FILE --aime FILE             the two data files out of parquet that is there already

What is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

DAPO, AIME = "BytedTsinghua-SIA/DAPO-Math-17k", "HuggingFaceH4/aime_2024"
ASK = "\n\nPut your final answer in \\boxed{}."


def rows_of_dapo(files: list[Path]) -> Iterable[tuple[object, str]]:
    """(messages, answer), each question once: the published file has every question a hundred times."""
    import pyarrow.parquet as pq

    seen = set()
    for file in files:
        for row in pq.read_table(file, columns=["prompt", "reward_model"]).to_pylist():
            question = row["prompt"][0]["content"]
            if question not in seen:
                seen.add(question)
                yield row["prompt"], str(row["reward_model"]["ground_truth"])


def rows_of_aime(files: list[Path]) -> Iterable[tuple[object, str]]:
    """(messages, answer)."""
    import pyarrow.parquet as pq

    for file in files:
        for row in pq.read_table(file, columns=["problem", "answer"]).to_pylist():
            yield [{"role": "user", "content": row["problem"] + ASK}], str(row["answer"])


def write(path: Path, rows: Iterable[tuple[object, str]]) -> None:
    """JSONL with prompt and label, there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    with partial.open("w") as f:
        count = 0
        for prompt, label in rows:
            f.write(json.dumps({"prompt": prompt, "label": label}) + "\n")
            count += 1
    os.replace(partial, path)
    print(f"{path}: {count} prompts")


def parquet(repository: str, cache: Path) -> list[Path]:
    from huggingface_hub import snapshot_download

    return sorted(
        Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet", local_dir=cache)).rglob(
            "*.parquet"
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of a checkpoint on the hub, such as Qwen/Qwen3-4B")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the checkpoints")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--no-data", action="store_true", help="the checkpoint alone")
    parser.add_argument("--dapo", type=Path, help="DAPO-Math-17k as parquet, instead of fetching it")
    parser.add_argument("--aime", type=Path, help="AIME 2024 as parquet, instead of fetching it")
    own = parser.parse_args()
    if own.model:
        from huggingface_hub import snapshot_download

        folder = own.models / own.model.rpartition("/")[2]
        snapshot_download(own.model, local_dir=folder, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        print(folder)
    if not own.no_data:
        for name, given, repository, rows in (
            ("dapo-math-17k", own.dapo, DAPO, rows_of_dapo),
            ("aime-2024", own.aime, AIME, rows_of_aime),
        ):
            path = own.data / f"{name}.jsonl"
            if path.exists():
                print(f"{path} is there")
            elif given or own.model:
                write(path, rows([given] if given else parquet(repository, own.data / f".{name}")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
