"""Several sources of prompts: who comes when, and where each is read on."""

import json
import logging
from collections import Counter
from fractions import Fraction
from functools import partial

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8slurm.config.schema import DataSection
from fp8slurm.data.prompts import PromptOrder, load_tokenizer
from fp8slurm.data.sources import MixedOrder, cycle_of, training_sources
from fp8slurm.rewards.graders import label_error


def shares(*weights):
    return [Fraction(str(w)) for w in weights]


def test_the_pattern_is_spread_and_exact():
    assert cycle_of(shares(3, 1)) == [0, 0, 1, 0]
    assert cycle_of(shares(0.5, 0.25, 0.25)) == [0, 1, 2, 0]
    assert Counter(cycle_of(shares(0.7, 0.3))) == {0: 7, 1: 3}
    with pytest.raises(
        ValueError, match="weights 1, 0.33333 are the shares 100000, 33333, a pattern of 133333 prompts"
    ):
        cycle_of(shares(1, 0.33333))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    weights=st.data(),
    cuts=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    shuffle=st.booleans(),
)
def test_a_resume_goes_on_where_it_was_and_every_source_runs_through(sizes, weights, cuts, shuffle):
    """The cursor is all that is kept: any cut into parts gives the same prompts, and each source its own order."""
    chosen = weights.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    whole, end = MixedOrder(sizes, shares(*chosen), 7, shuffle).take(0, sum(cuts))
    cursor, parts = 0, []
    for k in cuts:
        part, cursor = MixedOrder(sizes, shares(*chosen), 7, shuffle).take(cursor, k)
        parts += part
    assert parts == whole and cursor == end == sum(cuts)
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    for source, (start, n) in enumerate(zip(first, sizes)):
        own = [p - start for p in whole if start <= p < start + n]
        assert own == PromptOrder(n, 7, shuffle, source).take(0, len(own))[0]


def test_sources_have_orders_of_their_own_and_the_first_that_of_a_single_file():
    orders = [PromptOrder(50, 3, True, source).take(0, 50)[0] for source in range(3)]
    assert orders[0] == PromptOrder(50, 3).take(0, 50)[0] and len({tuple(o) for o in orders}) == 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return load_tokenizer(folder)


def test_each_source_has_its_keys_its_reward_and_its_name(tmp_path, tokenizer, caplog):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(json.dumps({"prompt": "1+1=", "label": "2", "hint": "even"}) + "\n")
    b.write_text(json.dumps({"q": "3?", "reward_model": {"ground_truth": "none"}}) + "\n")
    data = DataSection.model_validate(
        {"sources": {
            "a": {"file": a, "weight": 3},
            "b": {"file": b, "prompt_key": "q", "label_key": "reward_model.ground_truth", "reward": "exact"},
        }}
    )  # fmt: skip
    first, second = training_sources(data, "numeric")
    assert [(s.name, s.reward, s.weight) for s in (first, second)] == [("a", "numeric", 3), ("b", "exact", 1)]
    (prompt,), (other,) = (s.load(tokenizer, label_error) for s in (first, second))
    assert (prompt.source, prompt.row["hint"]) == ("a", "even")
    assert (other.source, other.label, other.index) == ("b", "none", 0)
    (strict,) = training_sources(data.model_copy(update={"sources": {"b": data.sources["b"]}}), "numeric")
    with pytest.raises(ValueError, match="b.jsonl:1: the label 'none' has no number"):
        partial(strict.load, tokenizer)(lambda kind, label: label_error("numeric", label))
    with pytest.raises(ValueError, match=r"--data.train .* and data.sources \(a, b\)"):
        training_sources(data.model_copy(update={"train": a}), "exact")
    assert caplog.get_records("call") == [] or all(r.levelno < logging.WARNING for r in caplog.records)
