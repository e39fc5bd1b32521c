import json

import pytest
import tiny

from fp8slurm.check.data import check_eval_tasks
from fp8slurm.config import RunConfig
from fp8slurm.config.schema import DataSection, RewardSection
from fp8slurm.data.prompts import load_prompts, load_tokenizer, sample_seed
from fp8slurm.engine.client import GenerateRequest
from fp8slurm.eval.asking import EvalRequest, batches
from fp8slurm.eval.questions import Question, load_questions
from fp8slurm.eval.tasks import (
    HELD_OUT,
    EvalTask,
    grader_section,
    held_out,
    parse_task,
    read_definition,
    run_tasks,
    shipped,
    unique,
)

DATA = DataSection(max_prompt_tokens=10**6)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_every_shipped_definition_reads_its_documented_format(tmp_path, tokenizer):
    rows = {
        "aime-2024": [
            {"id": 60, "problem": "1+1", "answer": "002"},
            {"prompt": [{"role": "user", "content": "2+2"}], "label": 4},
        ],
        "gsm8k": [{"question": "Two ducks?", "answer": "She has 2.\n#### 1,018"}],
        "math500": [{"problem": "$x$", "answer": "\\frac{1}{2}", "unique_id": "test/algebra/1.json"}],
        "gpqa-diamond": [
            {
                "Question": "Which?",
                "Correct Answer": "right",
                "Incorrect Answer 1": "w1",
                "Incorrect Answer 2": "w2",
                "Incorrect Answer 3": "w3",
            },
            {"question": "Who?", "choices": ["x", "y", "z"], "answer": 1},
            {"question": "Who else?", "choices": ["x", "y"], "answer": "b"},
        ],
    }
    assert sorted(rows) == shipped()
    labels = {}
    for name, some in rows.items():
        task = parse_task(f"{name}={write(tmp_path / f'{name}-file.jsonl', *some)}")
        assert task.description and task.name == name
        questions, left_out = load_questions(task, tokenizer, DATA)
        labels[name] = [q.label for q in questions]
        assert left_out == 0 and all(tokenizer.decode(list(q.token_ids)) == q.text for q in questions)
    assert (
        labels["aime-2024"] == ["002", "4"] and labels["gsm8k"] == ["1,018"] and labels["math500"] == ["\\frac{1}{2}"]
    )
    assert labels["gpqa-diamond"][1:] == ["B", "B"]
    task = parse_task("gpqa-diamond", data=tmp_path / "gpqa-diamond-file.jsonl")
    first, *_ = load_questions(task, tokenizer, DATA)[0]
    assert f"{first.label}. right\n" in first.text and "w3" in first.text and "Answer: X" in first.text
    assert load_questions(task, tokenizer, DATA)[0][0] == first, "the order of the choices is fixed"
    aime = parse_task(f"aime-2024={tmp_path / 'aime-2024-file.jsonl'}")
    one, two = load_questions(aime, tokenizer, DATA)[0]
    assert one.id == "60" and "1+1\n\nPlease reason" in one.text and two.id == "1" and "Please reason" not in two.text


def test_the_file_may_be_named_in_three_ways(tmp_path):
    file = write(tmp_path / "gsm8k.jsonl", {"question": "q", "answer": "1"})
    for task in (parse_task(f"gsm8k={file}"), parse_task("gsm8k", file), parse_task("gsm8k", tmp_path)):
        assert task.data == file
    assert parse_task(str(file), grader="math").name == "gsm8k"
    with pytest.raises(ValueError, match="no math500.jsonl or math500.parquet"):
        parse_task("math500", tmp_path)
    with pytest.raises(ValueError, match="nothing is downloaded"):
        parse_task("gsm8k")
    with pytest.raises(ValueError, match="say how its answers are graded: --grader exact"):
        parse_task(str(file))
    with pytest.raises(ValueError, match="no such task; allowed: aime-2024, gpqa-diamond, gsm8k, math500"):
        parse_task("gsm8")
    with pytest.raises(ValueError, match="held twice is there twice".replace("held twice", "gsm8k")):
        unique([parse_task(f"gsm8k={file}"), parse_task(str(file), grader="exact")])


