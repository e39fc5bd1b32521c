"""Math grading in its real processes: a table of pairs, and answers that are meant to break it."""

import resource
from pathlib import Path

import pytest

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rewards.pool import MATH_MEMORY_MIB, RewardPool


def pairs():
    lines = (Path(__file__).parent / "math_pairs.txt").read_text().splitlines()
    return [line.split(" ;; ") for line in lines if line.strip() and not line.startswith("#")]


def groups_of(rows):
    return [
        SampleGroup(Prompt(i, (), label), [Sample([], [], [], "stop", text=text)])
        for i, (label, text) in enumerate(rows)
    ]


def test_the_table():
    table = pairs()
    assert len(table) >= 150 and {want for want, *_ in table} == {"right", "wrong"}
    groups = groups_of([row[1:] for row in table])
    with RewardPool(RewardSection(kind="math", timeout_s=120)) as pool:
        pool.score(groups)
        assert pool.failures == 0
    wrong = [row for row, g in zip(table, groups) if g.samples[0].reward != (row[0] == "right")]
    assert wrong == []


BOMBS = {
    "a tower of powers": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "10^9 digits": "\\boxed{10^{10^9}-1}",
    "deep fractions": "\\boxed{" + "\\frac{1}{" * 200 + "2" + "}" * 200 + "}",
    "deep parentheses": "\\boxed{" + "(" * 20_000 + "1" + ")" * 20_000 + "}",
    "a million digits": "\\boxed{" + "7" * 10**6 + "}",
    "a megabyte without a box": "so $x = " + "1 + " * 250_000 + "1$",
    "not text": "\x00\ufffd\\boxed{\x00}",
}


@pytest.mark.slow
def test_no_answer_hangs_or_crashes_the_graders(capfd):
    """The default is to end a run when a reward function fails: not when it is the answer's fault."""
    good = ("12", "\\boxed{12}")
    rows = [row for text in BOMBS.values() for row in (("12", text), good)]
    groups = groups_of(rows)
    with RewardPool(RewardSection(kind="math", timeout_s=8)) as pool:
        pool.score(groups)
        got = [g.samples[0].reward for g in groups]
        assert got[::2] == [0.0] * len(BOMBS) and pool.failures >= 1
        again = groups_of([good])
        pool.score(again)
    assert again[0].samples[0].reward == 1.0
    assert sum(got[1::2]) >= len(BOMBS) - 1, "answers beside the bombs suffered"


EATER = """
import resource
def eat(response, label):
    return float(len(bytearray(int(response) << 20)) > 0)
def limit(response, label):
    return resource.getrlimit(resource.RLIMIT_AS)[0] >> 20
"""


def test_memory_is_limited_hard(tmp_path, monkeypatch):
    (tmp_path / "eater.py").write_text(EATER)
    monkeypatch.chdir(tmp_path)
    groups = groups_of([("", "8"), ("", "4000"), ("", "8"), ("", "4000"), ("", "8")])
    with RewardPool(RewardSection(kind="eater:eat", memory_mib=1000, on_error="zero"), workers=1) as pool:
        pool.score(groups)
        assert [g.samples[0].reward for g in groups] == [1, 0, 1, 0, 1] and pool.failures == 2
    free = groups_of([("", "x")])
    with RewardPool(RewardSection(kind="eater:limit", memory_mib=0), workers=1) as pool:
        pool.score(free)
    assert free[0].samples[0].reward == resource.getrlimit(resource.RLIMIT_AS)[0] >> 20


def test_maths_process_has_the_limit():
    with RewardPool(RewardSection(kind="math"), workers=1) as pool:
        pid = pool._workers[0].process.pid
        assert resource.prlimit(pid, resource.RLIMIT_AS)[0] == MATH_MEMORY_MIB << 20
