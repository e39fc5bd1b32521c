import json
from types import SimpleNamespace

import pytest

from fp8slurm.cli import main
from fp8slurm.eval import compare as compare_module
from fp8slurm.eval.compare import compare, fixed_sequences, is_scored, score
from fp8slurm.eval.questions import Question
from fp8slurm.eval.summary import speed, summarize
from fp8slurm.eval.tasks import EvalTask


def rows_of(right, n=1, name="t"):
    """right: for each question how many of its n samples are right."""
    return [
        {
            "task": name,
            "id": str(i),
            "sample": k,
            "label": str(i),
            "response_ids": [1] * (4 + k),
            "finish_reason": "length" if k == 1 else "stop",
            "score": float(k < c),
            "correct": k < c,
            "attempt": 0,
            "at": 2.0,
        }
        for i, c in enumerate(right)
        for k in range(n)
    ]


def evaluation(folder, right, precision, n=1, scored=None, tokens_per_second=100.0, emulated=False, **more):
    task, rows = EvalTask(name="t", n_samples=n), rows_of(right, n)
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    summary = {
        "checkpoint": "step_000040",
        "precision": precision,
        "tokens_per_second": tokens_per_second,
        "emulated": emulated,
        "tasks": {"t": summarize(task, rows)},
    } | more
    (folder / "summary.json").write_text(json.dumps(summary))
    if scored is not None:
        (folder / "scored.jsonl").write_text(
            "".join(json.dumps({"tokens": k, "logprobs": v}) + "\n" for k, v in scored.items())
        )
    return folder