def test_a_definition_of_ones_own(tmp_path, tokenizer):
    write(tmp_path / "q.jsonl", {"q": "a {prompt} of {choices}", "a": "x=7;"})
    toml = tmp_path / "own.toml"
    toml.write_text(
        'name = "own"\nprompt_keys = ["q"]\nlabel_keys = ["a"]\nlabel_pattern = "=(\\\\d)"\n'
        'template = "<{prompt}>"\ngrader = "numeric"\ndata = "q.jsonl"\n'
    )
    (question,), _ = load_questions(parse_task(str(toml)), tokenizer, DATA)
    assert (question.text, question.label) == ("<a {prompt} of {choices}>", "7"), (
        "what is filled in is not filled in again"
    )
    for line, complaint in {
        'colour = "red"': "keys of a task: name, description",
        'grader = "maths"': "not one of exact",
        'template = "x"': "has no {prompt}",
        'label_pattern = "("': "label_pattern",
        'label_pattern = "x"': "no group",
        "n_samples = 0": "n_samples",
    }.items():
        toml.write_text(f'name = "own"\n{line}\n')
        with pytest.raises(ValueError, match="own.toml") as error:
            read_definition(toml)
        assert complaint in str(error.value), line
    toml.write_text("name = ")
    with pytest.raises(ValueError, match="not a TOML file"):
        read_definition(toml)
    toml.write_text('name = "a b"')
    with pytest.raises(ValueError, match="'a b' may hold letters"):
        read_definition(toml)


BAD = {
    "{torn": "not JSON",
    "[1]": "a JSON object is expected",
    '{"prompt": "q"}': "no 'label' among its keys",
    '{"label": "1"}': "no 'prompt' among",
    '{"prompt": "q", "label": [1]}': "text or a number, not list",
    '{"prompt": "q", "label": "none"}': "has no number",
    '{"prompt": "again", "label": "2", "id": "a"}': "id 'a' is there twice, first in line 1",
    '{"prompt": [], "label": "1"}': "text or a list of messages",
}


@pytest.mark.parametrize("line", BAD, ids=BAD.values())
def test_a_bad_line_is_refused_with_its_place_or_left_out(tmp_path, tokenizer, caplog, line):
    good = {"prompt": "first", "label": "1", "id": "a"}
    file = write(tmp_path / "t.jsonl", good, "", line, {"prompt": "last", "label": "3"})
    task = parse_task(str(file), grader="numeric").model_copy(update={"id_keys": ["id"]})
    with pytest.raises(ValueError, match=r"t\.jsonl:3: .*--on-bad-line skip") as error:
        load_questions(task, tokenizer, DATA)
    assert BAD[line] in str(error.value)
    questions, left_out = load_questions(task, tokenizer, DATA.model_copy(update={"on_bad_line": "skip"}))
    assert [q.id for q in questions] == ["a", "3"] and left_out == 1 and "t.jsonl:3 left out" in caplog.text


def test_no_question_is_refused(tmp_path, tokenizer):
    for file in (write(tmp_path / "empty.jsonl"), write(tmp_path / "long.jsonl", {"prompt": "x" * 100, "label": "1"})):
        with pytest.raises(ValueError, match="has no question"):
            load_questions(parse_task(str(file), grader="exact"), tokenizer, DataSection(max_prompt_tokens=8))
    with pytest.raises(ValueError, match="--tasks .*none.jsonl: there is no such file"):
        parse_task(str(tmp_path / "none.jsonl"), grader="exact")


def test_the_letter_of_shuffled_choices_is_the_right_answers(tmp_path, tokenizer):
    """Each question has an order of its own, the same every time; no letter is the right one more often than chance."""
    keys = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    rows = [{"Question": f"Which of {i}?", **{k: f"{k} to {i}" for k in keys}} for i in range(24)]
    task = parse_task(f"gpqa-diamond={write(tmp_path / 'g.jsonl', *rows)}")
    questions, _ = load_questions(task, tokenizer, DATA)
    for i, q in enumerate(questions):
        lines = [line for line in q.text.splitlines() if f"Answer to {i}" in line or " Answer " in line]
        assert sorted(line[3:].split(" to ")[0] for line in lines) == sorted(keys)
        assert [line[:2] for line in lines] == ["A.", "B.", "C.", "D."]
        assert f"{q.label}. Correct Answer to {i}" in lines
    orders = {tuple("Correct" in line for line in q.text.splitlines() if " Answer " in line) for q in questions}
    assert {q.label for q in questions} == set("ABCD") and len(orders) == 4
    assert load_questions(task, tokenizer, DATA)[0] == questions


def test_the_last_of_several_answers_is_the_label(tmp_path, tokenizer):
    row = {"question": "How many?", "answer": "At first 3.\n#### 3\nNo:\n#### 1,018"}
    ((question,), _) = load_questions(parse_task(f"gsm8k={write(tmp_path / 'g.jsonl', row)}"), tokenizer, DATA)
    assert question.label == "1,018"


def test_a_question_as_long_as_is_allowed_is_asked(tmp_path, tokenizer):
    file = write(tmp_path / "t.jsonl", *({"prompt": "1" * n, "label": "2"} for n in (8, 9)))
    task = parse_task(str(file), grader="exact").model_copy(update={"chat": False})
    questions, left_out = load_questions(task, tokenizer, DataSection(max_prompt_tokens=8))
    assert [len(q.token_ids) for q in questions] == [8] and left_out == 1


