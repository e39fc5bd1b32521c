"""hf-to-fp8 and fp8-to-hf: right bytes, index and companions; determinism; resuming; nothing half-done."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_folders
import torch
from safetensors.torch import load_file, save_file

from fp8slurm.checkpoint import (
    BadCheckpoint,
    fp8_to_hf,
    hf_to_fp8,
    hf_to_torch_dist,
    torch_dist_to_fp8,
    torch_dist_to_hf,
)
from fp8slurm.checkpoint.converters import stream
from fp8slurm.checkpoint.converters.conversion import pack
from fp8slurm.checkpoint.converters.output import OURS, OWNER, OutputFolder
from fp8slurm.checkpoint.converters.works import Copy
from fp8slurm.checkpoint.formats.hf_folder import open_hf
from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo
from fp8slurm.core.processes import process_start
from fp8slurm.fp8.block import BlockFP8
from fp8slurm.fp8.policy import decide, engine_matrix
from fp8slurm.fp8.reference import dequantize_reference, quantize_reference


def load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("moe", "parts"), [(False, 1), (True, 3)])
def test_every_tensor_is_the_reference_of_the_input(tmp_path: Path, moe: bool, parts: int) -> None:
    src = tiny_folders.make(tmp_path / "src", tie=not moe, moe=moe, files=parts)
    before = files(src)
    report = hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20)
    assert files(src) == before
    given, made = load(src), load(tmp_path / "fp8")
    for name, w in given.items():
        if decide(name, w.shape).quantize:
            expected = quantize_reference(w)
            assert same(made.pop(name), expected.data)
            assert same(made.pop(name + "_scale_inv"), expected.scale_inv)
        else:
            assert same(made.pop(name), w)
    assert not made
    assert report.shards > 1 and report.resumed_shards == 0

    index = json.loads((tmp_path / "fp8/model.safetensors.index.json").read_text())
    on_disk = {}
    for file in (tmp_path / "fp8").glob("*.safetensors"):
        on_disk |= dict.fromkeys(load_file(file), file.name)
    assert index["weight_map"] == on_disk
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in load(tmp_path / "fp8").values())
    for file in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "fp8" / file).read_bytes() == before[file]
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads(before["config.json"])
    assert quantization["weight_block_size"] == [128, 128] and quantization["fmt"] == "e4m3"
    assert ("model.layers.0.mlp.gate" in quantization["modules_to_not_convert"]) is moe


def test_two_runs_with_other_settings_give_the_same_files(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src", files=2)
    hf_to_fp8(src, tmp_path / "a", jobs=1, memory_mib=1, max_shard_bytes=1 << 20)
    hf_to_fp8(src, tmp_path / "b", jobs=3, verify=False, max_shard_bytes=1 << 20)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_there_and_back(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src", moe=True)
    hf_to_fp8(src, tmp_path / "fp8")
    fp8_to_hf(tmp_path / "fp8", tmp_path / "back")
    fp8, back = load(tmp_path / "fp8"), load(tmp_path / "back")
    assert set(back) == set(load(src))
    for name, w in back.items():
        if name + "_scale_inv" in fp8:
            assert same(w, dequantize_reference(BlockFP8(fp8[name], fp8[name + "_scale_inv"])).bfloat16())
        else:
            assert same(w, fp8[name])
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    hf_to_fp8(tmp_path / "back", tmp_path / "again")
    again = load(tmp_path / "again")
    fp8_to_hf(tmp_path / "again", tmp_path / "back2")
    assert all(same(again[n], fp8[n]) for n in fp8 if not n.endswith("_scale_inv"))
    assert all(same(w, back[n]) for n, w in load(tmp_path / "back2").items())


def test_fused_experts_come_out_one_by_one(tmp_path: Path) -> None:
    config = tiny_folders.config(tie=False, moe=True)
    weights = tiny_folders.tensors(config)
    one_by_one = tiny_folders.write(tmp_path / "plain", config, weights)
    fused = {n: w for n, w in weights.items() if ".experts." not in n}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}.mlp.experts."
        parts = [[weights[f"{p}{e}.{k}_proj.weight"] for e in range(4)] for k in ("gate", "up", "down")]
        fused[p + "gate_up_proj"] = torch.stack([torch.cat(gu) for gu in zip(*parts[:2])])
        fused[p + "down_proj"] = torch.stack(parts[2])
    tiny_folders.write(tmp_path / "fused", config, fused)
    hf_to_fp8(one_by_one, tmp_path / "a")
    hf_to_fp8(tmp_path / "fused", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_ragged_sizes_and_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 1)  # pieces of one block row: many boundaries
    config = tiny_folders.config(hidden_size=200, intermediate_size=330, layers=1)
    src = tiny_folders.write(tmp_path / "src", config, tiny_folders.tensors(config))
    hf_to_fp8(src, tmp_path / "fp8")
    fp8_to_hf(tmp_path / "fp8", tmp_path / "back")
    made, back = load(tmp_path / "fp8"), load(tmp_path / "back")
    for name, w in load(src).items():
        if decide(name, w.shape).quantize:
            expected = quantize_reference(w)
            assert same(made[name], expected.data) and same(made[name + "_scale_inv"], expected.scale_inv)
            assert same(back[name], dequantize_reference(expected).bfloat16())


def test_power_of_two_and_exclusions(tmp_path: Path) -> None:
    config = tiny_folders.config() | {"modules_to_not_convert": ["o_proj"]}
    src = tiny_folders.write(tmp_path / "src", config, tiny_folders.tensors(config))
    hf_to_fp8(src, tmp_path / "fp8", power_of_two=True, modules_to_not_convert=["model.layers.1"])
    made = load(tmp_path / "fp8")
    scales = [n for n in made if n.endswith("_scale_inv")]
    assert scales and all((torch.frexp(made[n]).mantissa == 0.5).all() for n in scales)
    assert not any("layers.1." in n or "o_proj" in n for n in scales)
    quantization = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    layer = "model.layers.1."
    kept = ["model.layers.0.self_attn.o_proj", *(f"{layer}mlp.{p}_proj" for p in ("down", "gate", "up"))]
    kept += [f"{layer}self_attn.{p}_proj" for p in "koqv"]
    assert quantization["modules_to_not_convert"] == ["lm_head", *kept]
    assert quantization["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize("entry", ["mlp", "layers.0", "model.layer.0.mlp", "model.layers.2", "proj", ""])
def test_an_entry_that_matches_no_module_is_refused(tmp_path: Path, entry: str) -> None:
    hf = tiny_folders.make(tmp_path / "src")
    hf_to_torch_dist(hf, tmp_path / "ckpt")
    message = rf"--modules-to-not-convert {entry}: .* such as model\.layers\.0\.mlp\.down_proj, model\.layers\.0\.mlp or down_"
    with pytest.raises(ValueError, match=message):
        hf_to_fp8(hf, tmp_path / "fp8", modules_to_not_convert=["o_proj", entry])
    with pytest.raises(ValueError, match=message):
        torch_dist_to_fp8(
            tmp_path / "ckpt", tmp_path / "fp8", origin_hf_dir=hf, modules_to_not_convert=["o_proj", entry]
        )


def test_entries_that_are_accepted_without_an_effect(tmp_path: Path) -> None:
    """An input config's own, and what stays as it is anyway: rollout checkpoints name it, and this model has no head."""
    config = tiny_folders.config() | {"modules_to_not_convert": ["mlp"]}
    src = tiny_folders.write(tmp_path / "src", config, tiny_folders.tensors(config))
    given = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm", "model.embed_tokens"]
    hf_to_fp8(src, tmp_path / "fp8", modules_to_not_convert=given)
    quantization = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert quantization["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("entry", "moe"),
    [("q_proj", False), ("up_proj", False), ("model.layers.1.mlp.experts.3", True), ("down_proj", True)],
)
def test_an_entry_that_splits_what_the_engine_holds_as_one_is_refused(tmp_path: Path, entry: str, moe: bool) -> None:
    src = tiny_folders.make(tmp_path / "src", moe=moe, tie=False)
    with pytest.raises(
        ValueError, match=rf"modules_to_not_convert: {entry} keeps model\.layers.* but not model\.layers"
    ):
        hf_to_fp8(src, tmp_path / "fp8", modules_to_not_convert=[entry])


