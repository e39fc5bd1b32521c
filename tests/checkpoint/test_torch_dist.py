"""The whole circle through checkpoints that Megatron itself saved at TP1, TP2, PP2 and EP2, and through our own."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folders
import torch
from safetensors.torch import load_file

from fp8slurm.checkpoint import BadCheckpoint, hf_to_fp8, hf_to_torch_dist, torch_dist_to_fp8, torch_dist_to_hf
from fp8slurm.checkpoint.converters import convert_torch_dist, stream
from fp8slurm.checkpoint.formats.torch_dist_source import TorchDistSource
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("megatron_worker.py")
TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
EP2, TP2_MOE = {"expert_parallel_size": 2}, {"tensor_parallel_size": 2, "sequence_parallel": True}
MODELS = {
    "tied": {}, "untied": {"tie": False, "seed": 1}, "moe": {"tie": False, "moe": True, "seed": 2},
    "qwen2": {"seed": 3} | tiny_folders.QWEN2, "llama": {"tie": False, "seed": 4} | tiny_folders.LLAMA,
}  # fmt: skip
SAVED = {
    "tied-tp1": ("tied", {}), "tied-tp2": ("tied", TP2), "untied-pp2": ("untied", PP2), "moe-ep2": ("moe", EP2),
    "qwen2-tp2": ("qwen2", TP2), "llama-pp2": ("llama", PP2),
}  # fmt: skip
LOADED = {"tied": PP2, "untied": TP2, "moe": EP2 | TP2_MOE, "qwen2": PP2, "llama": TP2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf-MODEL folders, ours-MODEL made from them by hf-to-torch-dist, and saved-LAYOUT saved by Megatron; two ranks
    do all of the saving, and check that Megatron loads ours in yet other layouts."""
    base = tmp_path_factory.mktemp("circle")
    jobs = []
    for name, kind in MODELS.items():
        tiny_folders.make(base / f"hf-{name}", **kind)
        hf_to_torch_dist(base / f"hf-{name}", base / f"ours-{name}", memory_mib=1, max_shard_bytes=1 << 20)
        jobs.append({"do": "load", "hf": f"{base}/hf-{name}", "ckpt": f"{base}/ours-{name}", "parallel": LOADED[name]})
    for name, (model, parallel) in SAVED.items():
        (base / f"saved-{name}").mkdir()
        jobs.append({"do": "save", "hf": f"{base}/hf-{model}", "ckpt": f"{base}/saved-{name}", "parallel": parallel})
    (base / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    ranks, logs = [], [base / f"rank{r}.log" for r in range(2)]
    for r, log in enumerate(logs):
        command = [sys.executable, WORKER, str(r), str(port), base / "jobs.json"]
        with log.open("w") as file:
            ranks.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    try:
        codes = [rank.wait(timeout=280) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return base


def same_weights(a: Path, b: Path) -> None:
    x, y = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(x) == set(y)
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name].view(torch.uint8), y[name].view(torch.uint8)), (
            name
        )


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("name", [*(f"saved-{n}" for n in SAVED), *(f"ours-{n}" for n in MODELS)])
def test_the_circle_closes(folder: Path, tmp_path: Path, name: str) -> None:
    kind, model = name.split("-", 1)
    hf = folder / f"hf-{model if kind == 'ours' else SAVED[model][0]}"
    torch_dist_to_hf(folder / name, tmp_path / "back", origin_hf_dir=hf)
    same_weights(hf, tmp_path / "back")
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / file).read_bytes() == (hf / file).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((hf / "config.json").read_text())

    hf_to_fp8(hf, tmp_path / "direct")
    torch_dist_to_fp8(folder / name, tmp_path / "one-pass", origin_hf_dir=hf)
    hf_to_fp8(tmp_path / "back", tmp_path / "two-passes")
    assert files(tmp_path / "direct") == files(tmp_path / "one-pass") == files(tmp_path / "two-passes")


