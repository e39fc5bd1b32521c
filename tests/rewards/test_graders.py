import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.eval.grading import Graders
from fp8slurm.eval.questions import Question
from fp8slurm.eval.tasks import EvalTask
from fp8slurm.rewards.graders import boxed_answers, chosen_letter, last_boxed, last_number, numeric
from fp8slurm.rewards.pool import RewardPool

NUMERIC = [
    ("42", "42", 1),
    ("42.", "42", 1),
    ("It is 42.", "42", 1),
    ("42.0", "42", 1),
    ("42.50", "42.5", 1),
    ("1,234", "1234", 1),
    ("1{,}234", "1234", 1),
    ("$1,234.50", "1234.5", 1),
    ("\\$18", "18", 1),
    ("18 dollars", "18", 1),
    ("5cm", "5", 1),
    ("50%", "50", 1),
    ("50\\%", "50", 1),
    ("-3", "-3", 1),
    ("\u22123", "-3", 1),
    ("x = -3", "-3", 1),
    ("3-4", "4", 1),
    ("1/2", "0.5", 1),
    ("\\frac{1}{2}", "0.5", 1),
    ("-\\frac{1}{2}", "-0.5", 1),
    ("\\dfrac12", "1/2", 1),
    ("3 + 4 = 7", "7", 1),
    ("1e3", "1000", 1),
    ("2.5e-1", "0.25", 1),
    (".5", "0.5", 1),
    ("1,000,000", "1000000", 1),
    ("first 5, then \\boxed{7}. Check: 9", "7", 1),
    ("\\boxed{7} or \\boxed{8}", "8", 0),
    ("\\boxed{1,2}", "2", 0),
    ("\\boxed{1 \\text{ or } 2}", "2", 0),
    ("\\boxed{1,234}", "1234", 1),
    ("\\boxed{x = 1, y = 2}", "2", 1),
    ("\\boxed{260 \\text{ sheets in 2 weeks}}", "260", 1),
    ("The answer is:\n- 42", "42", 1),
    ("- 42", "-42", 1),
    ("It is - 42", "-42", 1),
    ("5 - 3", "3", 1),
    ("#### 18", "18", 1),
    ("**18**", "18", 1),
    ("(18)", "18", 1),
    ("$18$", "18", 1),
    ("18 \\text{ apples}", "18", 1),
    ("0033", "33", 1),
    ("0.333333333333", "1/3", 1),
    ("0.3333333", "1/3", 0),
    ("1e-12", "2e-12", 0),
    ("100000000000.5", "100000000000", 0),
    ("10000000001", "10000000000", 0),
    ("9007199254740992", "9007199254740993", 0),  # the same double
    ("0.30000000001", "0.3", 0),
    ("3000000001/3000000000", "1", 0),
    ("\\boxed{\u517118\u4e2a}", "18", 1),  # 18 in all
    ("\u7b54\u3048\u306f18\u3067\u3059", "18", 1),  # the answer is 18, in Japanese
    ("\uc815\ub2f5\uc74018\uc785\ub2c8\ub2e4", "18", 1),  # in Korean
    ("\u7b54\u6848\uff1a\uff11\uff18\u3002", "18", 1),  # in wide characters
    ("18\u4e07\u5143", "180000", 1),  # ten thousands
    ("18\u4e07\u5143", "18", 0),
    ("3\u4e075\u5343", "5000", 0),  # 35,000, which is not read
    ("5\u5343\u514b", "5", 1),  # kilograms
    ("\u8d1f5", "5", 0),  # minus 5
    ("\u8d1f5", "-5", 1),
    ("3\u5206\u4e4b1", "1", 0),  # a third
    ("\\boxed{1\u30012}", "2", 0),
    ("\\boxed{1\u62162}", "2", 0),  # or
    ("\u03b12", "2", 0),
    ("\\alpha2", "2", 0),
    ("\u04452", "2", 0),  # a Cyrillic x
    ("Year 2024: 12", "12", 1),
    ("The answer is 42." + " So it is said." * 1000, "42", 1),
    ("twelve", "12", 0),
    ("", "12", 0),
    ("13", "12", 0),
    ("12, 13", "12", 0),
    ("-12", "12", 0),
    ("12.1", "12", 0),
    ("120", "12", 0),
    ("1/0", "0", 0),
    ("0.3333", "1/3", 0),
    ("x2", "2", 0),
    ("\\boxed{none} 12", "12", 0),
    ("1.2.3", "12", 0),
    ("2 1/2", "2.5", 1),
    ("2\\frac{1}{2}", "5/2", 1),
    ("-2\\frac12", "-2.5", 1),
    ("7 1/2", "2 1/2", 0),
    ("7\\frac{1}{2}", "2\\frac{1}{2}", 0),
    ("Line 3\n1/2", "0.5", 1),
    ("3 10/5", "2", 1),
    ("2 \\times 10^3", "2000", 1),
    ("2 x 10^{-3}", "0.002", 1),
    ("5 \\times 10^3", "2 \\times 10^3", 0),
    ("10^3", "1000", 1),
    ("2^5", "32", 1),
    ("2^5", "5", 0),
    ("0^{-1}", "0", 0),
    ("9^{999}", "9", 0),
    ("25 cm^2", "25", 1),
    ("7 m^2", "25 cm^2", 0),
    ("12 s^{-1}", "12", 1),
    ("x_1 = 4", "4", 1),
    ("4 is x_{1}", "4", 1),
]