KEPT_BY = """
import json, sys
from fp8slurm.cpu import sglang_stubs
sglang_stubs.install()
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped
from transformers.quantizers.quantizers_utils import should_convert_module
quantization, modules = json.load(sys.stdin)
ignored, entries = Fp8Config.from_config(quantization).ignored_layers, quantization["modules_to_not_convert"]
print(json.dumps({m: [is_layer_skipped(one, ignored), not should_convert_module(m, entries)] for m, one in modules.items()}))
"""


@pytest.mark.slow
def test_the_engine_keeps_what_the_file_keeps(tmp_path: Path) -> None:
    """By SGLang's own rule and transformers' own, on the names that their modules have."""
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    for moe, given in ((False, ["model.layers.1", "o_proj"]), (True, ["model.layers.1.mlp.experts", "o_proj"])):
        src = tiny_folders.make(tmp_path / f"src{moe}", moe=moe, tie=False, layers=12)
        out = tmp_path / f"fp8{moe}"
        hf_to_fp8(src, out, modules_to_not_convert=given)
        quantization = json.loads((out / "config.json").read_text())["quantization_config"]
        kept = {
            name.removesuffix(".weight"): w.dtype == torch.bfloat16
            for name, w in load(out).items()
            if not name.endswith("_scale_inv") and decide(name, w.shape).quantize
        }
        done = subprocess.run(
            [sys.executable, "-c", KEPT_BY], input=json.dumps([quantization, {m: engine_matrix(m) for m in kept}]),
            capture_output=True, text=True, env=environment, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {m: [k, k] for m, k in kept.items()}
        assert 0 < sum(kept.values()) < len(kept)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("with_verify", [True, False])
def test_an_interrupted_conversion_goes_on_with_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_verify: bool
) -> None:
    src = tiny_folders.make(tmp_path / "src")
    hf_to_fp8(src, tmp_path / "whole", max_shard_bytes=1 << 20)
    original, calls = stream.write_shard, []

    def write_two(shard, *args):
        calls.append(shard.layout.file_name)
        if len(calls) == 2:
            raise Interrupted
        return original(shard, *args)

    monkeypatch.setattr(stream, "write_shard", write_two)
    with pytest.raises(Interrupted):
        hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20, verify=with_verify)
    assert not (tmp_path / "fp8").exists()
    assert [p.name for p in (tmp_path / "fp8.tmp").glob("*.safetensors*")] == [calls[0]]
    report = hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20)
    assert report.resumed_shards == 1 and calls.count(calls[0]) == 1
    assert files(tmp_path / "fp8") == files(tmp_path / "whole")
    assert not (tmp_path / "fp8.tmp").exists()