def test_torch_dist_is_deterministic(folder: Path, tmp_path: Path) -> None:
    for name, settings in (("a", {"jobs": 1}), ("b", {"jobs": 3, "verify": False})):
        hf_to_torch_dist(folder / "hf-moe", tmp_path / name, max_shard_bytes=1 << 20, **settings)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_pieces_of_a_fused_parameter(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 1 << 10)  # a few rows: pieces end inside query groups
    torch_dist_to_hf(folder / "saved-tied-tp2", tmp_path / "back", origin_hf_dir=folder / "hf-tied", verify=False)
    same_weights(folder / "hf-tied", tmp_path / "back")


def test_fp8_folder_to_torch_dist(folder: Path, tmp_path: Path) -> None:
    from fp8slurm.checkpoint import fp8_to_hf

    hf_to_fp8(folder / "hf-untied", tmp_path / "fp8")
    fp8_to_hf(tmp_path / "fp8", tmp_path / "bf16")
    hf_to_torch_dist(tmp_path / "fp8", tmp_path / "ckpt")
    torch_dist_to_hf(tmp_path / "ckpt", tmp_path / "back", origin_hf_dir=tmp_path / "bf16")
    same_weights(tmp_path / "bf16", tmp_path / "back")
    # the codes survive; the origin may be the FP8 folder itself
    torch_dist_to_fp8(tmp_path / "ckpt", tmp_path / "again", origin_hf_dir=tmp_path / "fp8")
    hf_to_fp8(tmp_path / "bf16", tmp_path / "direct")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "direct/model.safetensors").read_bytes()


def dcp_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=path, no_dist=True)


def unstacked(config: dict, weights: dict[str, torch.Tensor], padded: int = 0) -> dict[str, torch.Tensor]:
    """Megatron's per-layer form (non_homogeneous_layers): every layer and expert under a key of its own."""
    state = {}
    for entry in NameTable(ModelSpec.from_hf_config(config)):
        full = entry.merge(weights)
        if padded and entry.name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            full = torch.cat([full, torch.full((padded, full.shape[1]), 9.0, dtype=full.dtype)])
        state[entry.name.replace(".local_experts.", ".experts.")] = full
    return state


@pytest.mark.parametrize("model", ["untied", "moe"])
def test_per_layer_keys_and_a_padded_vocabulary(folder: Path, tmp_path: Path, model: str) -> None:
    hf = folder / f"hf-{model}"
    config, weights = json.loads((hf / "config.json").read_text()), load_file(hf / "model.safetensors")
    dcp_save(tmp_path / "release", unstacked(config, weights, padded=64))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")  # Megatron-LM's layout around it
    torch_dist_to_hf(tmp_path, tmp_path.with_name(tmp_path.name + "-back"), origin_hf_dir=hf)
    same_weights(hf, tmp_path.with_name(tmp_path.name + "-back"))