CHOICE = [
    ("The answer is C." + " So it is said." * 1000, "C", 1),
    ("B", "B", 1),
    ("b", "B", 1),
    ("(B)", "B", 1),
    ("B.", "B", 1),
    ("**B**", "B", 1),
    ("Answer: B", "B", 1),
    ("**Answer:** B", "B", 1),
    ("Answer: (B)", "B", 1),
    ("The answer is B.", "B", 1),
    ("the answer is (B) because A is wrong", "B", 1),
    ("The correct answer is $\\text{B}$", "B", 1),
    ("\\boxed{B}", "B", 1),
    ("\\boxed{\\text{B}}", "B", 1),
    ("\\boxed{(B)}", "B", 1),
    ("\\boxed{B. helium}", "B", 1),
    ("\\boxed{\\mathrm{B}}", "B", 1),
    ("I think A. Answer: A\nNo. Answer: B", "B", 1),
    ("Long text.\n\nB", "B", 1),
    ("Long text.\n(B).", "B", 1),
    ("The answer is option B", "B", 1),
    ("Answer is: **B**", "B", 1),
    ("\\boxed{A} is wrong, so \\boxed{B}", "B", 1),
    ("Answer: B\n", "B", 1),
    ("Answer: D", "D", 1),
    ("answer: C", "C", 1),
    ("A", "B", 0),
    ("Answer: A", "B", 0),
    ("", "B", 0),
    ("I do not know", "B", 0),
    ("AB", "B", 0),
    ("Both A and B are right", "B", 0),
    ("The answer is Boron", "B", 0),
    ("\\boxed{A} Answer: B", "B", 0),
    ("\\boxed{12}", "B", 0),
    ("Answer: B'", "B", 0),
    ("B or C", "B", 0),
    ("The answer is B. Option C is wrong because it is larger.", "B", 1),
    ("The answer is B. Option C is wrong because it is larger.", "C", 0),
    ("I would take option B", "B", 1),
    ("The answer is A or B", "A", 0),
    ("The answer is B and not A", "B", 1),
    ("Answer: A/B", "A", 0),
    ("\\boxed{A, B}", "A", 0),
    ("\\boxed{A} or \\boxed{B}", "A", 0),
    ("\\boxed{B: 12 m}", "B", 1),
    ("\\boxed{B, helium}", "B", 1),
    ("Answer: `B`", "B", 1),
    ("Answer: <B>", "B", 1),
    ("Answer\uff1aB", "B", 1),
    ("\\boxed{\\text{Answer: B}}", "B", 1),
    ("\\boxed{\\text{Option B}}", "B", 1),
    ("Answer: B\nNote: the answer choice C would be wrong", "B", 1),
]


