"""In which precision engines serve, and so what every weight update is made into."""

import json

import pytest
from tiny import model_config

from fp8slurm.config import RunConfig
from fp8slurm.models.precision import engine_in_fp8, engine_quantization
from fp8slurm.models.spec import QuantizationSpec


@pytest.mark.parametrize(
    ("engine", "backend", "fp8"),
    [("auto", "off", False), ("auto", "emulated", True), ("auto", "transformer_engine", True),
     ("fp8", "off", True), ("bf16", "emulated", False), ("bf16", "transformer_engine", False)],
)  # fmt: skip
def test_the_engine_follows_the_trainer_unless_told_otherwise(engine, backend, fp8):
    config = RunConfig.model_validate({"fp8": {"engine": engine, "backend": backend}})
    assert engine_in_fp8(config) is fp8
    assert engine_quantization(config) == (QuantizationSpec() if fp8 else None)


def test_a_checkpoint_of_its_own_says_what_the_engine_serves(tmp_path):
    """Whatever fp8.engine says: updates keep what that checkpoint keeps."""
    kept = ["lm_head", "model.layers.1.mlp.down_proj"]
    block = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    for name, said in (("fp8", {"quantization_config": block | {"modules_to_not_convert": kept}}), ("bf16", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(model_config() | said))
        other = "bf16" if name == "fp8" else "fp8"
        config = RunConfig.model_validate({"fp8": {"engine": other}, "model": {"rollout_checkpoint": tmp_path / name}})
        assert engine_in_fp8(config) is (name == "fp8")
        found = engine_quantization(config)
        assert (found and list(found.modules_to_not_convert)) == (kept if name == "fp8" else None)