def test_parquet_and_limit(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"question": f"q{i}", "answer": f"#### {i}"} for i in range(5)])
    pyarrow.parquet.write_table(table, tmp_path / "gsm8k.parquet")
    questions, _ = load_questions(parse_task("gsm8k", tmp_path), tokenizer, DATA, limit=3)
    assert [(q.id, q.label) for q in questions] == [("0", "0"), ("1", "1"), ("2", "2")]


def test_a_runs_held_out_prompts_are_what_the_loop_tokenizes(tmp_path, tokenizer, model):
    rows = [{"prompt": [{"role": "user", "content": f"{i}|1="}], "label": str(i)} for i in range(4)] + [
        {"prompt": "y" * 300, "label": "1"}
    ]
    file = write(tmp_path / "eval.jsonl", *rows)
    more = write(tmp_path / "more.jsonl", *rows)
    config = RunConfig(
        data={"eval": file, "max_prompt_tokens": 64},
        reward={"kind": "digits"},
        eval={"tasks": [str(more)], "n_samples": 2, "temperature": 0.5},
        rollout={"max_tokens": 9, "top_p": 0.9},
    )
    first, second = run_tasks(config)
    assert (first.name, first.grader, first.n_samples, first.temperature, first.max_tokens, first.top_p) == (
        HELD_OUT,
        "exact",
        2,
        0.5,
        9,
        0.9,
    )
    assert (second.name, second.grader, second.n_samples) == ("more", "exact", 2)
    questions, left_out = load_questions(held_out(config), tokenizer, config.data)
    prompts = load_prompts(config.data, tokenizer, file)
    assert [q.token_ids for q in questions] == [p.token_ids for p in prompts] and left_out == 1


def test_the_borders_of_batches_do_not_depend_on_what_is_done():
    task = EvalTask(name="x", grader="exact", n_samples=3)
    questions = [Question(str(i), "", (1,), "") for i in range(5)]
    whole = batches(task, questions, 4)
    assert [len(b) for b in whole] == [4, 4, 4, 3]
    assert [w.key for b in whole for w in b] == [("x", str(q), k) for q in range(5) for k in range(3)]
    done = {w.key for w in whole[0]} | {whole[2][1].key}
    left = batches(task, questions, 4, done)
    assert [[w.key for w in b] for b in left] == [[w.key for w in b if w.key not in done] for b in whole[1:]]
    requests = [w.request(7, [2], context=12) for b in whole for w in b]
    assert len({r.seed for r in requests}) == 15 and {r.max_tokens for r in requests} == {10}
    assert [r.seed for r in requests] == [w.request(7, [2]).seed for b in whole for w in b]


def test_a_sample_is_asked_for_as_its_task_says():
    task = EvalTask(name="x", grader="exact").model_copy(
        update={"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 64}
    )
    request = EvalRequest(task, Question("q7", "", (5, 6, 7), ""), 3)
    assert request.request(7, [2], context=1000) == GenerateRequest(
        [5, 6, 7], 64, 0.6, 0.95, 20, [2], sample_seed(7, "x/q7", 3)
    )
    other = EvalRequest(task.model_copy(update={"name": "y"}), request.question, 3)
    assert other.request(7, [2]).seed != request.request(7, [2]).seed, "two tasks may number their questions alike"
    # SGLang takes one token less than its context holds; a prompt that fills it still gets a token, to be refused by name
    assert [request.request(7, [2], context=c).max_tokens for c in (68, 67, 5, 3)] == [64, 63, 1, 1]


def test_a_runs_tasks_are_checked_before_it_starts(tmp_path, tokenizer):
    file = write(tmp_path / "t.jsonl", {"prompt": "1+1=", "label": "2"})
    check_eval_tasks(RunConfig(eval={"tasks": [str(file)]}), tokenizer)
    for section, complaint in [
        ({"tasks": ["gsm9"]}, "no such task"),
        ({"tasks": [str(tmp_path / "none.jsonl")]}, "--eval.tasks .*none.jsonl: there is no such file"),
        ({"tasks": [str(file), str(file)]}, "--eval.tasks: t is there twice"),
        ({"n_samples": 2}, "--eval.n-samples 2 with --eval.temperature 0"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            check_eval_tasks(RunConfig(eval=section), tokenizer)
    with pytest.raises(ValueError, match="cannot be loaded"):
        check_eval_tasks(RunConfig(eval={"tasks": [str(file)]}, reward={"kind": "no_such_module:f"}), tokenizer)


def test_a_runs_limits_of_graders_are_its_evaluations():
    limits = RewardSection(kind="mine:f", timeout_s=60, memory_mib=8192, on_error="error")
    section = grader_section(EvalTask(name="x", grader="math"), limits)
    assert section == RewardSection(kind="math", timeout_s=60, memory_mib=8192, on_error="zero")