def test_a_leftover_of_another_input_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny_folders.make(tmp_path / "src")
    leftover(tmp_path, src, monkeypatch)
    os.utime(src / "model.safetensors", ns=(1, 1))
    assert hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20).resumed_shards == 0


def test_a_leftover_with_other_scales_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files have the same names, headers and sizes; half of them would hold the other scales."""
    src = tiny_folders.make(tmp_path / "src")
    leftover(tmp_path, src, monkeypatch)
    assert hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20, power_of_two=True).resumed_shards == 0
    for name, tensor in load(tmp_path / "fp8").items():
        assert not name.endswith("_scale_inv") or torch.equal(tensor.log2(), tensor.log2().round()), name


def test_shards_are_as_full_as_the_limit_permits_and_no_fuller() -> None:
    works = [Copy(None, TensorInfo(f"t{i}", torch.uint8, (n,))) for i, n in enumerate((6, 4, 1, 9, 1, 25, 2))]
    shards = pack(works, 10)
    assert [list(s.layout.tensors) for s in shards] == [["t0", "t1"], ["t2", "t3"], ["t4"], ["t5"], ["t6"]]
    assert [s.layout.file_name for s in shards][::4] == [
        "model-00001-of-00005.safetensors",
        "model-00005-of-00005.safetensors",
    ]


def leftover(tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fp8.tmp with finished shards."""
    with monkeypatch.context() as m:
        m.setattr(
            "fp8slurm.checkpoint.converters.output.OutputFolder.finish", lambda *a: (_ for _ in ()).throw(Interrupted())
        )
        with pytest.raises(Interrupted):
            hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20)


