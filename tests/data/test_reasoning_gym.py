"""Tasks of the real package as data and reward."""

import json

import pytest
import tiny

from fp8slurm.config.schema import DataSection, RewardSection, SourceSection
from fp8slurm.core.errors import InputError
from fp8slurm.core.types import Sample, SampleGroup
from fp8slurm.data import reasoning_gym as module
from fp8slurm.data.endless import COUNT, EndlessPrompts, Joined
from fp8slurm.data.prompts import load_prompts, load_tokenizer
from fp8slurm.data.reasoning_gym import BLOCK, read_task
from fp8slurm.data.sources import order_of, training_sources
from fp8slurm.rewards.pool import RewardPool

REWARD = "fp8slurm.agents.reasoning_gym:score"
SUMS = 'reasoning_gym = "chain_sum"\nseed = 3\n[settings]\nmin_terms = 2\nmax_terms = 3\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return load_tokenizer(folder)


def write(path, text):
    path.write_text(text)
    return path


def endless(path, tokenizer, **settings):
    (source,) = training_sources(DataSection(train=path, **settings), REWARD)
    return source.load(tokenizer, lambda kind, label: None)


def test_endless_prompts_are_a_function_of_the_cursor(reasoning_gym, tokenizer, tmp_path):
    """A resume at any cursor has the prompts of the run that went on."""
    path = write(tmp_path / "sums.toml", SUMS)
    prompts = Joined([endless(path, tokenizer)])
    (source,) = training_sources(DataSection(train=path), REWARD)
    order = order_of([endless(path, tokenizer)], [source], 0, True)
    cursor, whole = 0, []
    for k in (3, 4, 5):
        indices, cursor = order.take(cursor, k)
        whole += [prompts[i] for i in indices]
    module.entry_of.cache_clear(), module.dataset.cache_clear()
    later, _ = order.take(7, 5)
    again = endless(path, tokenizer)
    assert [again[i] for i in later] == whole[7:] and len({p.token_ids for p in whole}) == 12
    far = again[COUNT - 1]
    assert far.index == COUNT - 1 and far.content[0]["content"].startswith("State the final answer")
    with pytest.raises(IndexError):
        again[COUNT]
    other = endless(write(tmp_path / "other.toml", SUMS.replace("seed = 3", "seed = 4")), tokenizer)
    assert other[0] != again[0]


def test_the_verifier_is_the_packages(reasoning_gym, tokenizer, tmp_path):
    from fp8slurm.agents.reasoning_gym import answer_of, score

    prompt = endless(write(tmp_path / "sums.toml", SUMS), tokenizer)[5]
    wrong = str(int(prompt.label) + 1)
    assert score(prompt.label, prompt.row) == (1.0, {"failed": 0.0})
    assert score(f"<think>{wrong}</think>\n<answer> {prompt.label} </answer>", prompt.row)[0] == 1.0
    assert score(wrong, prompt.row)[0] < 0.1 and score("", prompt.row)[0] < 0.1
    assert answer_of("<answer>1</answer> no <answer>2") == "2" and answer_of("<think>3") == "<think>3"


def test_rewards_flow_through_the_processes(reasoning_gym, tokenizer, tmp_path):
    prompts = endless(write(tmp_path / "sums.toml", SUMS), tokenizer)[:3]
    groups = [SampleGroup(p, [Sample([], [], [], "stop", text=t) for t in (p.label, "nonsense")]) for p in prompts]
    with RewardPool(RewardSection(kind=REWARD, workers=1, timeout_s=60)) as pool:
        pool.score(groups)
    assert [[s.reward > 0.9 for s in g.samples] for g in groups] == [[True, False]] * 3
    assert groups[0].samples[0].parts == {"failed": 0.0}


def test_a_file_with_a_size_is_held_out_data(reasoning_gym, tokenizer, tmp_path):
    path = write(
        tmp_path / "held.toml", 'reasoning_gym = "spell_backward"\nseed = 9\nsize = 4\nsystem = "Only the word."\n'
    )
    prompts = load_prompts(DataSection(), tokenizer, path)
    assert [p.index for p in prompts] == [0, 1, 2, 3]
    assert prompts[0].content[0] == {"role": "system", "content": "Only the word."}
    assert prompts == load_prompts(DataSection(), tokenizer, path)
    with pytest.raises(InputError, match="has no size: its questions never end"):
        load_prompts(DataSection(), tokenizer, write(tmp_path / "sums.toml", SUMS))


