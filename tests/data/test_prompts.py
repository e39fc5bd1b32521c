import json
import logging
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import tiny

from fp8slurm.config.schema import DataSection, SftSection
from fp8slurm.data import prompts as data_module
from fp8slurm.data.prompts import (
    PromptOrder,
    encode,
    end_token_ids,
    load_prompts,
    load_sft,
    load_tokenizer,
    unlisted_ends,
)
from fp8slurm.rewards.graders import label_error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return load_tokenizer(model)


def user(text):
    return [{"role": "user", "content": text}]


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_messages_get_the_template_and_text_does_not(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": user("12+34="), "label": "64"}, {"prompt": "12+34=", "label": 64})
    templated, plain = load_prompts(DataSection(), tokenizer, path)
    assert tokenizer.decode(templated.token_ids) == "<|im_start|>user\n12+34=<|im_end|>\n<|im_start|>assistant\n"
    assert len(templated.token_ids) == 14
    assert tokenizer.decode(plain.token_ids) == "12+34="
    assert [(p.index, p.label) for p in (templated, plain)] == [(0, "64"), (1, "64")]
    assert templated.content == user("12+34=") and plain.content == "12+34="
    assert plain.row == {"prompt": "12+34=", "label": 64}


def test_chat_template_kwargs_reach_the_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": user("1"), "label": "1"})
    data = DataSection(chat_template_kwargs={"enable_thinking": False})
    (prompt,) = load_prompts(data, tokenizer, path)
    assert tokenizer.decode(prompt.token_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="add_generation_prompt"):
        load_prompts(DataSection(chat_template_kwargs={"add_generation_prompt": False}), tokenizer, path)


def test_a_prompt_knows_that_it_opens_the_thinking(tmp_path, tokenizer):
    ends = {"1": False, "1<think>\n": True, "1<think>": True, "1<think>\n\n</think>\n\n": False, "<think>1": False}
    path = write(tmp_path / "a.jsonl", *({"prompt": text, "label": "1"} for text in ends))
    assert [p.thinking for p in load_prompts(DataSection(), tokenizer, path)] == list(ends.values())


def test_parquet_equals_jsonl(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": user(f"{a}+1="), "a": str(a + 1)} for a in range(5)]
    data = DataSection(prompt_key="q", label_key="a")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = load_prompts(data, tokenizer, write(tmp_path / "a.jsonl", *rows))
    assert load_prompts(data, tokenizer, tmp_path / "a.parquet") == expected
    assert len(expected) == 5


def test_an_empty_prompt_is_left_out(tmp_path, tokenizer):
    """No token would predict its response's first."""
    path = write(tmp_path / "a.jsonl", {"prompt": "", "label": "x"}, {"prompt": "1", "label": "y"})
    assert [p.label for p in load_prompts(DataSection(), tokenizer, path)] == ["y"]


def test_no_text_is_lost_between_calls_of_the_tokenizer_and_none_gets_another_beginning(monkeypatch):
    """The chat template is applied already: a tokenizer that puts a token of its own in front must not."""
    monkeypatch.setattr(data_module, "TEXTS_PER_CALL", 2)

    def tokenizer(texts, add_special_tokens=True):
        return {"input_ids": [[1] * add_special_tokens + [ord(c) for c in text] for text in texts]}

    assert encode(tokenizer, ["a", "bc", "d", "e", "f"]) == [[97], [98, 99], [100], [101], [102]]


def test_only_the_first_rows_are_read_where_so_many_are_asked_for(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(i), "label": "", "response": ""} for i in range(3)), "torn")
    assert [p.index for p in load_prompts(DataSection(), tokenizer, path, limit=2)] == [0, 1]
    assert len(load_sft(DataSection(), SftSection(data=tmp_path / "other"), tokenizer, path, limit=3)) == 3