def test_a_finished_shard_of_another_size_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny_folders.make(tmp_path / "src")
    leftover(tmp_path, src, monkeypatch)
    first = sorted((tmp_path / "fp8.tmp").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1])
    report = hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20)
    assert report.resumed_shards == report.shards - 1


def test_a_strangers_tmp_folder_is_refused(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src")
    (tmp_path / "fp8.tmp").mkdir()
    (tmp_path / "fp8.tmp/mine.txt").write_text("x")
    with pytest.raises(ValueError, match="no conversion made it"):
        hf_to_fp8(src, tmp_path / "fp8")
    assert (tmp_path / "fp8.tmp/mine.txt").exists()


def test_output_that_exists_or_lies_in_the_input(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="--overwrite"):
        hf_to_fp8(src, tmp_path / "there")
    for inside in (src, src / "fp8", tmp_path):
        with pytest.raises(ValueError, match="outside the input"):
            hf_to_fp8(src, inside, overwrite=True)
    hf_to_fp8(src, tmp_path / "there", overwrite=True)
    assert (tmp_path / "there/config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "there"]


@pytest.fixture
def sleeper() -> Iterator[dict[str, object]]:
    """A living process of this machine, as OUT.tmp records it."""
    process = subprocess.Popen(["sleep", "60"])
    yield {"host": socket.gethostname(), "pid": process.pid, "start": process_start(process.pid), "token": "its own"}
    process.kill()
    process.wait()


def test_a_second_conversion_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: dict[str, object]
) -> None:
    src = tiny_folders.make(tmp_path / "src")
    leftover(tmp_path, src, monkeypatch)
    owner = tmp_path / "fp8.tmp" / OWNER
    assert not owner.exists()  # the interrupted one is no longer at work
    owner.write_text(json.dumps(sleeper))
    for convert in (hf_to_fp8, hf_to_torch_dist):
        with pytest.raises(ValueError, match=f"process {sleeper['pid']} on this machine is converting into it"):
            convert(src, tmp_path / "fp8")
    assert json.loads(owner.read_text()) == sleeper
    owner.write_text(json.dumps(sleeper | {"start": "1"}))  # the process ended, its number was given to another one
    assert hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20).resumed_shards > 0
    assert not OURS & set(files(tmp_path / "fp8"))


@pytest.mark.parametrize("convert", [hf_to_fp8, hf_to_torch_dist])
@pytest.mark.parametrize("last", [False, True], ids=["at the second shard", "at the end"])
def test_a_conversion_that_was_taken_over_gives_nothing_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Callable[..., object], last: bool
) -> None:
    """Another machine's conversion begins in the same OUT.tmp: its owner cannot be looked for here."""
    src = tiny_folders.make(tmp_path / "src")
    original, calls = OutputFolder.check_owner, []

    def taken(self: OutputFolder) -> None:
        calls.append(0)
        if len(calls) == taken_at:
            (self.tmp / OWNER).write_text('{"host": "elsewhere", "pid": 1, "start": "1", "token": "its own"}')
        original(self)

    monkeypatch.setattr(OutputFolder, "check_owner", taken)
    taken_at = -1
    convert(src, tmp_path / "whole", max_shard_bytes=1 << 20, jobs=1)
    taken_at = len(calls) if last else 2
    calls.clear()
    with pytest.raises(BadCheckpoint, match="another conversion took .*out.tmp over"):
        convert(src, tmp_path / "out", max_shard_bytes=1 << 20, jobs=1)
    assert len(calls) == taken_at and not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.tmp" / OWNER).read_text())["host"] == "elsewhere"
    named = [p for p in (tmp_path / "out.tmp").iterdir() if p.suffix in (".safetensors", ".distcp")]
    assert len(named) >= 2 if last else len(named) == 1


