import io
import re

import pytest
from rich.console import Console

from fp8slurm.observe import console as module
from fp8slurm.observe.console import Display, clock, format_duration, format_line, why_no_update

RECORD = {
    "phase": "rl", "step": 7, "reward/mean": 0.51234, "eval/accuracy": 0.4, "gap/mean_abs": 0.0123, "grad_norm": 0.5,
    "throughput/tokens_per_s": 2345.6, "time/rollout": 1.5, "time/train": 2.0, "time/step": 4.25, "loss": None,
}  # fmt: skip
WHOLE = RECORD | {"loss": -0.0123, "time/logprobs": 0.4, "time/sync": 0.3, "time/eval": 1.0, "time/checkpoint": 0.2}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_durations():
    assert [format_duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]


def test_a_line_has_what_the_record_has():
    assert format_line(RECORD, 100) == (
        "rl 7/100  reward 0.512  held-out 0.400  gap |d| 1.2e-02  grad norm 0.50  tokens/s 2,346  "
        "4.2 s (rollout 1.5 train 2.0)"
    )
    assert format_line({"phase": "sft", "step": 1}, 5) == "sft 1/5"


@pytest.mark.parametrize(
    "figures, why",
    [
        ({"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0}, ""),
        ({"skipped": 1.0, "rollout/groups": 0}, "no signal"),
        ({"skipped": 1.0, "rollout/groups": 3}, "no sample"),
        ({"skipped": 1.0, "loss": None, "grad_norm": None}, "NaN/inf"),
        ({"skipped": 1.0, "loss": 0.1, "grad_norm": None}, "NaN/inf"),
        ({"skipped": 1.0, "loss": 0.1, "grad_norm": 0.2}, "part NaN/inf"),
    ],
)
def test_a_step_without_an_update_says_why(figures, why):
    record = {"phase": "rl", "step": 1, "time/step": 2.0} | figures
    assert why_no_update(record) == why
    assert (f"no update: {why}" in format_line(record, 9)) == bool(why)
    display = Display("tiny", {"rl": 9}, io.StringIO())
    display.update(record)
    assert ("no update" in rendered(display, 80)) == bool(why) and why in rendered(display, 80)


def test_a_clock_says_the_day_where_it_is_another():
    now = 1_796_000_000.0
    shown = [clock(now + hours * 3600, now) for hours in (0, 24, 24 * 30)]
    assert re.fullmatch(r"\d\d:\d\d", shown[0]) and re.fullmatch(r"[A-Z]\w+ \d\d:\d\d", shown[1])
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", shown[2])


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(module, "stamp", lambda: "12:34:56")
    stream = io.StringIO()
    with Display("tiny", {"sft": 5, "rl": 7}, stream) as display:
        display.history([RECORD | {"step": 5}, RECORD | {"step": 6}])
        for text in ("starting engines", "starting engines", "first update"):
            display.status(text)
        display.note("engine ready")
        display.update({"phase": "sft", "step": 1, "loss": 2.0})
        display.update(RECORD)
    assert stream.getvalue().splitlines() == [
        "12:34:56  rl 6/7 recorded before this", "12:34:56  starting engines", "12:34:56  first update", "engine ready",
        "12:34:56  sft 1/5  loss 2.0000", f"12:34:56  {format_line(RECORD, 7)}",
    ]  # fmt: skip


def test_a_line_says_when_the_run_will_be_done():
    stream = io.StringIO()
    Display("tiny", {"rl": 100}, stream).update(RECORD)
    assert re.search(r"  done \d\d:\d\d$|  done \w{3} \d\d:\d\d$", stream.getvalue().strip())


def rendered(display, width=200):
    out = io.StringIO()
    Console(file=out, width=width).print(display.render())
    return out.getvalue()


@pytest.mark.parametrize("width, there, gone", [(200, "checkpoint s", "nothing"), (80, "tokens/s", "checkpoint s")])
def test_the_table_fits_the_terminal(width, there, gone):
    """No line is wrapped or cut; a narrow terminal does without the least important columns."""
    display = Display("qwen3-30b-a3b-fp8", {"rl": 2000}, io.StringIO())
    for step in range(1001, 1013):
        why = {"skipped": 1.0, "rollout/groups": 0} if step == 1005 else {}
        display.update(WHOLE | {"step": step} | why)
    lines = rendered(display, width).splitlines()
    assert len(lines) == 15 and max(map(len, lines)) <= width, lines
    assert there in lines[0] and gone not in lines[0] and "rl 1012" in lines[12] and "\u2026" not in "".join(lines)


def test_the_table_with_progress_and_time_left():
    display = Display("tiny", {"sft": 5, "rl": 100}, io.StringIO())
    assert display.remaining_s() is None and "starting" in rendered(display)
    display.update({"phase": "sft", "step": 4, "time/step": 99.0})
    assert "about 1:39 left of sft\n" in rendered(display)  # RL follows: the run is not done then
    for step in range(1, 31):
        display.update(RECORD | {"step": step, "eval/accuracy": 0.4 if step == 10 else None})
    display.status("rollout [12/32]")
    text = rendered(display)
    assert "reward" in text and "rl 30" in text and "rl 19" in text and "rl 18" not in text
    assert "30/100" in text and "held-out accuracy 0.400" in text and "rollout [12/32]" in text
    assert display.remaining_s() == 70 * 4.25  # the supervised steps' time is forgotten
    assert "about 4:58 left, done " in text


def test_a_terminal_gets_the_live_table():
    stream = Terminal()
    display = Display("tiny", {"rl": 100}, stream)
    display.console = Console(file=stream, force_terminal=True, width=160)
    display._live.console = display.console
    with display:
        display.update(RECORD)
        display.note("engine ready")
    assert "engine ready" in stream.getvalue() and "7/100" in stream.getvalue()
