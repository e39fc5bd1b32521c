import json
import math

import pytest
import torch

from fp8slurm.observe.metrics import MetricsTail, MetricsWriter, column, position, read_metrics, without_times


def write(path, *positions, resume_at=None, **values):
    with MetricsWriter(path, resume_at) as writer:
        for phase, step in positions:
            writer.write({"phase": phase, "step": step, **values})


def positions(path):
    return [position(r) for r in read_metrics(path)]


RUN = [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 0), ("rl", 1), ("rl", 2), ("rl", 3)]


def test_records_come_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    record = {"phase": "rl", "step": 1, "loss": 0.1 + 0.2, "tokens": 7, "note": "x"}
    with MetricsWriter(path) as writer:
        writer.write(record)
        assert read_metrics(path) == [record]  # on disk before the file is closed
        writer.write({"phase": "rl", "step": 2, "loss": torch.tensor(0.5), "a": math.nan, "b": torch.tensor(math.inf)})
    assert read_metrics(tmp_path / "run")[1] == {"phase": "rl", "step": 2, "loss": 0.5, "a": None, "b": None}
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("at", range(len(RUN)))
def test_a_resumed_run_has_no_holes_and_no_repeats(tmp_path, at):
    path = tmp_path / "metrics.jsonl"
    write(path, *RUN)
    write(path, *RUN[at + 1 :], resume_at=RUN[at], again=1)
    assert positions(path) == RUN
    assert [r.get("again") for r in read_metrics(path)] == [None] * (at + 1) + [1] * (len(RUN) - at - 1)


def test_resuming_where_no_record_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, ("rl", 1), resume_at=("rl", 0))
    assert positions(path) == [("rl", 1)]
    write(path, ("rl", 2), resume_at=("rl", 1))
    write(path, ("sft", 1), resume_at=("sft", 0))
    assert positions(path) == [("sft", 1)]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *RUN)
    write(path, ("sft", 1))
    assert positions(path) == [("sft", 1)]


@pytest.mark.parametrize("torn", [b'{"phase": "rl", "st', b'{"phase": "rl", "step": 4}', b"\x00\x00\n", b"{}\n"])
def test_a_torn_last_line_is_ignored_and_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write(path, *RUN)
    with open(path, "ab") as f:
        f.write(torn)
    assert positions(path) == RUN
    write(path, ("rl", 4), resume_at=("rl", 3))
    assert positions(path) == [*RUN, ("rl", 4)]
    assert len(path.read_bytes().splitlines()) == len(RUN) + 1


def test_a_broken_line_before_the_last_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, ("rl", 1), ("rl", 2))
    path.write_bytes(b"garbage\n" + path.read_bytes())
    for use in (read_metrics, lambda p: MetricsWriter(p, ("rl", 2))):
        with pytest.raises(ValueError, match="metrics.jsonl:1 is not a metrics record"):
            use(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "other")


def test_steps_only_go_up(tmp_path):
    for later, earlier in ((("rl", 2), ("rl", 2)), (("rl", 0), ("sft", 9)), (("sft", 2), ("sft", 1))):
        with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
            writer.write({"phase": later[0], "step": later[1]})
            with pytest.raises(AssertionError):
                writer.write({"phase": earlier[0], "step": earlier[1]})
    with pytest.raises(ValueError, match="'eval' is not one of sft, rl"):
        write(tmp_path / "metrics.jsonl", ("rl", 1), ("eval", 1))


def test_columns_and_what_two_deterministic_runs_share(tmp_path):
    records = [
        {"phase": "sft", "step": 1, "loss": 9.0},
        {"phase": "rl", "step": 1, "loss": 1.0, "time/step": 3.0, "throughput/tokens_per_s": 5.0},
        {"phase": "rl", "step": 2, "loss": None},
        {"phase": "rl", "step": 3},
        {"phase": "rl", "step": 4, "loss": 4.0},
        {"phase": "rl", "step": 5, "loss": 0.0},
    ]
    assert column(records, "loss") == ([1, 4, 5], [1.0, 4.0, 0.0])
    assert column(records, "loss", "sft") == ([1], [9.0])
    assert without_times(records[1]) == {"phase": "rl", "step": 1, "loss": 1.0}


def test_the_tail_follows_what_is_complete(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.poll() == []
    write(path, *RUN)
    with open(path, "ab") as f:
        f.write(b'{"phase": "rl", ')
    assert [position(r) for r in tail.poll()] == RUN
    assert tail.poll() == []
    with open(path, "ab") as f:
        f.write(b'"step": 4}\n')
    assert [position(r) for r in tail.poll()] == [("rl", 4)]
    with MetricsWriter(path, ("rl", 1)) as writer:
        assert tail.poll() == []
        writer.write({"phase": "rl", "step": 2, "again": 1})
    assert tail.poll() == [{"phase": "rl", "step": 2, "again": 1}]


def test_the_tail_goes_on_behind_a_file_that_was_cut_back_and_has_grown_past_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    write(path, ("rl", 1), ("rl", 2))
    assert len(tail.poll()) == 2
    path.write_text(json.dumps({"phase": "rl", "step": 1, "longer": "x" * 200}) + '\n{"phase": "rl", "step": 2}\n')
    assert tail.poll() == [{"phase": "rl", "step": 2}]
