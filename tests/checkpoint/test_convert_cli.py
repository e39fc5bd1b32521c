"""`fp8slurm convert` and the scripts under the familiar names: flags, exit statuses, --list, --dry-run, memory."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_folders
import torch

from fp8slurm.checkpoint.converters.cli import main, size
from fp8slurm.checkpoint.formats.safetensors_file import TensorInfo, lay_out
from fp8slurm.run.directory import RunDirectory, RunState

ROOT = Path(__file__).parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_all_five(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = str(tiny_folders.make(tmp_path / "hf", moe=True, tie=False))
    path = {n: str(tmp_path / n) for n in ("fp8", "bf16", "ckpt", "back", "one-pass")}
    assert main(["hf-to-fp8", hf, path["fp8"], "--jobs", "1", "--max-shard-size", "1MB", "--quiet"]) == 0
    assert "tensors" in capsys.readouterr().out
    assert main(["fp8-to-hf", path["fp8"], path["bf16"], "--no-verify"]) == 0
    assert main(["hf-to-torch-dist", hf, path["ckpt"], "--max-memory", "64"]) == 0
    assert main(["torch-dist-to-hf", path["ckpt"], path["back"], "--origin-hf-dir", hf]) == 0
    arguments = ["torch-dist-to-fp8", path["ckpt"], path["one-pass"], "--origin-hf-dir", hf, "--max-shard-size", "1MB"]
    assert main(arguments) == 0
    assert files(Path(path["one-pass"])) == files(Path(path["fp8"]))


def test_list_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tiny_folders.make(tmp_path / "hf", moe=True, tie=False)
    assert main(["hf-to-fp8", str(hf), "--list", "--modules-to-not-convert", "layers.1.self_attn.o_proj"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(tiny_folders.tensors(tiny_folders.config(tie=False, moe=True)))
    decisions = {line.split()[3]: (line.split()[0], line.split("(")[1].rstrip(")")) for line in lines}
    assert decisions["lm_head.weight"] == ("keep", "output head")
    assert decisions["model.layers.0.mlp.gate.weight"] == ("keep", "router")
    assert decisions["model.layers.1.self_attn.o_proj.weight"] == (
        "keep",
        "modules_to_not_convert: layers.1.self_attn.o_proj",
    )
    assert decisions["model.layers.0.mlp.experts.3.down_proj.weight"] == ("fp8", "expert weight")


@pytest.mark.parametrize("name", ["hf-to-fp8", "hf-to-torch-dist"])
def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    hf = tiny_folders.make(tmp_path / "hf")
    assert main([name, str(hf), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "free" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tiny_folders.make(tmp_path / "hf")
    for arguments, message in (
        (["hf-to-fp8", str(tmp_path / "nowhere"), str(tmp_path / "out")], "no such folder"),
        (["hf-to-fp8", str(hf), str(hf)], "outside the input"),
        (["hf-to-fp8", str(hf)], "OUT is missing"),
        (["hf-to-fp8", str(hf), str(tmp_path / "out"), "--jobs", "0"], "--jobs 0"),
        (["torch-dist-to-hf", str(hf), str(tmp_path / "out"), "--origin-hf-dir", str(hf)], "no torch_dist checkpoint"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith(f"fp8slurm convert {arguments[0]}: ") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["hf-to-fp8", str(hf), str(tmp_path / "out"), "--max-shard-size", "many"])
    with pytest.raises(SystemExit):
        main(["hf-to-fp8", str(hf), str(tmp_path / "out"), "--max-shard-size", "5"])
    assert "'5' is 5 bytes, at least 1MB is needed" in capsys.readouterr().err


def test_an_error_of_the_disk_names_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, out = tiny_folders.make(tmp_path / "hf"), tmp_path / "out"

    def refused(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    assert main(["hf-to-fp8", str(hf), str(out)]) == 1
    assert capsys.readouterr().err == f"fp8slurm convert hf-to-fp8: {out}.tmp: Permission denied\n"


def test_a_damaged_checkpoint_of_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the files that hold the model: others, such as the random state, are not read."""
    hf = str(tiny_folders.make(tmp_path / "hf"))
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    saving = run.begin_checkpoint(RunState("rl", 1))
    assert main(["hf-to-torch-dist", hf, str(saving / "made"), "--quiet"]) == 0
    for file in (saving / "made").iterdir():
        file.rename(saving / file.name)
    (saving / "made").rmdir()
    saved = run.commit_checkpoint(saving, RunState("rl", 1))
    (saved / "__objects.distcp").write_bytes(b"altered")
    arguments = [str(saved), str(tmp_path / "out"), "--origin-hf-dir", hf]
    assert main(["torch-dist-to-hf", *arguments]) == 0
    data = bytearray((saved / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (saved / "__0_0.distcp").write_bytes(data)
    for name in ("torch-dist-to-hf", "torch-dist-to-fp8"):
        assert main([name, *arguments, "--overwrite"]) == 2
        message = f"{saved}: a damaged checkpoint of a run: __0_0.distcp was altered (SHA-256)"
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out.tmp").exists()


def test_sizes() -> None:
    assert [size(t) for t in ("5GB", "512MiB", "1.5 kb", "7")] == [5 * 10**9, 512 << 20, 1500, 7]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=100,
    )


def test_scripts_under_the_familiar_names(tmp_path: Path) -> None:
    hf = tiny_folders.make(tmp_path / "hf")
    block = ["--strategy", "block", "--block-size"]
    bad = script("convert_hf_to_fp8.py", "--model-dir", hf, "--save-dir", tmp_path / "fp8", *block, 64, 64)
    assert bad.returncode == 2 and "128 128" in bad.stderr
    done = script("convert_hf_to_fp8.py", "--model-dir", hf, "--save-dir", tmp_path / "fp8", *block, 128, 128)
    assert done.returncode == 0, done.stderr
    done = script("convert_hf_to_torch_dist.py", "--hf-checkpoint", hf, "--save", tmp_path / "ckpt")
    assert done.returncode == 0, done.stderr
    origin = ["--origin-hf-dir", hf]
    done = script(
        "convert_torch_dist_to_hf.py", "--input-dir", tmp_path / "ckpt", "--output-dir", tmp_path / "back", *origin
    )
    assert done.returncode == 0, done.stderr
    assert main(["hf-to-fp8", str(tmp_path / "back"), str(tmp_path / "fp8b")]) == 0
    assert files(tmp_path / "fp8") == files(tmp_path / "fp8b")


MEASURE = """
import sys
from pathlib import Path
from fp8slurm.checkpoint import hf_to_fp8
def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10
before = peak()
hf_to_fp8(sys.argv[1], sys.argv[2], memory_mib=64, jobs=2)
print(peak() - before)
"""


def test_memory_does_not_follow_the_model(tmp_path: Path) -> None:
    """Half a gigabyte of weights, a tensor of 200 MB among them, within 64 MiB above the imports."""
    infos = [
        TensorInfo("model.embed_tokens.weight", torch.bfloat16, (40_000, 2560)),
        TensorInfo("model.layers.0.mlp.down_proj.weight", torch.bfloat16, (2560, 9728)),
        TensorInfo("model.layers.0.mlp.up_proj.weight", torch.bfloat16, (50_000, 2560)),
    ]
    layout = lay_out("model.safetensors", infos)
    (tmp_path / "src").mkdir()
    (tmp_path / "src/config.json").write_text(json.dumps(tiny_folders.config()))
    with (tmp_path / "src/model.safetensors").open("wb") as file:  # a sparse file: all weights are 0
        file.write(layout.header)
        file.truncate(layout.nbytes)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "src"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64


def test_a_list_that_is_cut_off_is_no_error(tmp_path):
    import subprocess
    import sys

    from tiny import write_model

    write_model(tmp_path)
    command = f"{sys.executable} -m fp8slurm.cli convert hf-to-fp8 {tmp_path} --list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Broken pipe" not in done.stderr