def test_a_prompt_of_any_length_is_left_out_without_being_tokenized(tmp_path, tokenizer, caplog, monkeypatch):
    """100 MB took minutes; what is certainly too long by its characters never reaches the tokenizer."""
    row = {"prompt": "12+34=" * 2_000_000, "label": "1"}
    path = write(tmp_path / "a.jsonl", row, {"prompt": "1", "label": "1"})
    seen = []
    monkeypatch.setattr(type(tokenizer), "__call__", recorded(type(tokenizer).__call__, seen))
    (prompt,) = load_prompts(DataSection(), tokenizer, path)
    assert prompt.index == 1 and max(map(len, seen)) < 10 and "1 of 2 prompts left out" in caplog.text
    path = write(tmp_path / "b.jsonl", {"prompt": "1", "response": "1" * 10**6})
    with pytest.raises(ValueError, match="the model has 1024 positions"):
        load_sft(DataSection(), SftSection(data=path), tokenizer)


def recorded(call, texts):
    def recording(self, text, **arguments):
        texts.extend(text)
        return call(self, text, **arguments)

    return recording


@pytest.mark.parametrize("most", [1, 3, 8])
def test_the_bound_of_characters_takes_nothing_that_fits(tokenizer, most):
    texts = ["1" * n for n in range(1, 12)] + ["<|im_start|>" * n for n in range(1, 12)] + ["e\u0301" * 40]
    plain, bounded = encode(tokenizer, texts), encode(tokenizer, texts, most)
    assert [b for b in bounded if len(b) <= most] == [p for p in plain if len(p) <= most]
    assert [len(b) <= most for b in bounded] == [len(p) <= most for p in plain]


