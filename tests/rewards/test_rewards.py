import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from fp8slurm.config.schema import RewardSection
from fp8slurm.core.types import Prompt, Sample, SampleGroup
from fp8slurm.rewards.pool import RewardError, RewardPool, digits, exact
from fp8slurm.rewards.pools import RewardPools

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
    if response == "huge": return 10**400
    if response == "garble":
        for fd in range(3, 20):
            try: os.write(fd, b'{"number": 0, "reward": NaN}\\n')
            except OSError: pass
        time.sleep(600)
    return 1

def pid(response, label):
    return os.getpid()

def hang_with_child(response, label):
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open(label, "w").write(f"{os.getpid()} {child.pid}")
    time.sleep(600)

number = 3

def all_of_it(response, label, prompt, row, prompt_ids, response_ids, finish_reason, source):
    asked = [m["content"] for m in prompt]
    assert (asked, row["extra"], prompt_ids, source) == (["1+1="], {"level": 3}, [1], "sums")
    return len(response_ids), {"cut": finish_reason == "length", "level": row["extra"]["level"]}

def own_names(text, answer, row):
    return float(text == answer) + row["extra"]["level"]

def ranked(responses, label, finish_reasons):
    return [sorted(responses).index(r) / 10 + (f == "length") for r, f in zip(responses, finish_reasons)]

def one_short(responses):
    return [0.0] * (len(responses) - 1)

def bad_in_the_middle(responses):
    return [float("nan") if r == "nan" else 1 for r in responses]

running = most = 0

async def together(response):
    import asyncio
    if response == "hang": await asyncio.sleep(600)
    if response == "block": time.sleep(600)
    if response == "raise": raise ValueError("no")
    if response == "timeout": raise TimeoutError("the judge's")
    await asyncio.sleep(0.05)
    return 1

eight = None

async def eight_at_a_time(response):
    # ends when eight have run at the same time
    import asyncio
    global running, most, eight
    eight = eight or asyncio.Event()
    running += 1
    most = max(most, running)
    if running == 8: eight.set()
    await eight.wait()
    await asyncio.sleep(0)
    running -= 1
    return os.getpid(), {"most": most}

async def together_in_groups(responses, label):
    return [len(r) for r in responses]

class Judge:
    async def __call__(self, response): return 2
judge = Judge()

def parts(response):
    return 1, {"nan": {"a": math.nan}, "name": {"a b": 1}, "text": {"a": "x"}, "list": [1], "fine": {}}[response]

def masks(response, response_ids):
    mask = {"short": [1], "text": "10", "two": [0, 2]}.get(response, [i % 2 == 0 for i in range(len(response_ids))])
    return 1, {}, mask

def wrong_third(response, label, tokens): return 0
def shifted(text, row): return 0
def mixed(response, responses): return 0
def first_and_all(text, answer, responses): return 0
def optional(response, label, *, scale=2.0, row=None, **more): return scale * len(row["extra"])
def constant(): return 0.25
def anything(*args): return len(args)
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
    "huge": "returned 1000",
    "garble": "something else than its answer was written where that goes: ",
}


def test_each_failure_is_an_error_that_names_it():
    with RewardPool(RewardSection(kind="my_rewards:by_text", timeout_s=2), workers=1) as pool:
        for text, reason in FAILURES.items():
            with pytest.raises(RewardError) as error:
                pool.score([group("fine", text, index=17)])
            assert f"reward function my_rewards:by_text on prompt 17, sample 1: {reason}" in str(error.value)
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


def scored(function, groups, **settings):
    with RewardPool(RewardSection(kind=f"my_rewards:{function}", timeout_s=60, **settings), workers=2) as pool:
        pool.score(groups)
    return rewards(groups)


def full_group(*responses):
    samples = [Sample([7] * len(r), [], [], "length" if "!" in r else "stop", text=r) for r in responses]
    prompt = Prompt(4, (1,), "2", content=[{"role": "user", "content": "1+1="}], row={"extra": {"level": 3}})
    return SampleGroup(replace(prompt, source="sums"), samples)


def test_a_function_is_handed_what_it_asks_for_by_name():
    group = full_group("2", "no!")
    assert scored("all_of_it", [group]) == [[1, 3]]
    assert [s.parts for s in group.samples] == [{"cut": 0.0, "level": 3.0}, {"cut": 1.0, "level": 3.0}]
    assert scored("own_names", [full_group("2", "3")]) == [[4, 3]]
    assert scored("optional", [full_group("2")]) == [[2]]
    assert scored("constant", [full_group("2")]) == [[0.25]]
    assert scored("anything", [full_group("2")]) == [[2]]