def test_a_tied_model_whose_folder_has_a_head_all_the_same(tmp_path: Path) -> None:
    config = tiny_folders.config(tie=True)
    weights = tiny_folders.tensors(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    hf = tiny_folders.write(tmp_path / "hf", config, weights)
    hf_to_torch_dist(hf, tmp_path / "ckpt")
    torch_dist_to_hf(tmp_path / "ckpt", tmp_path / "back", origin_hf_dir=hf)
    same_weights(hf, tmp_path / "back")
    weights["lm_head.weight"][3, 3] += 1
    other = tiny_folders.write(tmp_path / "other", config, weights)
    with pytest.raises(BadCheckpoint, match="lm_head.weight is no tensor of this model"):
        hf_to_torch_dist(other, tmp_path / "ckpt2")


def test_errors(folder: Path, tmp_path: Path) -> None:
    hf = folder / "hf-untied"
    config, weights = json.loads((hf / "config.json").read_text()), load_file(hf / "model.safetensors")
    state = unstacked(config, weights)
    out = tmp_path / "out"

    def attempt(message: str, state: dict[str, torch.Tensor], origin: Path = hf) -> None:
        path = tmp_path / f"ckpt{len(list(tmp_path.iterdir()))}"
        dcp_save(path, state)
        with pytest.raises((BadCheckpoint, FileNotFoundError), match=message):
            torch_dist_to_hf(path, out, origin_hf_dir=origin)

    attempt(
        "has no .*linear_qkv.weight",
        {k: v for k, v in state.items() if "layers.1.self_attention.linear_qkv.weight" not in k},
    )
    attempt("stray is no parameter", state | {"stray": torch.ones(1)})
    attempt("config says", state | {"decoder.final_layernorm.weight": torch.ones(3)})
    wider = tiny_folders.config(tie=False, intermediate_size=640)
    attempt("config says", state, tiny_folders.write(tmp_path / "wider", wider, tiny_folders.tensors(wider)))
    attempt("no such folder", state, tmp_path / "nowhere")
    with pytest.raises(BadCheckpoint, match="no torch_dist checkpoint"):
        torch_dist_to_hf(hf, out, origin_hf_dir=hf)
    ours = folder / "ours-untied"
    for change, message in ((truncate, "truncated"), (Path.unlink, "missing")):
        copy = tmp_path / change.__name__
        copy.mkdir()
        for file in ours.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        change(copy / "__0_0.distcp")
        with pytest.raises(BadCheckpoint, match=message):
            torch_dist_to_hf(copy, out, origin_hf_dir=hf)
    fewer = tiny_folders.config(tie=False, num_hidden_layers=1)  # layers are stacked: the first alone would be read
    other = tiny_folders.write(tmp_path / "fewer", fewer, tiny_folders.tensors(fewer))
    with pytest.raises(BadCheckpoint, match=r"has \[2\] layers, the model's config \[1\]"):
        torch_dist_to_hf(ours, out, origin_hf_dir=other)
    assert not out.exists()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def test_interrupted_hf_to_torch_dist_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8slurm.checkpoint.converters import torch_dist_writer

    hf = folder / "hf-untied"
    hf_to_torch_dist(hf, tmp_path / "whole", max_shard_bytes=1 << 20)
    original, seen = torch_dist_writer._write_file, []

    def write_some(file, *args):
        seen.append(file.name)
        if len(seen) == 3:
            raise Interrupted
        return original(file, *args)

    monkeypatch.setattr(torch_dist_writer, "_write_file", write_some)
    with pytest.raises(Interrupted):
        hf_to_torch_dist(hf, tmp_path / "ckpt", max_shard_bytes=1 << 20, jobs=1)
    monkeypatch.setattr(torch_dist_writer, "_write_file", original)
    assert not (tmp_path / "ckpt").exists()
    report = hf_to_torch_dist(hf, tmp_path / "ckpt", max_shard_bytes=1 << 20)
    assert report.resumed_shards == 2
    assert files(tmp_path / "ckpt") == files(tmp_path / "whole")


def test_verification_of_torch_dist_finds_a_flipped_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = convert_torch_dist.write_torch_dist

    def write_and_damage(files, out, *args):
        names = original(files, out, *args)
        data = bytearray((out.tmp / "__0_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (out.tmp / "__0_0.distcp").write_bytes(data)
        return names

    monkeypatch.setattr(convert_torch_dist, "write_torch_dist", write_and_damage)
    with pytest.raises(BadCheckpoint, match="does not read back"):
        hf_to_torch_dist(folder / "hf-tied", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_the_source_reads_any_rows(folder: Path) -> None:
    spec = ModelSpec.from_hf_dir(folder / "hf-moe")
    source = TorchDistSource(folder / "saved-moe-ep2", spec)
    weights = load_file(folder / "hf-moe/model.safetensors")
    for name, w in weights.items():
        for start, stop in ((0, w.shape[0]), (w.shape[0] // 3, w.shape[0] // 2), (w.shape[0] - 1, w.shape[0])):
            assert torch.equal(source.read(name, start, stop), w[start:stop].reshape(stop - start, -1)), (
                name,
                start,
                stop,
            )
    source.close()
