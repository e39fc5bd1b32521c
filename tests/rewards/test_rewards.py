import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rewards.pool import RewardError, RewardPool, digits, exact

USER_MODULE = """
import math, os, sys, time
print("noise on stdout at import")

def length(response, label):
    print("noise on stdout")
    return len(response) + len(label)

def by_text(response, label):
    if response == "raise": raise KeyError("no such thing")
    if response == "exit": sys.exit(3)
    if response == "die": os._exit(7)
    if response == "hang": time.sleep(600)
    if response == "nan": return math.nan
    if response == "inf": return float("inf")
    if response == "text": return "good"
    if response == "none": return None
    return 1

def pid(response, label):
    return os.getpid()

def hang_with_child(response, label):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(label, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)

number = 3
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)


def group(*texts, index=0, label="x"):
    samples = [Sample([], [], [], "stop", text=t, reward=-5.0) for t in texts]
    return SampleGroup(Prompt(index, (1,), label), samples)


def rewards(groups):
    return [[s.reward for s in g.samples] for g in groups]


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] == "Z"  # killed, its parent has yet to notice
    except FileNotFoundError:
        return True


def wait_gone(*pids):
    end = time.monotonic() + 20
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.05)
    return all(map(gone, pids))


def test_exact():
    assert exact("64\n", "64") == 1
    assert exact("46", "64") == exact("", "64") == 0


def test_digits():
    assert digits("231", "231", 0.5) == 1
    assert digits("201", "231", 0.5) == pytest.approx(0.5 * 2 / 3)
    assert digits("23", "231", 0.5) == pytest.approx(0.5 * 2 / 3)
    assert digits("2315", "231", 0.5) == pytest.approx(0.5 * 3 / 4)
    assert digits("", "231", 0.5) == 0
    assert digits("201", "231", 0.0) == 0
    assert digits("201", "231", 1.0) == pytest.approx(2 / 3)


def test_own_rewards_start_no_process():
    groups = [group("64", "65", label="64"), group("1", label="1")]
    with RewardPool(RewardSection(kind="exact")) as pool:
        pool.score(groups)
        assert rewards(groups) == [[1, 0], [1]] and pool._workers == []
    with RewardPool(RewardSection(kind="digits", digits_weight=0.4)) as pool:
        pool.score(groups)
    assert rewards(groups) == [[1, pytest.approx(0.2)], [1]]


def test_math():
    groups = [
        group("so the answer is $\\frac{1}{2}$", "0.5", "\\boxed{0.25}", "", label="\\frac{1}{2}"),
        group("\\boxed{12}", "it is 12.", "13", label="12"),
    ]
    with RewardPool(RewardSection(kind="math", timeout_s=60), workers=1) as pool:
        pool.score(groups)
    assert rewards(groups) == [[1, 1, 0, 0], [1, 1, 0]]


def test_a_users_function_whose_prints_do_no_harm():
    groups = [group("a", "bb" * 100_000, "é\n", label="12"), group(*[str(i) for i in range(50)], label="")]
    with RewardPool(RewardSection(kind="my_rewards:length")) as pool:
        pool.score(groups)
        pool.score([])
    assert rewards(groups) == [[3, 200_002, 4], [len(str(i)) for i in range(50)]]


FAILURES = {
    "raise": "KeyError: 'no such thing'",
    "exit": "SystemExit: 3",
    "die": "its process ended with status 7",
    "hang": "no answer within 2 s (reward.timeout_s)",
    "nan": "returned nan",
    "inf": "returned inf",
    "text": "returned 'good' (str), not a number",
    "none": "returned None (NoneType), not a number",
}


def test_each_failure_is_an_error_that_names_it():
    with RewardPool(RewardSection(kind="my_rewards:by_text", timeout_s=2), workers=1) as pool:
        for text, reason in FAILURES.items():
            with pytest.raises(RewardError) as error:
                pool.score([group("fine", text, index=17)])
            assert f"reward function my_rewards:by_text on prompt 17, sample 1: {reason}. " in str(error.value)
        after = group("fine")
        pool.score([after])
        assert rewards([after]) == [[1]]


def test_or_each_failure_counts_as_zero(caplog):
    texts = [t for failure in FAILURES for t in (failure, "fine")]
    groups = [group(*texts, index=3)]
    with RewardPool(RewardSection(kind="my_rewards:by_text", timeout_s=2, on_error="zero")) as pool:
        pool.score(groups)
        assert pool.failures == len(FAILURES)
    assert rewards(groups) == [[0, 1] * len(FAILURES)]
    assert "on prompt 3, sample 0: KeyError: 'no such thing'; counted as 0" in caplog.text
    assert f"failed {len(FAILURES)} times" in caplog.text


def test_maths_failures_are_the_responses_and_end_no_run():
    for kind, on_error, counted in (
        ("math", "error", True),
        ("my_rewards:by_text", "zero", True),
        ("my_rewards:by_text", "error", False),
    ):
        pool = RewardPool(RewardSection(kind=kind, on_error=on_error), workers=0)
        with nullcontext() if counted else pytest.raises(RewardError, match="sample 0: no answer"):
            pool._fail(group("x"), 0, "no answer", 1)
        assert pool.failures == int(counted)


def test_a_killed_call_takes_its_children_with_it(tmp_path):
    groups = [group("a", label=str(tmp_path / "pids"))]
    with RewardPool(RewardSection(kind="my_rewards:hang_with_child", timeout_s=3), workers=1) as pool:
        with pytest.raises(RewardError, match="no answer"):
            pool.score(groups)
    assert wait_gone(*(tmp_path / "pids").read_text().split())


def test_processes_are_kept_and_end_with_the_pool():
    groups = [group(*"abcdefgh")]
    with RewardPool(RewardSection(kind="my_rewards:pid"), workers=2) as pool:
        pool.score(groups)
        pids = {int(r) for r in rewards(groups)[0]}
        assert pids <= {w.process.pid for w in pool._workers} and os.getpid() not in pids
        assert not any(map(gone, pids))
    assert wait_gone(*pids)


def test_a_hanging_call_ends_with_its_parent_even_when_that_is_killed(tmp_path):
    script = """