def test_a_line_without_an_end_is_not_held(tmp_path, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(data_module, "MOST_LINE_BYTES", 40)
    path = write(tmp_path / "a.jsonl", GOOD, "x" * 1000, GOOD, "y" * 41)
    with pytest.raises(ValueError, match=r"a.jsonl:2: a line of more than 40 bytes"):
        load_prompts(DataSection(), tokenizer, path)
    assert [p.index for p in load_prompts(DataSection(on_bad_line="skip"), tokenizer, path)] == [0, 2]
    assert "2 bad lines left out" in caplog.text


def test_bad_lines_are_shown_up_to_a_limit_and_all_counted(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", GOOD, *["torn"] * 100)
    load_prompts(DataSection(on_bad_line="skip"), tokenizer, path)
    assert caplog.text.count("left out: not JSON") == 5 and "100 bad lines left out" in caplog.text


def test_damaged_parquet_is_one_sentence(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    twice = pyarrow.table(
        [pyarrow.array(["1"]), pyarrow.array(["2"]), pyarrow.array(["3"])], ["prompt", "label", "label"]
    )
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(ValueError, match=r"several columns called 'label'"):
        load_prompts(DataSection(), tokenizer, path)
    late = pyarrow.array([2**55], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1"], "label": ["1"], "when": late}), path, version="2.6")
    with pytest.raises(ValueError, match="a.parquet is not a readable parquet file"):
        load_prompts(DataSection(), tokenizer, path)


def test_long_prompts_are_left_out_and_counted(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", {"prompt": "1" * 9, "label": ""}, {"prompt": "1" * 8, "label": "x"})
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(DataSection(max_prompt_tokens=8), tokenizer, path)
    assert prompt.index == 1 and len(prompt.token_ids) == 8
    assert "1 of 2 prompts left out" in caplog.text


GOOD = {"prompt": "1+1=", "label": "2"}
BAD = {
    "no label": ({"prompt": "1"}, r"no 'label' among its keys \['prompt'\] \(data.label_key\)"),
    "null label": ({"prompt": "1", "label": None}, r"'label' is null \(data.label_key\)"),
    "no prompt": ({"label": "1"}, "data.prompt_key"),
    "label is a list": ({"prompt": "1", "label": ["1"]}, "text or a number, not list"),
    "prompt is a number": ({"prompt": 3, "label": "1"}, "text or a list of messages"),
    "no messages": ({"prompt": [], "label": "1"}, "text or a list of messages"),
    "message without role": ({"prompt": [{"content": "x"}], "label": "1"}, "role and content"),
    "a key twice": ('{"prompt": "1", "label": "1", "label": "2"}', "a key stands twice"),
    "half a character": ('{"prompt": "1\\ud83d", "label": "1"}', "half of a surrogate pair at character 1"),
    "half a character in a message": (
        '{"prompt": [{"role": "user", "content": "\\udc00"}], "label": "1"}',
        "the prompt has half of a surrogate pair",
    ),
    "half a character as label": ('{"prompt": "1", "label": "\\ud83d"}', "'label' has half of a surrogate pair"),
    "nested": ('{"prompt": "1", "label": "1", "more": ' + "[" * 101 + "]" * 101 + "}", "more than 100 lists"),
    "deeply nested": ("[" * 100_000, "not JSON"),
    "label is NaN": ('{"prompt": "1", "label": NaN}', "nan, which no answer equals"),
    "torn": ('{"prompt": "1", "lab', "not JSON"),
    "not an object": ("[1]", "object is expected, not list"),
}


@pytest.mark.parametrize("row, reason", BAD.values(), ids=BAD.keys())
def test_a_bad_line_is_named_or_skipped(tmp_path, tokenizer, caplog, row, reason):
    path = write(tmp_path / "a.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(ValueError, match=reason) as error:
        load_prompts(DataSection(), tokenizer, path)
    assert f"{path}:3: " in str(error.value)
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(DataSection(on_bad_line="skip"), tokenizer, path)
    assert [p.index for p in prompts] == [0, 3]
    assert "1 bad lines left out" in caplog.text


def test_bytes_that_are_not_utf8(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xff", "label": "1"}\n')
    with pytest.raises(ValueError, match="a.jsonl:1: not JSON in UTF-8"):
        load_prompts(DataSection(), tokenizer, tmp_path / "a.jsonl")


@pytest.mark.parametrize("rows", [[], [""], [{"prompt": "1" * 99, "label": "1"}]], ids=["empty", "blank", "too long"])
def test_an_empty_data_set_is_refused(tmp_path, tokenizer, rows):
    with pytest.raises(ValueError, match="a.jsonl is an empty data set"):
        load_prompts(DataSection(max_prompt_tokens=50), tokenizer, write(tmp_path / "a.jsonl", *rows))


def test_a_missing_file_and_an_unknown_suffix(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="does not exist"):
        load_prompts(DataSection(), tokenizer, tmp_path / "a.jsonl")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match=r"'\.csv' is not one of \.jsonl, \.parquet"):
        load_prompts(DataSection(), tokenizer, tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ValueError, match="not a readable parquet"):
        load_prompts(DataSection(), tokenizer, tmp_path / "a.parquet")


def test_messages_without_a_chat_template(tmp_path, model):
    bare = load_tokenizer(model)
    bare.chat_template = None
    path = write(tmp_path / "a.jsonl", {"prompt": user("1"), "label": "1"})
    for on_bad_line in ("error", "skip"):
        with pytest.raises(ValueError, match="no chat template"):
            load_prompts(DataSection(on_bad_line=on_bad_line), bare, path)


def test_sft_ends_with_the_end_token(tmp_path, tokenizer):
    path = write(tmp_path / "s.jsonl", {"prompt": user("12+34="), "response": "64"})
    (example,) = load_sft(DataSection(), SftSection(data=path), tokenizer)
    assert tokenizer.decode(example.response_ids) == "64<|im_end|>"
    (prompt,) = load_prompts(DataSection(label_key="response"), tokenizer, path)
    assert example.prompt_ids == prompt.token_ids
    with pytest.raises(ValueError, match="s.jsonl:1: no 'answer'.*sft.response_key"):
        load_sft(DataSection(), SftSection(data=path, response_key="answer"), tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        load_sft(DataSection(), SftSection(data=path), SimpleNamespace(eos_token_id=None))


def test_labels_that_no_answer_equals_are_bad_rows(tmp_path, tokenizer):
    """The run's reward decides, as an evaluation's grader does."""
    numeric = partial(label_error, "numeric")
    for kind, good, label, says in [
        ("numeric", "1", "none", "has no number"),
        ("exact", "1", " ", "empty"),
        ("math", "1", "", "empty"),
        ("choice", "A", "maybe", "no letter"),
    ]:
        path = write(tmp_path / "a.jsonl", {"prompt": "a", "label": good}, {"prompt": "a", "label": label})
        with pytest.raises(ValueError, match=f"a.jsonl:2: .*{says}"):
            load_prompts(DataSection(), tokenizer, path, label_error=partial(label_error, kind))
    skipping = DataSection(on_bad_line="skip")
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "label": "none"}, {"prompt": "a", "label": 2})
    assert [p.index for p in load_prompts(skipping, tokenizer, path, label_error=numeric)] == [1]
    assert label_error("my_rewards:score", "") is None, "a function of the user's reads labels as it likes"


def test_a_column_of_floats_that_are_whole_numbers_is_read_as_these(tmp_path, tokenizer):
    """pandas makes floats of integers with a gap among them."""
    path = write(tmp_path / "a.jsonl", *({"prompt": "a", "label": v} for v in (64.0, -3.0, 0.5, 1e300, 7)))
    assert [p.label for p in load_prompts(DataSection(), tokenizer, path)] == ["64", "-3", "0.5", "1e+300", "7"]
    path = write(tmp_path / "b.jsonl", '{"prompt": "a", "label": NaN}')
    with pytest.raises(ValueError, match="b.jsonl:1: 'label' is nan, which no answer equals"):
        load_prompts(DataSection(), tokenizer, path)


def test_messages_kept_as_json_text_are_messages(tmp_path, tokenizer):
    rows = [{"prompt": user("12+34="), "label": "1"}, {"prompt": json.dumps(user("12+34=")), "label": "1"}]
    as_list, as_text = load_prompts(DataSection(), tokenizer, write(tmp_path / "a.jsonl", *rows))
    assert as_list.token_ids == as_text.token_ids
    texts = ["[1, 2]", '[{"a": 1}]', "[x", "[]"]
    path = write(tmp_path / "b.jsonl", *({"prompt": text, "label": "1"} for text in texts))
    assert [tokenizer.decode(p.token_ids) for p in load_prompts(DataSection(), tokenizer, path)] == texts


@pytest.fixture
def folder(tmp_path, model):
    """A copy of the tiny model's folder without weights; its tokenizer ends turns with <|im_end|> (258)."""
    target = tmp_path / "model"
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def change(file, **values):
    merged = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def test_end_tokens_of_both_configs(folder, tokenizer):
    assert end_token_ids(folder, tokenizer) == [256, 258] and unlisted_ends(folder, tokenizer) == {}
    change(folder / "config.json", eos_token_id=7)
    assert end_token_ids(folder, tokenizer) == [7, 256, 258]
    (folder / "generation_config.json").unlink()
    assert end_token_ids(folder, tokenizer) == [7, 258]
    change(folder / "config.json", eos_token_id=320)
    with pytest.raises(ValueError, match="eos_token_id 320: the model has 320 tokens; allowed: 0 to 319"):
        end_token_ids(folder, tokenizer)


def test_the_end_of_a_turn_ends_a_response_whatever_the_configs_list(folder):
    """A base model, <|endoftext|> (256) its only end, tuned with a template whose turns end with <|im_end|> (258)."""
    change(folder / "generation_config.json", eos_token_id=256)
    change(folder / "config.json", eos_token_id=256)
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token_id == 256 and end_token_ids(folder, tokenizer) == [256, 258]
    assert unlisted_ends(folder, tokenizer) == {258: "the chat template writes it behind an answer"}
    change(folder / "tokenizer_config.json", chat_template=None)
    assert end_token_ids(folder, load_tokenizer(folder)) == [256]
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    assert unlisted_ends(folder, load_tokenizer(folder)) == {258: "the tokenizer's eos_token"}


def test_an_end_that_is_trained_and_another_that_the_template_writes_are_refused(folder, tmp_path):
    """Text prompts have no turns: there the tokenizer's end token is the right one."""
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    path = write(tmp_path / "s.jsonl", {"prompt": "1+1=", "response": "2"}, {"prompt": user("1"), "response": "2"})
    says = r"s.jsonl:2: .* eos_token, 256 \(<\|endoftext\|>\), but the chat template ends an answer with 258 "
    with pytest.raises(ValueError, match=says):
        load_sft(DataSection(), SftSection(data=path), tokenizer)
    (example,) = load_sft(DataSection(), SftSection(data=path), tokenizer, limit=1)
    assert tokenizer.decode(example.response_ids) == "2<|endoftext|>"


def test_a_model_that_nothing_ends(folder):
    for name in ("generation_config.json", "config.json"):
        change(folder / name, eos_token_id=None)
    change(folder / "tokenizer_config.json", chat_template=None, eos_token=None)
    with pytest.raises(ValueError, match="neither generation_config.json nor config.json has an eos_token_id"):
        end_token_ids(folder, load_tokenizer(folder))


def test_a_token_beyond_the_embedding_is_named_with_its_row(folder, tmp_path):
    change(folder / "config.json", vocab_size=258)
    tokenizer = load_tokenizer(folder)
    beyond = "<|im_end|>"
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "label": "b"}, {"prompt": f"a{beyond}", "label": "b"})
    with pytest.raises(ValueError, match=r"a.jsonl:2: token 258 \('<\|im_end\|>'\) is beyond .* of 258 rows"):
        load_prompts(DataSection(), tokenizer, path)
    path = write(tmp_path / "b.jsonl", {"prompt": "a", "response": beyond})
    with pytest.raises(ValueError, match=r"b.jsonl:1: token 258 "):
        load_sft(DataSection(), SftSection(data=path), tokenizer)


def test_an_example_longer_than_the_model_is_named(folder, tmp_path):
    change(folder / "config.json", max_position_embeddings=8)
    path = write(tmp_path / "a.jsonl", {"prompt": "1234", "response": "123"}, {"prompt": "1234", "response": "1234"})
    with pytest.raises(
        ValueError, match="a.jsonl:2: prompt and response have at least 9 tokens .* the model has 8 positions"
    ):
        load_sft(DataSection(), SftSection(data=path), load_tokenizer(folder))


def test_the_order_is_a_function_of_the_cursor():
    order = PromptOrder(n=7, seed=3)
    whole, end = order.take(0, 40)
    assert end == 40
    cursor, parts = 0, []
    for k in (1, 7, 0, 13, 19):
        part, cursor = PromptOrder(n=7, seed=3).take(cursor, k)
        parts += part
    assert parts == whole
    epochs = [whole[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(e) for e in epochs}) > 1
    assert PromptOrder(n=7, seed=4).take(0, 40)[0] != whole
    # seeds have no order in common: not one seed's second epoch as the next one's first
    orders = {tuple(PromptOrder(n=7, seed=s).take(7 * e, 7)[0]) for s in range(4) for e in range(4)}
    assert len(orders) == 16
    assert PromptOrder(n=3, seed=0, shuffle=False).take(2, 5) == ([2, 0, 1, 2, 0], 7)
    with pytest.raises(ValueError, match="empty"):
        PromptOrder(n=0, seed=0)


@pytest.mark.parametrize(
    "value", ["151645", [1, "2"], True, -1, [None], {"a": 1}, 1.5, [[1]], float("nan"), "x" * 10**6]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_end_tokens_are_whole_numbers(folder, tokenizer, name, value):
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    change(folder / name, eos_token_id=value)
    with pytest.raises(ValueError, match=f"{name}: eos_token_id = ") as caught:
        end_token_ids(folder, tokenizer)
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"model": 3}',
        "[" * 10**5,
        '{"version": "1.0", "model": {"type": "BPE"}}',
        "\ud800",
        "null",
        '{"added_tokens": [{"id": 99999999999}]}',
    ],
)
def test_a_damaged_tokenizer_is_one_sentence(folder, content):
    (folder / "tokenizer.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match="no tokenizer that can be read|tokenizer.json: ") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) <= 1000