def test_an_endless_source_beside_a_file(reasoning_gym, tokenizer, tmp_path):
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1)} for i in range(4)]
    write(tmp_path / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    write(tmp_path / "sums.toml", SUMS)
    data = DataSection(
        sources={
            "rows": SourceSection(file=tmp_path / "rows.jsonl"),
            "sums": SourceSection(file=tmp_path / "sums.toml", weight=2, reward=REWARD),
        }
    )
    sources = training_sources(data, "exact")
    loaded = [s.load(tokenizer, lambda kind, label: None) for s in sources]
    prompts, order = Joined(loaded), order_of(loaded, sources, 0, True)
    taken = [prompts[i] for i in order.take(0, 30)[0]]
    assert [p.source for p in taken].count("sums") == 20
    assert [p.index for p in taken if p.source == "sums"] == list(range(20))
    assert [prompts[i] for i in order.take(11, 19)[0]] == taken[11:]


def test_questions_that_are_too_long_are_replaced(reasoning_gym, tokenizer, tmp_path):
    path = write(tmp_path / "words.toml", 'reasoning_gym = "spell_backward"\n')
    lengths = [len(p.token_ids) for p in endless(path, tokenizer)[:40]]
    most = sorted(lengths)[20]
    short = endless(path, tokenizer, max_prompt_tokens=most)
    taken = short[:40]
    assert max(len(p.token_ids) for p in taken) <= most and short.left_out >= 10
    assert [p.index for p in taken] == list(range(40))
    assert all(p.row["reasoning_gym"]["number"] % COUNT == p.index for p in taken)
    with pytest.raises(InputError, match="10 questions are longer than data.max_prompt_tokens = 3"):
        endless(path, tokenizer, max_prompt_tokens=3)[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('reasoning_gym = "chain_sums"', "none of the .* tasks of reasoning-gym 0.1.25, such as chain_sum"),
        ("seed = 1", "names no task"),
        ('reasoning_gym = "chain_sum"\nsede = 1', "'sede' is not one of reasoning_gym, seed, size, system, settings"),
        ('reasoning_gym = "chain_sum"\nseed = -1', "seed = -1; allowed: 0 to 99"),
        ('reasoning_gym = "chain_sum"\nseed = true', "seed = True; allowed: int"),
        ('reasoning_gym = "chain_sum"\nsize = 0', f"size = 0; allowed: 1 to {BLOCK}"),
        ('reasoning_gym = "chain_sum"\n[settings]\nterms = 3', "chain_sum refuses .settings.*terms"),
        ('reasoning_gym = "chain_sum"\n[settings]\nmin_terms = 9\nmax_terms = 2', "chain_sum refuses .settings.*AssertionError"),
        ('reasoning_gym = "chain_sum"\n[settings]\nseed = 3', "settings.seed; allowed: seed, outside"),
        ("= nonsense", "is no TOML"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_be(reasoning_gym, tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        read_task(write(tmp_path / "task.toml", text))


def test_a_run_is_refused_before_it_starts(reasoning_gym, tmp_path):
    from fp8slurm.check.data import check_data
    from fp8slurm.config import parse

    tiny_model = tmp_path / "model"
    tiny_model.mkdir()
    tiny.write_model(tiny_model)
    write(tmp_path / "task.toml", 'reasoning_gym = "chain_sums"')
    flags = ["--model.hf-checkpoint", str(tiny_model), "--data.train", str(tmp_path / "task.toml")]
    config = parse(
        "tiny-fp8",
        [
            *flags,
            "--data.eval",
            "None",
            "--sft.data",
            "None",
            "--reward.kind",
            REWARD,
            "--data.max-prompt-tokens",
            "400",
        ],
    )
    with pytest.raises(InputError, match="none of the .* tasks"):
        check_data(config, None, [])
    write(tmp_path / "task.toml", SUMS)
    check_data(config, None, [])


def test_another_version_is_refused(reasoning_gym, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VERSION", "0.0.9")
    module.package.cache_clear()
    try:
        with pytest.raises(InputError, match="reasoning-gym 0.0.9 is needed, there is 0.1.25: pip install"):
            read_task(write(tmp_path / "task.toml", SUMS))
    finally:
        module.package.cache_clear()


def test_it_is_a_sequence(reasoning_gym, tokenizer, tmp_path):
    prompts = endless(write(tmp_path / "sums.toml", SUMS), tokenizer)
    assert isinstance(prompts, EndlessPrompts) and len(prompts) == COUNT and len(prompts[2:4]) == 2
