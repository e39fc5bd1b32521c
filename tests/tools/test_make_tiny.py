import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import tiny_task
import torch

from fp8slurm.data.prompts import load_tokenizer

PATH = Path(__file__).resolve().parents[2] / "tools" / "make_tiny.py"
spec = importlib.util.spec_from_file_location("make_tiny", PATH)
make_tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_tiny)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def make(*args):
    return make_tiny.main([str(a) for a in args])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path):
    assert make("--out", tmp_path / "a", "--data", tmp_path / "da") == 0
    assert make("--out", tmp_path / "b", "--data", tmp_path / "db") == 0
    assert make("--out", tmp_path / "c", "--data", tmp_path / "dc", "--seed", 1) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "da") == contents(tmp_path / "db")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]
    assert contents(tmp_path / "da")["train.jsonl"] != contents(tmp_path / "dc")["train.jsonl"]


def test_a_complete_folder_is_left_alone_and_a_damaged_one_made_anew(tmp_path, capsys):
    folder = tmp_path / "a"
    assert make("--data", folder) == 0
    before, inode = contents(folder), folder.stat().st_ino
    assert make("--data", folder) == 0
    assert "already there" in capsys.readouterr().out
    assert folder.stat().st_ino == inode
    (folder / "train.jsonl").write_bytes(before["train.jsonl"][:-5])
    assert make("--data", folder) == 0
    assert contents(folder) == before
    (folder / "eval.jsonl").unlink()
    assert make("--data", folder) == 0
    assert contents(folder) == before
    inode = folder.stat().st_ino
    assert make("--data", folder, "--force") == 0
    assert folder.stat().st_ino != inode and contents(folder) == before
    assert make("--data", folder, "--seed", 1) == 0
    assert contents(folder) != before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert make("--data", tmp_path) == 2
    assert "--force" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"x"}


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError):
        make_tiny.build(tmp_path / "a", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_the_task():
    train, held = tiny_task.split(seed=0)
    assert len(held) == len(set(held)) == 500
    assert len(train) == len(set(train)) == 8000
    assert not {frozenset(p) for p in train} & {frozenset(p) for p in held}
    assert tiny_task.answer("473", "829") == "879"


def test_data_files(tmp_path):
    tiny_task.write_data(tmp_path)
    rows = {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in tmp_path.iterdir()}
    assert sorted(rows) == ["eval", "sft", "train"]
    assert [r["prompt"] for r in rows["sft"]] == [r["prompt"] for r in rows["train"]]
    for row in rows["train"][:50] + rows["eval"]:
        a, b = row["prompt"][0]["content"].rstrip("=").split("|")
        assert all(int(c) == max(int(x), int(y)) for c, x, y in zip(row["label"], a, b, strict=True))


@pytest.mark.parametrize("moe", [False, True])
def test_weights_suit_block_fp8(tmp_path, moe):
    from safetensors.torch import load_file

    tiny.write_model(tmp_path, seed=0, moe=moe)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    assert {n: tuple(w.shape) for n, w in weights.items()} == tiny.weight_shapes(config)
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    projections = {n: w for n, w in weights.items() if n.endswith("_proj.weight")}
    assert len(projections) == 2 * (4 + 3 * (8 if moe else 1))
    assert all(size % 256 == 0 for w in projections.values() for size in w.shape)  # whole blocks at TP 2
    assert abs(weights["model.embed_tokens.weight"].float().std() - config["initializer_range"]) < 1e-3


def test_tokenizer(tmp_path):
    tiny.write_model(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == tiny.VOCAB_SIZE
    assert (tokenizer.eos_token, tokenizer.pad_token) == (tiny.IM_END, tiny.END_OF_TEXT)
    assert [tokenizer.convert_tokens_to_ids(t) for t in (tiny.END_OF_TEXT, tiny.IM_END)] == [256, 258]
    for word in (*tiny.WORDS, *tiny.SPECIAL_TOKENS):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word
    text = "sum of 1234 + 5,\n\nhéllo 中文 <think>x</think>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4
    assert tokenizer.decode([258, 21, 256], skip_special_tokens=True) == "6"
