import io

from rich.console import Console

from fp8slurm.observe.console import Display, format_duration, format_line

RECORD = {
    "phase": "rl", "step": 7, "reward/mean": 0.51234, "eval/accuracy": 0.4, "gap/mean_abs": 0.0123, "grad_norm": 0.5,
    "throughput/tokens_per_s": 2345.6, "time/rollout": 1.5, "time/train": 2.0, "time/step": 4.25, "loss": None,
}  # fmt: skip


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


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with Display("tiny", {"sft": 5, "rl": 100}, stream) as display:
        display.status("not shown")
        display.note("engine ready")
        display.update({"phase": "sft", "step": 1, "loss": 2.0})
        display.update(RECORD)
    assert stream.getvalue().splitlines() == ["engine ready", "sft 1/5  loss 2.0000", format_line(RECORD, 100)]


def rendered(display):
    out = io.StringIO()
    Console(file=out, width=200).print(display.render())
    return out.getvalue()


def test_the_table_with_progress_and_time_left():
    display = Display("tiny", {"sft": 5, "rl": 100}, io.StringIO())
    assert display.remaining_s() is None and "starting" in rendered(display)
    display.update({"phase": "sft", "step": 5, "time/step": 99.0})
    for step in range(1, 31):
        display.update(RECORD | {"step": step, "eval/accuracy": 0.4 if step == 10 else None})
    display.status("rollout [12/32]")
    text = rendered(display)
    assert "reward" in text and "rl 30" in text and "rl 19" in text and "rl 18" not in text
    assert "30/100" in text and "held-out accuracy 0.400" in text and "rollout [12/32]" in text
    assert display.remaining_s() == 70 * 4.25  # the supervised steps' time is forgotten
    assert "about 4:58 left" in text


def test_a_terminal_gets_the_live_table():
    stream = Terminal()
    display = Display("tiny", {"rl": 100}, stream)
    display.console = Console(file=stream, force_terminal=True, width=160)
    display._live.console = display.console
    with display:
        display.update(RECORD)
        display.note("engine ready")
    assert "engine ready" in stream.getvalue() and "7/100" in stream.getvalue()