def score(kind, pairs, **settings):
    groups = [
        SampleGroup(Prompt(i, (), label), [Sample([], [], [], "stop", text=t)])
        for i, (t, label, *_) in enumerate(pairs)
    ]
    with RewardPool(RewardSection(kind=kind, **settings), workers=2) as pool:
        pool.score(groups)
        return [g.samples[0].reward for g in groups], pool.failures


@pytest.mark.parametrize(("kind", "table"), [("numeric", NUMERIC), ("choice", CHOICE)])
def test_the_tables(kind, table):
    got, failures = score(kind, table)
    assert [(t, label, g) for (t, label, want), g in zip(table, got) if g != want] == [] and failures == 0


THINKING = [
    ("so \\boxed{18}", False, "stop", 1),
    ("<think>so \\boxed{18}", False, "stop", 0),
    ("<think>so \\boxed{18}", False, "length", 0),
    ("<think>so</think>\\boxed{18}", False, "stop", 1),
    ("<think>so \\boxed{18}</think>", False, "stop", 0),
    ("<think>so \\boxed{17}</think>It is 18.", False, "stop", 1),
    ("<think>a</think>\\boxed{18}<think>b", False, "stop", 0),
    ("so \\boxed{18}", True, "stop", 0),
    ("so \\boxed{17}</think>\\boxed{18}", True, "stop", 1),
    ("so</think>\\boxed{18} and now", True, "length", 1),
    ("so it is 18", False, "length", 0),
    ("so \\boxed{18}. Let me see", False, "length", 1),
    ("so \\boxed{18", False, "length", 0),
]


@pytest.mark.parametrize("kind", ["numeric", "math", "choice"])
def test_thinking_without_an_end_and_what_was_cut_off_hold_no_answer(kind):
    """In the loop, where the prompt knows whether it opened the thinking, and in an evaluation, where its text does."""
    label, text = ("B", lambda t: t.replace("18", "B").replace("17", "C")) if kind == "choice" else ("18", lambda t: t)
    table = [(text(t), *rest) for t, *rest in THINKING if kind != "choice" or "it is 18" not in t.lower()]
    groups = [
        SampleGroup(Prompt(0, (), label, thinking=opened), [Sample([], [], [], reason, text=t)])
        for t, opened, reason, _ in table
    ]
    with RewardPool(RewardSection(kind=kind, timeout_s=60), workers=1) as pool:
        pool.score(groups)
    assert [(t, g.samples[0].reward) for (t, *_), g in zip(table, groups)] == [(t, want) for t, *_, want in table]
    rows = [
        {"task": "a", "id": i, "sample": 0, "label": label, "response": t, "finish_reason": reason}
        | {"prompt": "Q<think>\n" if opened else "Q"}
        for i, (t, opened, reason, _) in enumerate(table)
    ]
    with Graders([EvalTask(name="a", grader=kind)], RewardSection(timeout_s=60), {}) as graders:
        graders.submit(rows)
        scores = graders.finish()
    assert [scores["a", i, 0] for i in range(len(table))] == [want for *_, want in table]


def test_a_grader_of_ones_own_asks_for_the_questions_row(tmp_path, monkeypatch):
    (tmp_path / "of_row.py").write_text("def f(response, row, prompt): return float(response == row['b'] + prompt)")
    monkeypatch.chdir(tmp_path)
    questions = {"a": [Question(str(i), "", (), "x", content="!", row={"b": str(i)}) for i in range(2)]}
    rows = [{"task": "a", "id": str(i), "sample": 0, "response": "1!", "label": "x"} for i in range(2)]
    with Graders([EvalTask(name="a", grader="of_row:f")], RewardSection(timeout_s=60), questions) as graders:
        graders.submit(rows)
        assert graders.finish() == {("a", "0", 0): 0, ("a", "1", 0): 1}


def test_other_kinds_get_the_whole_response():
    assert score("exact", [("<think>18", "<think>18")]) == ([1.0], 0)