def test_a_summary_by_hand():
    found = summarize(EvalTask(name="t", n_samples=4), rows_of([4, 2, 0, 1], 4), failures=3, left_out=1)
    assert (found["questions"], found["samples"], found["correct"]) == (4, 16, 7)
    assert found["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.25) / 4) == pytest.approx(found["score"])
    assert {k: v["value"] for k, v in found["pass_at_k"].items()} == pytest.approx(
        {"1": (1 + 0.5 + 0 + 0.25) / 4, "2": (1 + (1 - 1 / 6) + 0 + 0.5) / 4, "4": 3 / 4}
    )
    assert all(v["low"] <= v["value"] <= v["high"] for v in found["pass_at_k"].values())
    assert found["response_tokens"] == {"mean": 5.5, "median": 5.5, "p95": 7.0, "longest": 7}
    assert (found["truncated"], found["aborted"], found["grader_failures"], found["left_out"]) == (0.25, 0, 3, 1)


def test_speed_counts_every_start():
    rows = [{"response_ids": [1] * 10, "attempt": a, "at": t} for a, t in [(0, 1.0), (0, 4.0), (1, 2.0), (1, 0.5)]]
    assert speed(rows) == (40, 6.0)


def test_differences_flips_gap_and_speed_by_hand(tmp_path):
    a = evaluation(
        tmp_path / "a", [1, 1, 0, 0, 1], "fp8", scored={"x": [-1.0, -2.0], "y": [-0.5]}, tokens_per_second=150
    )
    b = evaluation(tmp_path / "b", [1, 1, 1, 0, 0], "bf16", scored={"x": [-1.1, -2.0], "y": [-0.2]})
    found = compare(a, b)
    task = found["tasks"]["t"]
    assert (task["a"], task["b"], task["difference"]["value"], task["lost"], task["won"]) == (
        0.6,
        0.6,
        0.0,
        ["2"],
        ["4"],
    )
    assert task["difference"]["low"] < 0 < task["difference"]["high"]
    gap = found["logprob_gap"]
    assert gap["tokens"] == 3 and gap["mean_abs"] == pytest.approx(0.4 / 3) and gap["max"] == pytest.approx(0.3)
    assert gap["k1"] == pytest.approx(0.2 / 3) and found["speed_ratio"] == 1.5 and found["worse"] == []
    emulated = evaluation(tmp_path / "e", [1, 1, 0, 0, 1], "fp8", tokens_per_second=150, emulated=True)
    assert compare(emulated, b)["speed_ratio"] is None, "emulated FP8 says nothing about its speed"
    samples = evaluation(tmp_path / "c", [4, 2, 1, 0, 3], "fp8", n=4)
    task = compare(samples, b)["tasks"]["t"]
    assert task["lost"] == ["2"] and task["won"] == ["4"] and task["difference"]["value"] == pytest.approx(0.5 - 0.6)
    assert compare(samples, b)["logprob_gap"] is None
    other = evaluation(tmp_path / "d", [1, 1, 1, 0, 0], "bf16", scored={"x": [-1.1, -2.0]})
    assert compare(a, other)["logprob_gap"] is None, "other tokens were scored"


def test_questions_are_paired_by_their_names_whatever_their_order(tmp_path):
    """Rows come as engines answer: in another order in every evaluation."""
    a, b = evaluation(tmp_path / "a", [1, 1, 0], "fp8"), evaluation(tmp_path / "b", [1, 0, 0], "bf16")
    rows = (b / "samples.jsonl").read_text().splitlines(keepends=True)
    (b / "samples.jsonl").write_text("".join(rows[::-1]))
    task = compare(a, b)["tasks"]["t"]
    assert (task["won"], task["lost"]) == (["1"], []) and task["difference"]["low"] >= 0
    assert task["difference"]["value"] == pytest.approx(1 / 3)


def test_exit_status_three_only_where_the_whole_interval_is_worse(tmp_path, capsys):
    base = evaluation(tmp_path / "base", [1] * 160 + [0] * 40, "bf16")
    same = evaluation(tmp_path / "same", [0] * 4 + [1] * 156 + [1] * 4 + [0] * 36, "fp8")
    bad = evaluation(tmp_path / "bad", [0] * 40 + [1] * 120 + [0] * 40, "fp8")  # 20 points worse, interval about +-5.5
    for folder, limit, status in [
        (same, "0", 0),
        (bad, "0.02", 3),
        (bad, "0.12", 3),
        (bad, "0.19", 0),
        (bad, "0.5", 0),
    ]:
        assert main(["compare", str(folder), str(base), "--fail-if-worse", limit]) == status, (folder, limit)
    out = capsys.readouterr().out
    assert "FP8 is worse on t, by more than 2 points" in out and "not significantly worse" in out
    assert main(["compare", str(bad), str(base), "--out", str(tmp_path / "c")]) == 0
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert found["kv_cache"] == ["auto", "auto"]
    cache = evaluation(tmp_path / "cache", [0] * 40 + [1] * 120 + [0] * 40, "fp8", kv_cache="fp8")
    capsys.readouterr()
    assert main(["compare", str(cache), str(same), "--fail-if-worse", "0.02"]) == 3
    assert "FP8 with FP8 KV is worse on t, by more than 2 points" in capsys.readouterr().out
    assert found["fail_if_worse"] is None and len(found["tasks"]["t"]["lost"]) == 40


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    a = evaluation(tmp_path / "a", [1, 0], "fp8")
    b = evaluation(tmp_path / "b", [1, 0, 1], "bf16")
    for other, complaint in [(b, "did not ask the same questions of t"), (tmp_path / "none", "has no summary.json")]:
        assert main(["compare", str(a), str(other)]) == 2
        assert complaint in capsys.readouterr().err
    c = evaluation(tmp_path / "c", [1, 0], "bf16")
    for key, mine, other in [
        ("temperature", 0.0, 0.6), ("top_p", 1.0, 0.9), ("top_k", -1, 20), ("max_tokens", 8, 16), ("grader", "exact", "math"),
        ("template", "{prompt}", "Q: {prompt}"), ("chat", True, False), ("sha256", "1", "2"),
    ]:  # fmt: skip
        for folder, value in ((a, mine), (c, other)):
            (folder / "settings.json").write_text(json.dumps({"tasks": [{"name": "t", key: value}]}))
        assert main(["compare", str(a), str(c)]) == 2
        assert ("the questions' file" if key == "sha256" else key) in capsys.readouterr().err
    (c / "settings.json").write_text((a / "settings.json").read_text())
    assert main(["compare", str(a), str(c)]) == 0
    capsys.readouterr()
    (b / "summary.json").unlink()
    (b / "settings.json").write_text("{}")
    assert main(["compare", str(a), str(b)]) == 2 and "run it again to complete it" in capsys.readouterr().err
    assert main(["compare", str(a), str(a), "--fail-if-worse=-1"]) == 2


def test_another_chat_template_is_refused(tmp_path):
    folders = [evaluation(tmp_path / n, [1, 0], "fp8") for n in "ab"]
    for folder, thinking in zip(folders, (True, False)):
        (folder / "settings.json").write_text(
            json.dumps({"tasks": [], "chat_template_kwargs": {"enable_thinking": thinking}})
        )
    with pytest.raises(ValueError, match="chat_template_kwargs .*True.*False"):
        compare(*folders)


def test_other_end_tokens_are_refused(tmp_path):
    folders = [evaluation(tmp_path / n, [1, 0], "fp8") for n in "ab"]
    for folder, ids in zip(folders, ([258], [256, 258])):
        (folder / "settings.json").write_text(json.dumps({"tasks": [], "stop_token_ids": ids}))
    with pytest.raises(ValueError, match="another stop_token_ids"):
        compare(*folders)


def test_what_is_scored_is_the_first_answer_to_the_first_questions(monkeypatch):
    monkeypatch.setattr(compare_module, "SCORED_TOKENS", 3)
    questions = {name: [Question(f"q{i}", "", (i + 1,) * (i + 1), "") for i in range(3)] for name in ("t", "u")}
    rows = [
        {"task": name, "id": f"q{i}", "sample": k, "response_ids": [100 * k + 10 * i + j for j in range(0 if (name, i) == ("u", 0) else 5)]}
        for name in questions for i in (2, 0, 1) for k in (0, 1)
    ]  # fmt: skip
    found = fixed_sequences(rows, questions, 2)
    assert found == [([1], [0, 1, 2]), ([2, 2], [10, 11, 12]), ([2, 2], [10, 11, 12])]  # of u the first answer is empty


def test_every_response_token_gets_its_own_score(tmp_path):
    """The engine scores all tokens after a sequence's first; here each one's score is its number."""
    sequences = [(list(range(1, 2 + i)), list(range(50 + i, 53 + i))) for i in range(10)]  # more than one request's
    batch_sizes = []

    def answer(lists):
        batch_sizes.append(len(lists))
        return [[-float(token) for token in ids[1:]] for ids in lists]

    score(SimpleNamespace(score=answer), sequences, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [r["logprobs"] for r in rows] == [[-float(token) for token in response] for _, response in sequences]
    assert batch_sizes == [8, 2] and len({r["tokens"] for r in rows}) == 10
    assert is_scored(tmp_path, sequences) and not is_scored(tmp_path, sequences[1:])
    other = [*sequences[:-1], (sequences[-1][0][:-1], [sequences[-1][0][-1], *sequences[-1][1]])]
    assert not is_scored(tmp_path, other), "the same tokens, cut elsewhere into prompt and response"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("summary.json", "\ufeff{}", "summary.json: not JSON: Unexpected UTF-8 BOM"),
        ("summary.json", '{"tasks": [1]}', "summary.json: tasks are no JSON objects by name"),
        ("summary.json", '{"tasks": {"t": {}}, "checkpoint": 4}', "summary.json: precision and checkpoint are no text"),
        (
            "summary.json",
            '{"tasks": {"t": {}}, "checkpoint": "c", "precision": "fp8", "tokens_per_second": "fast"}',
            "summary.json: tokens_per_second 'fast' is no number",
        ),
        ("settings.json", '{"tasks": [{}]}', "settings.json: tasks are no list of JSON objects with a name"),
        ("settings.json", "{", "settings.json: not JSON"),
        ("samples.jsonl", "[]\n", "samples.jsonl:1 is no JSON object"),
        ("samples.jsonl", "\ufeff{}\n", "samples.jsonl:1 is not JSON"),
        ("samples.jsonl", '{"task": "t", "id": 3}\n', "samples.jsonl:1 has no task, id, label or correct"),
    ],
)
def test_a_broken_file_of_an_evaluation_is_named(tmp_path, capsys, file, text, said):
    a, b = (evaluation(tmp_path / name, [1, 0], name) for name in ("fp8", "bf16"))
    for folder in (a, b):
        (folder / "settings.json").write_text('{"tasks": [{"name": "t"}]}')
    assert main(["compare", str(a), str(b)]) == 0
    (a / file).write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert main(["compare", str(a), str(b)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fp8slurm compare: {a}/") and said in err, err