from fp8slurm.config.schema import RewardSection
from fp8slurm.rewards.pool import RewardPool
from fp8slurm.core.types import Prompt, Sample, SampleGroup
pool = RewardPool(RewardSection(kind="my_rewards:by_text", timeout_s=600), workers=1)
print(pool._workers[0].process.pid, flush=True)
pool.score([SampleGroup(Prompt(0, (1,), ""), [Sample([], [], [], "stop", text="hang")])])
"""
    path = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_gone(worker)


@pytest.mark.parametrize("kind", ["exacts", "module:", ":f", ""])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="not one of exact, numeric, choice, digits, math, module:function"):
        RewardPool(RewardSection(kind=kind))


@pytest.mark.parametrize("kind", ["no_such_module:f", "my_rewards:no_such_function", "my_rewards:number"])
def test_a_function_that_cannot_be_loaded_is_refused(kind):
    with pytest.raises(ValueError, match=f"'{kind}' cannot be loaded: "):
        RewardPool(RewardSection(kind=kind), workers=1)


@pytest.mark.parametrize("kind", ["math", "mine:f"])
def test_files_of_the_working_folder_are_nobodys_modules_but_the_users(tmp_path, monkeypatch, kind: str) -> None:
    """`python -m` would look there first for everything that the worker imports."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('not meant for you')")
    (tmp_path / "mine.py").write_text("def f(response, label): return 1.0")
    monkeypatch.chdir(tmp_path)
    with RewardPool(RewardSection(kind=kind), workers=1) as pool:
        group = SampleGroup(Prompt(0, (), "4"), [Sample([], [], [], "stop", text="\\boxed{4}")])
        pool.score([group])
        assert group.samples[0].reward == 1