def test_every_task_is_graded_by_its_own_grader():
    kinds = {"a": "exact", "b": "numeric", "c": "choice", "d": "numeric"}
    tasks = [EvalTask(name=name, grader=kind) for name, kind in kinds.items()]
    rows = [
        {"task": name, "id": i, "sample": 0, "response": response, "label": label}
        for i, (response, label) in enumerate([("42", "42"), ("It is 42.0", "42"), ("The answer is B.", "B")])
        for name in ("d", "c", "b", "a")
    ]
    with Graders(tasks, RewardSection(), {}) as graders:
        graders.submit(rows[:5])
        graders.submit(rows[5:])
        scores = graders.finish()
    assert {name: [scores[name, i, 0] for i in range(3)] for name in kinds} == {
        "a": [1, 0, 0],
        "b": [1, 1, 0],
        "c": [0, 0, 1],
        "d": [1, 1, 0],
    }


@pytest.mark.parametrize(
    "text",
    [
        "9" * 10**6,
        "1," * 500_000,
        "1,234" * 200_000,
        "1e999999999",
        "-" * 10**6,
        "\\frac{" * 200_000,
        "{" * 10**6,
        "\\boxed{" * 150_000,
        "\\boxed{" * 100_000 + "}" * 100_000,
        "}" * 10**6,
        "answer is " * 100_000,
        "answer" + " " * 10**6 + "B",
        "$" * 10**6,
        "\\boxed{1}," * 100_000,
        "\\boxed{1}" + " " * 10**6 + "\\boxed{2}",
        "1/" * 10**6,
        ". ." * 300_000,
        "\x00\ud800" * 1000,
        "(" * 10**6,
        "\\" * 10**6,
        "1e" * 500_000,
        "\\boxed{" + "9" * 10**6 + "}",
    ],
    ids=lambda text: text[:12].encode("unicode_escape").decode() + str(len(text)),
)
def test_a_megabyte_of_malice_costs_no_time(text):
    """Quadratic work on a million characters would take hours of processor time; this takes milliseconds."""
    start = time.process_time()
    assert numeric(text, "7") in (0.0, 1.0)
    chosen_letter(text)
    assert time.process_time() - start < 60


@given(st.text(st.sampled_from("0123456789.,-+/eE $%{}\\boxedfrac()AB\n"), max_size=60))
@settings(max_examples=400)
def test_graders_answer_anything(text):
    assert numeric(text, "7") in (0.0, 1.0)
    assert chosen_letter(text) is None or len(chosen_letter(text)) == 1
    for start, inside, end in boxed_answers(text):
        assert text[start:].startswith(("\\boxed", "\\fbox")) and text[inside - 1] == "{" and text[end] == "}"


@given(st.integers(-(10**15), 10**15))
def test_a_number_in_any_dress(number):
    for dress in ("{}", "{:,}", "so it is {}.", "\\boxed{{{}}}", "= {}.00", "${:,}$"):
        assert last_number(last_boxed(dress.format(number)) or dress.format(number)) == number, dress


def test_boxes():
    assert last_boxed("no box") is None and last_boxed("\\boxed{1") is None
    assert last_boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert last_boxed("\\boxed{1}, \\boxed{2} and \\boxed{3}") == "1, 2, 3"
    assert last_boxed("\\boxed{1}, so \\boxed{2}") == "2"
    assert last_boxed("\\boxed {5} and \\boxed{6") == "5"
    assert last_boxed("\\boxed{\\boxed{5}}") == "5"


@pytest.mark.parametrize("text", [
    "The answer is" + "\n" * 20000 + "1", "answer" + " " * 20000 + "1", "The answer is " + "*" * 20000 + "1",
    "option " * 3000 + "| 5 |", "\\boxed{" + ", " * 20000 + "}", "\\boxed{" + "$" * 20000 + "}", "\\boxed{A" + "," * 20000 + "}",
    "Answer: A" + "&/" * 10000 + "1",
])  # fmt: skip
def test_degenerate_responses_are_read_in_a_moment(text):
    # in a process that can be ended: re holds the interpreter; the fourth power of 20,000 would take years
    code = "import sys; from fp8slurm.rewards.graders import choice, numeric; t = sys.stdin.read(); choice(t, 'B'); numeric(t, '7')"
    subprocess.run([sys.executable, "-c", code], input=text, text=True, check=True, timeout=60)