def test_an_output_that_the_inputs_links_lead_into(tmp_path: Path) -> None:
    original = tiny_folders.make(tmp_path / "orig")
    links = tmp_path / "links"
    links.mkdir()
    for file in original.iterdir():
        (links / file.name).symlink_to(file)
    before = files(original)
    for convert in (hf_to_fp8, hf_to_torch_dist):
        with pytest.raises(ValueError, match="the input file .*orig/.* lies in it"):
            convert(links, original, overwrite=True)
    assert files(original) == before
    hf_to_fp8(links, tmp_path / "out")


def test_an_output_that_is_no_folder(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src")
    (tmp_path / "file").write_text("x")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, what in (("file", "no folder"), ("link", "a symbolic link"), ("dangling", "a symbolic link")):
        with pytest.raises(ValueError, match=f"{name} is {what}; OUT must be a folder"):
            hf_to_fp8(src, tmp_path / name, overwrite=True)
        assert not (tmp_path / f"{name}.tmp").exists()
    (tmp_path / "out.tmp").write_text("x")
    with pytest.raises(ValueError, match="out.tmp exists and no conversion made it"):
        hf_to_fp8(src, tmp_path / "out")


def test_overwriting_keeps_a_users_old_folder_and_survives_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    src, out, mine = tiny_folders.make(tmp_path / "src"), tmp_path / "out", tmp_path / "out.old"
    for folder in (out, mine):
        folder.mkdir()
        (folder / "precious").write_text(folder.name)
    rename = os.rename

    def crash(a: Path, b: Path) -> None:
        if b == out:
            raise Interrupted
        rename(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "rename", crash)
        with pytest.raises(Interrupted):
            hf_to_fp8(src, out, overwrite=True)
    [old] = tmp_path.glob("out.old.*")
    assert not out.exists() and (old / "precious").read_text() == "out"
    assert hf_to_fp8(src, out).resumed_shards == 1  # OUT is missing: no --overwrite is needed
    assert str(old) in caplog.text and (old / "precious").read_text() == "out"
    hf_to_fp8(src, out, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old", "src"]
    assert (mine / "precious").read_text() == "out.old"


def test_an_inputs_own_conversion_json_is_left_out(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src")
    for name in OURS:
        (src / name).write_text("{}")
    hf_to_fp8(src, tmp_path / "fp8")
    assert not OURS & set(files(tmp_path / "fp8"))


@pytest.mark.parametrize("verify", [True, False])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool) -> None:
    src = tiny_folders.make(tmp_path / "src")
    original, written, lock = os.pwrite, [0], threading.Lock()

    def pwrite(descriptor: int, data: bytes, offset: int) -> int:
        with lock:
            written[0] += len(data)
        if written[0] > 1_500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", pwrite)
        with pytest.raises(OSError, match="no space left.*finished shards are kept"):
            hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20, verify=verify)
    assert not (tmp_path / "fp8").exists()
    assert not list((tmp_path / "fp8.tmp").glob("*.part"))
    assert hf_to_fp8(src, tmp_path / "fp8", max_shard_bytes=1 << 20).resumed_shards >= 1


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny_folders.make(tmp_path / "src")
    monkeypatch.setattr("fp8slurm.checkpoint.converters.output.OutputFolder.free_bytes", lambda self: 1000)
    with pytest.raises(OSError, match="1000 are free"):
        hf_to_fp8(src, tmp_path / "fp8")
    assert not (tmp_path / "fp8.tmp").exists()


def test_verification_finds_a_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny_folders.make(tmp_path / "src")
    original = stream.write_shard

    def write_and_damage(shard, path, *args):
        digests = original(shard, path, *args)
        with path.open("r+b") as file:
            file.seek(shard.layout.nbytes - 1)
            last = file.read(1)[0]
            file.seek(shard.layout.nbytes - 1)
            file.write(bytes([last ^ 1]))
        return digests

    monkeypatch.setattr(stream, "write_shard", write_and_damage)
    # not the sample that is compared with the input, which a bit elsewhere would escape: every byte's check sum
    with pytest.raises(BadCheckpoint, match=r"does not read back as it was written \(at byte"):
        hf_to_fp8(src, tmp_path / "fp8", jobs=1)
    assert not list((tmp_path / "fp8.tmp").glob("*.safetensors*"))
    hf_to_fp8(src, tmp_path / "fp8", verify=False)  # so it was the verification that found it


def test_verification_misses_what_was_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is made at its full length: a piece that is left out reads back as zeros, which are as they were."""
    src = tiny_folders.make(tmp_path / "src")
    monkeypatch.setattr(stream, "PIECE_BYTES", 1 << 10)
    original = Copy.produce

    def forgetful(self: Copy, start: int, stop: int) -> Iterator[object]:
        return iter(()) if (self.info.name, start) == ("model.embed_tokens.weight", 2) else original(self, start, stop)

    monkeypatch.setattr(Copy, "produce", forgetful)
    with pytest.raises(BadCheckpoint, match=r"97280 of 98304 bytes of model.embed_tokens.weight were written"):
        hf_to_fp8(src, tmp_path / "fp8")


def test_verification_compares_with_the_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantizer off by one ulp of a scale writes consistent bytes: only the sample against the input shows it."""
    from fp8slurm.checkpoint.converters import works

    original = works.quantize

    def off(w, **kwargs):
        q = original(w, **kwargs)
        q.scale_inv.view(torch.int32).add_(1)
        return q

    monkeypatch.setattr(works, "quantize", off)
    with pytest.raises(BadCheckpoint, match="does not read back as the input quantizes"):
        hf_to_fp8(tiny_folders.make(tmp_path / "src"), tmp_path / "fp8")


def test_not_finite_weights_are_named_by_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PIECE_BYTES", 1)  # row 300 is in the third piece
    config = tiny_folders.config()
    weights = tiny_folders.tensors(config)
    weights["model.layers.1.mlp.up_proj.weight"][300, 7] = float("nan")
    src = tiny_folders.write(tmp_path / "src", config, weights)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds nan at \[300, 7\]"):
        hf_to_fp8(src, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()


def test_fp8_input_is_refused(tmp_path: Path) -> None:
    src = tiny_folders.make(tmp_path / "src")
    hf_to_fp8(src, tmp_path / "fp8")
    with pytest.raises(BadCheckpoint, match="FP8 already"):
        hf_to_fp8(tmp_path / "fp8", tmp_path / "again")
    with pytest.raises(BadCheckpoint, match="not FP8"):
        fp8_to_hf(src, tmp_path / "again")


def test_contradictions_between_config_and_weights(tmp_path: Path) -> None:
    config = tiny_folders.config() | {"quantization_config": {"quant_method": "fp8"}}
    says_fp8 = tiny_folders.write(
        tmp_path / "says", config, tiny_folders.tensors(config | {"quantization_config": None})
    )
    with pytest.raises(BadCheckpoint, match="quantization_config.*no weight is FP8"):
        hf_to_fp8(says_fp8, tmp_path / "out")
    hf_to_fp8(tiny_folders.make(tmp_path / "src"), tmp_path / "fp8")
    made = json.loads((tmp_path / "fp8/config.json").read_text())
    for key, value in {"fmt": "e5m2", "quant_method": "awq", "weight_block_size": [128]}.items():
        changed = made | {"quantization_config": made["quantization_config"] | {key: value}}
        (tmp_path / "fp8/config.json").write_text(json.dumps(changed))
        with pytest.raises(BadCheckpoint, match=re.escape(repr(value)) + ".*cannot be read"):
            fp8_to_hf(tmp_path / "fp8", tmp_path / "out")
    (tmp_path / "fp8/config.json").write_text(json.dumps(tiny_folders.config()))
    with pytest.raises(BadCheckpoint, match="no quantization_config"):
        fp8_to_hf(tmp_path / "fp8", tmp_path / "out")


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    hf_to_fp8(tiny_folders.make(tmp_path / "src"), tmp_path / "fp8")
    weights = load(tmp_path / "fp8")
    scale = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    for damage, message in (
        (lambda w: w.pop(scale), "q_proj.weight_scale_inv is missing"),
        (
            lambda w: w.update({scale: torch.ones(3, 3)}),
            r"q_proj.weight_scale_inv: shape \[3, 3\] does not fit \[512, 256\]",
        ),
        (lambda w: w.update({scale: w[scale].int()}), "scale_inv is int32; scales can be bfloat16, float16, float32"),
        (lambda w: w.pop(scale.removesuffix("_scale_inv")), "has no FP8 weight"),
    ):
        damaged = dict(weights)
        damage(damaged)
        save_file(damaged, tmp_path / "fp8/model.safetensors")
        with pytest.raises(BadCheckpoint, match=message):
            fp8_to_hf(tmp_path / "fp8", tmp_path / "out")


def test_e5m2_is_not_passed_on_as_if_it_were_bf16(tmp_path: Path) -> None:
    hf_to_fp8(tiny_folders.make(tmp_path / "src"), tmp_path / "fp8")
    weights = load(tmp_path / "fp8")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e5m2)
    save_file(weights, tmp_path / "fp8/model.safetensors")
    with pytest.raises(BadCheckpoint, match="model.norm.weight is e5m2; only e4m3 can be read"):
        fp8_to_hf(tmp_path / "fp8", tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_as_in_qwens_own_fp8_folders(tmp_path: Path, dtype: torch.dtype) -> None:
    hf_to_fp8(tiny_folders.make(tmp_path / "src"), tmp_path / "fp8")
    weights = load(tmp_path / "fp8")
    rounded = {n: w.to(dtype) if n.endswith("_scale_inv") else w for n, w in weights.items()}
    save_file(rounded, tmp_path / "fp8/model.safetensors")
    fp8_to_hf(tmp_path / "fp8", tmp_path / "back")
    for name, w in load(tmp_path / "back").items():
        if name + "_scale_inv" in rounded:
            scale = rounded[name + "_scale_inv"].float()
            assert same(w, dequantize_reference(BlockFP8(weights[name], scale)).bfloat16())


def test_blocks_that_are_not_square(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[rows, columns], in pieces that begin and end inside blocks."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 100 * 256)
    config, block = tiny_folders.config(layers=1), (64, 128)
    weights, expected = tiny_folders.tensors(config), {}
    for name, w in list(weights.items()):
        expected[name] = w
        if decide(name, w.shape).quantize:
            q = quantize_reference(w, block)
            weights[name], weights[name + "_scale_inv"] = q.data, q.scale_inv
            expected[name] = dequantize_reference(q).bfloat16()
    values = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    src = tiny_folders.write(tmp_path / "src", config | {"quantization_config": values}, weights)
    fp8_to_hf(src, tmp_path / "back")
    back = load(tmp_path / "back")
    assert sorted(back) == sorted(expected) and [n for n, w in expected.items() if not same(back[n], w)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_dist_gives_back_the_dtype_it_was_saved_in(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_folders.config(layers=1)
    weights = tiny_folders.tensors(config, dtype=dtype)
    src = tiny_folders.write(tmp_path / "src", config, weights)
    hf_to_torch_dist(src, tmp_path / "dist")
    torch_dist_to_hf(tmp_path / "dist", tmp_path / "back", origin_hf_dir=src)
    back = load(tmp_path / "back")
    assert sorted(back) == sorted(weights) and [n for n, w in weights.items() if not same(back[n], w)] == []
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    # and what is made FP8 in one pass is made from all its bits
    torch_dist_to_fp8(tmp_path / "dist", tmp_path / "fp8", origin_hf_dir=src)
    name = "model.layers.0.mlp.up_proj.weight"
    q, made = quantize_reference(weights[name]), load(tmp_path / "fp8")
    assert same(made[name], q.data) and same(made[name + "_scale_inv"], q.scale_inv)


def test_one_layer_in_another_dtype_is_refused_by_torch_dist(tmp_path: Path) -> None:
    config = tiny_folders.config()
    name = "model.layers.1.mlp.down_proj.weight"
    for other, first in ((name, "model.layers.0.mlp.down_proj.weight"), (name.replace("down", "up"), None)):
        weights = tiny_folders.tensors(config)
        weights[other] = weights[other].float()
        src = tiny_folders.write(tmp_path / other, config, weights)
        first = re.escape(first or "model.layers.0.mlp.gate_proj.weight")
        with pytest.raises(
            ValueError, match=rf"{first} \(bfloat16\) and {re.escape(other)} \(float32\) become one tensor"
        ):
            hf_to_torch_dist(src, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt.tmp").exists()


def test_folder_damage(tmp_path: Path) -> None:
    def damaged(name: str, change) -> Path:
        folder = tiny_folders.make(tmp_path / name, files=2)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(folder, index)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    def swap(folder: Path, index: dict) -> None:
        index["weight_map"] = {n: second if file == first else first for n, file in index["weight_map"].items()}

    cases = {
        "missing": (lambda f, i: (f / first).unlink(), "shard model-00001.* is missing"),
        "truncated": (lambda f, i: os.truncate(f / first, 100_000), "truncated"),
        "ghost": (lambda f, i: i["weight_map"].update(ghost=first), "names ghost"),
        "left_out": (lambda f, i: i["weight_map"].pop("model.norm.weight"), "model.norm.weight.*nowhere"),
        "outside": (lambda f, i: i["weight_map"].update(ghost="../x.safetensors"), "no safetensors file of this"),
        "stray": (lambda f, i: (f / "a.safetensors").touch(), "stray/a.safetensors is not mentioned in"),
        "elsewhere": (swap, "has it in"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(BadCheckpoint, match=message):
            hf_to_fp8(damaged(name, change), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    with pytest.raises(FileNotFoundError):
        hf_to_fp8(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadCheckpoint, match="config.json"):
        hf_to_fp8(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("total", [1, -1, 2.5, "4 GB", None, [1]])
def test_a_total_size_that_is_none_is_no_damage(
    tmp_path: Path, total: object, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody reads it: transformers and SGLang do not, and a converter in use writes the number of parameters there."""
    folder = tiny_folders.make(tmp_path / "src", files=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = total
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(open_hf(folder).tensors) == len(index["weight_map"])
    assert ("total_size is" in caplog.text) == (total is not None)


def test_memory_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = tiny_folders.make(tmp_path / "src")
    with pytest.raises(ValueError, match="--max-memory 1 MiB.*needed"):
        hf_to_fp8(src, tmp_path / "fp8", memory_mib=1, jobs=20)
    with monkeypatch.context() as many_cores:
        many_cores.setattr("os.sched_getaffinity", lambda _: range(64))
        hf_to_fp8(src, tmp_path / "few", memory_mib=1)
    hf_to_fp8(src, tmp_path / "one", jobs=1)
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "few" / file.name).read_bytes()
    with pytest.raises(ValueError, match="--jobs 0"):
        hf_to_fp8(src, tmp_path / "fp8", jobs=0)


def test_transformers_loads_it_and_agrees_with_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config
    from transformers.quantizers import quantizer_finegrained_fp8

    # asked for, but only used to place weights on several devices
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)

    src = tiny_folders.make(tmp_path / "src", tie=False)
    hf_to_fp8(src, tmp_path / "fp8")
    fp8_to_hf(tmp_path / "fp8", tmp_path / "bf16")
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected = load(tmp_path / "bf16")
    state = quantized.state_dict()
    assert set(state) == set(expected)
    for name, w in expected.items():
        assert same(state[name], w), name
    assert len(open_hf(tmp_path / "bf16").tensors) == len(expected)