def test_one_call_for_all_samples_of_a_prompt():
    assert scored("ranked", [full_group("c", "a", "b!"), full_group("z")]) == [[0.2, 0, 1.1], [0]]
    with pytest.raises(RewardError, match="on prompt 4 of source sums, sample 0: returned 2 rewards for 3 samples"):
        scored("one_short", [full_group("c", "a", "b")])
    with pytest.raises(RewardError, match="on prompt 4 of source sums, sample 1: returned nan"):
        scored("bad_in_the_middle", [full_group("c", "nan")])
    assert scored("bad_in_the_middle", [full_group("c", "nan"), full_group("c")], on_error="zero") == [[1, 0], [1]]


def test_each_source_is_scored_by_its_own_reward():
    groups = [full_group("2", "no") for _ in range(3)]
    for of_source, name in zip(groups, "aba"):
        of_source.prompt = replace(of_source.prompt, source=name)
    pools = RewardPools(RewardSection(kind="exact"), {"a": "my_rewards:length", "b": "exact"}, 1)
    pools.score(groups)
    assert rewards(groups) == [[2, 3], [1, 0], [2, 3]] and pools.failures == 0 and len(pools._pools) == 2
    pools.close()
    with pytest.raises(ValueError, match="my_rewards:mixed"):
        RewardPools(RewardSection(), {"a": "my_rewards:length", "b": "my_rewards:mixed"}, 1)


def test_async_calls_share_one_process():
    groups = [full_group(*"abcdefghij") for _ in range(3)]
    (pids,) = {tuple(of_group) for of_group in scored("eight_at_a_time", groups, concurrency=8)}
    assert len(set(pids)) == 1
    assert max(s.parts["most"] for g in groups for s in g.samples) == 8
    assert scored("together_in_groups", [full_group("a", "bb")]) == [[1, 2]]
    assert scored("judge", [full_group("a")]) == [[2]]


def test_an_async_call_that_fails_costs_no_other():
    said = {"raise": "ValueError: no", "timeout": "TimeoutError: the judge's", "hang": "no answer within 3 s (reward."}
    for text, reason in said.items():
        group, more = full_group("a", text, "b", "c"), full_group("d")
        with RewardPool(RewardSection(kind="my_rewards:together", timeout_s=3, on_error="zero")) as pool:
            pool.score([group, more])
            assert [s.reward > 0 for s in group.samples] == [True, False, True, True] and more.samples[0].reward > 0
            assert pool.failures == 1
        with RewardPool(RewardSection(kind="my_rewards:together", timeout_s=3)) as pool:
            with pytest.raises(RewardError) as error:
                pool.score([full_group("a", text, "b")])
            assert f"on prompt 4 of source sums, sample 1: {reason}" in str(error.value)


def test_an_async_function_that_blocks_is_named():
    """Nobody can say which of the calls at that time it was."""
    with RewardPool(RewardSection(kind="my_rewards:together", timeout_s=2, concurrency=3, on_error="zero")) as pool:
        groups = [full_group("a", "block", "b"), full_group("c")]
        pool.score(groups)
        assert [s.reward > 0 for g in groups for s in g.samples] == [False] * 3 + [True] and pool.failures == 3
        pool.reward = pool.reward.model_copy(update={"on_error": "error"})
        with pytest.raises(RewardError, match="no answer within 2 s: an async function must not block"):
            pool.score(groups)


@pytest.mark.parametrize(
    "text, says",
    [("nan", "nan as its part 'a'"), ("name", "a part named 'a b'"), ("text", "'x' as"), ("list", "parts [1], which")],
)
def test_parts_are_names_and_finite_numbers(text, says):
    with pytest.raises(RewardError) as error:
        scored("parts", [full_group("fine", text)])
    assert says in str(error.value)


def test_a_loss_mask_has_a_truth_value_for_each_token():
    group = full_group("abc", "")
    assert scored("masks", [group]) == [[1, 1]]
    assert [s.loss_mask for s in group.samples] == [[True, False, True], []]
    for text, says in (
        ("short", "a loss mask of 1 for 5 response_ids"), ("text", "the loss mask '10'"), ("two", "mask [0, 2]"),
    ):  # fmt: skip
        with pytest.raises(RewardError) as error:
            scored("masks", [full_group(text)])
        assert says in str(error.value)


@pytest.mark.parametrize(
    "function, says",
    [
        ("wrong_third", "there is nothing for its parameter 'tokens'; allowed: response, response_ids, finish_reason,"),
        ("shifted", "there is nothing for its parameter 'text'"),
        ("mixed", "it asks for 'response' of one sample and for 'responses' of all samples"),
        ("first_and_all", "there is nothing for its parameter 'responses'"),
    ],
)  # fmt: skip
def test_a_signature_that_cannot_be_served_is_refused_before_anything_is_scored(function, says):
    with pytest.raises(ValueError) as error:
        RewardPool(RewardSection(kind=f"my_rewards:{function}"), workers=1)
    assert says in str(error.value)


@pytest.mark.parametrize("kind", ["exacts", "module:", ":f", ""])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="not one of exact, numeric, choice, digits, math, generate, module:function"):
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
