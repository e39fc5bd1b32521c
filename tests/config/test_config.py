"""Recipes, flags and their refusals."""

import subprocess
import sys

import pytest

from fp8slurm.config import RunConfig, parse, read_recipe, recipe_names, to_toml


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_round_trip(name, tmp_path):
    config = read_recipe(name)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(config))
    assert read_recipe(copy) == config


def test_flags_win_over_recipe_over_defaults():
    config = parse("tiny-fp8", ["--rollout.n-samples", "7", "--optim.lr=1e-4"])
    assert (config.rollout.n_samples, config.optim.lr) == (7, 1e-4)
    assert config.rollout.max_tokens == read_recipe("tiny-fp8").rollout.max_tokens != RunConfig().rollout.max_tokens
    assert config.algorithm.clip_high == RunConfig().algorithm.clip_high == 0.28


def test_known_spellings():
    config = parse(
        None,
        ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise", "--fp8-param-gather", "--hf-checkpoint", "some/model"],
    )
    assert config.fp8.param_gather and str(config.model.hf_checkpoint) == "some/model"


def test_unknown_key_in_recipe_is_named_with_the_known_ones(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[rollout]\nn_sample = 3\n[optim]\nlr = -1\n")
    with pytest.raises(ValueError) as error:
        read_recipe(path)
    text = str(error.value)
    assert "unknown key rollout.n_sample" in text and "n_samples" in text and str(path) in text
    assert "optim.lr = -1" in text and "greater than 0" in text


@pytest.mark.parametrize("text, says", [("[run\n", "not a TOML file"), ("[nonsense]\na = 1\n", "unknown key nonsense")])
def test_broken_recipe(tmp_path, text, says):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_recipe(path)


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("optim", "lr", "inf", "finite number"),
        ("algorithm", "entropy_coef", "nan", "finite number"),
        ("run", "steps", "true", "a number is needed"),
        ("optim", "lr", "true", "a number is needed"),
    ],
)
def test_a_value_that_is_no_number(tmp_path, section, key, value, says):
    path = tmp_path / "r.toml"
    path.write_text(f"[{section}]\n{key} = {value}\n")
    with pytest.raises(ValueError, match=rf"r.toml: {section}.{key} = .*{says}"):
        read_recipe(path)


def test_a_flag_that_is_no_finite_number():
    with pytest.raises((SystemExit, ValueError)):
        parse(None, ["--optim.lr", "inf"])


def test_a_recipe_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes("[run]\nname = 'größe'\n".encode("latin-1"))
    with pytest.raises(ValueError, match="r.toml: not UTF-8, as a TOML file must be: byte 16"):
        read_recipe(path)


def test_missing_recipe_lists_the_shipped_ones():
    with pytest.raises(ValueError, match="tiny-fp8"):
        read_recipe("qwen9")
    with pytest.raises(ValueError, match="no such file"):
        read_recipe("no/where.toml")


def test_unknown_flag_and_value_out_of_range_exit_before_anything(capsys):
    with pytest.raises(SystemExit):
        parse(None, ["--rollout.n-sample", "3"])
    with pytest.raises((SystemExit, ValueError)):
        parse(None, ["--rollout.n-samples", "0"])


def test_config_is_frozen():
    with pytest.raises(Exception, match="frozen"):
        RunConfig().run.steps = 3


def test_the_loop_loads_neither_trainer_nor_engine():
    code = (
        "import sys, fp8slurm.rl.loop, fp8slurm.rollout.worker, fp8slurm.sync.stream\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('sglang', 'megatron', 'transformer_engine')]\n"
        "assert not bad, bad\n"
        "assert 'fp8slurm.trainer.trainer' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
