"""The doctor on this machine: versions, GPUs as a stand-in nvidia-smi tells them, memory, limits, exit status."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fp8slurm.check.doctor import machine, versions
from fp8slurm.check.doctor.bandwidth import judge
from fp8slurm.check.doctor.cli import main
from fp8slurm.check.doctor.files import check_folder, check_paths
from fp8slurm.check.doctor.finding import Finding, merge, worst
from fp8slurm.check.doctor.gpu import check_gpus, nvlink
from fp8slurm.check.doctor.machine import check_machine
from fp8slurm.check.doctor.network import check_ports
from fp8slurm.check.doctor.node import compare_paths
from fp8slurm.check.doctor.quick import quick
from fp8slurm.config import parse

ROOT = Path(__file__).parents[3]
H200 = "NVIDIA H200, GPU-{i}, 580.95.05, 9.0, 143771, 1, 0"


def texts(findings, level: str) -> list[str]:
    return [f.text for f in findings if f.level == level]


@pytest.fixture
def config(tmp_path):
    return parse("tiny-fp8", [f"--run.root={tmp_path}"])


@pytest.fixture
def four_b(tmp_path):
    return parse("qwen3-4b-fp8", [f"--run.root={tmp_path}"])


# -- versions ----------------------------------------------------------------------------------------------------------


def test_this_environment_is_the_set_that_was_run(config):
    assert versions.chosen_set().name == "cpu"
    assert {f.level for f in versions.check_versions([config])} == {"ok"}


def pinned(*files: str) -> dict[str, str]:
    """Package -> version, of files in requirements/."""
    lines = "\n".join((ROOT / "requirements" / f).read_text() for f in files).splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_sets_are_those_of_the_requirements():
    for name, files in {"cpu": ("torch.txt", "cpu.txt"), "gpu": ("gpu.txt",)}.items():
        chosen = next(s for s in versions.SETS if s.name == name)
        assert chosen.packages.items() <= pinned(*files).items()


def test_both_sets_have_the_same_versions_of_what_makes_numbers_and_tokens():
    """Other packages may differ: some of the CPU's were newer when it was made."""
    cpu, gpu = pinned("torch.txt", "cpu.txt"), pinned("gpu.txt")
    for package in versions.SETS[0].packages:
        assert cpu[package] == gpu[package], package


def test_the_table_in_the_docs_is_the_one_in_the_code():
    assert versions.table() in (ROOT / "docs" / "install.md").read_text()


def test_a_missing_package_and_a_wrong_version_are_named(tmp_path):
    """In an environment that really lacks one package and has another version of a second."""
    import importlib.metadata

    site = tmp_path / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    site.mkdir(parents=True)
    here = Path(importlib.metadata.distribution("torch").locate_file(""))
    for entry in here.iterdir():
        if not entry.name.startswith(("math_verify", "megatron_core-", "__editable__")):
            (site / entry.name).symlink_to(entry)
    (site / "megatron_core-0.18.0.dist-info").mkdir()
    (site / "megatron_core-0.18.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.18.0\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "pyvenv.cfg").write_text(f"home = {Path(os.path.realpath(sys.executable)).parent}\n")
    done = subprocess.run(
        [tmp_path / "bin" / "python", "-m", "fp8slurm.cli", "doctor", "--quick", "--json"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    findings = {f["text"]: f["fix"] for f in json.loads(done.stdout)["findings"] if f["level"] == "error"}
    assert "math-verify==0.9.0" in findings["math-verify is not installed"]
    assert "megatron-core==0.19.2" in findings["megatron-core 0.18.0 is installed; the set cpu has 0.19.2"]
    assert len(findings) == 2, findings


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "engine, version, fails",
    [("2.17.1", "9.19.0.56", True), ("2.17.1", "9.24.1.1", False), ("2.16.1", "9.19.0.56", False)],
)
def test_cudnn_that_is_too_old_for_transformer_engine(tmp_path, monkeypatch, engine, version, fails):
    distribution(tmp_path, "transformer-engine", engine)
    distribution(tmp_path, "nvidia-cudnn-cu13", version)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(versions, "system_cudnn", list)
    findings = list(versions.check_cudnn())
    assert bool(texts(findings, "error")) == fails and (
        not fails or "RESHAPE_MODE" in findings[0].text and "9.22" in findings[0].fix
    )


def test_a_second_cudnn_before_the_first(tmp_path, monkeypatch):
    distribution(tmp_path, "transformer-engine", "2.17.1")
    distribution(tmp_path, "nvidia-cudnn-cu13", "9.24.1.1")
    monkeypatch.syspath_prepend(tmp_path)
    old = tmp_path / "usr-lib"
    old.mkdir()
    (old / "libcudnn_graph.so.9.14.0").touch()
    (old / "libcudnn_graph.so.9").symlink_to("libcudnn_graph.so.9.14.0")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(old))
    findings = texts(versions.check_cudnn(), "error")
    assert (
        len(findings) == 1
        and "9.14.0" in findings[0]
        and str(old) in findings[0]
        and "SUBLIBRARY_LOADING_FAILED" in findings[0]
    )


def test_versions_compare_as_numbers():
    assert versions.agrees("2.13.0+cpu", "2.13.0") and not versions.agrees("2.13.1", "2.13.0")
    assert versions.agrees("9.24.1.1", ">=9.22") and not versions.agrees("9.9.0", ">=9.22")


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """smi(lines): nvidia-smi says these GPUs, in the form that QUERY asks for."""

    def install(*lines: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        text = "\n".join(f"{i}, {line.format(i=i)}" for i, line in enumerate(lines))
        program.write_text(f"#!/bin/sh\ncase $1 in --query-gpu*) cat <<'X'\n{text}\nX\n;; esac\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return install


def test_no_gpu_is_an_error_only_for_who_needs_one(config, four_b):
    assert [f.level for f in check_gpus([config])] == ["warning"]
    findings = list(check_gpus([config, four_b]))
    assert [f.level for f in findings] == ["error"] and "--slurm.gpus-per-node 8" in findings[0].text
    assert [f.level for f in check_gpus([four_b], tasks_here=False)] == ["warning"]


def test_eight_good_gpus(smi, four_b):
    smi(*[H200] * 8)
    findings = list(check_gpus([four_b]))
    assert not texts(findings, "error"), findings
    assert any("8 x NVIDIA H200" in t for t in texts(findings, "ok")) and any(
        "9.0: FP8 in trainer" in t for t in texts(findings, "ok")
    )


@pytest.mark.parametrize(
    "line, text, fix",
    [
        ("NVIDIA A100, GPU-{i}, 580.95.05, 8.0, 81920, 1, 0", "capability 8.0: no FP8", "--fp8.backend off"),
        ("NVIDIA L40S, GPU-{i}, 580.95.05, 8.9, 46068, 1, 0", "8.9: the engine serves FP8", "--fp8.engine fp8"),
        ("NVIDIA H200, GPU-{i}, 580.95.05, 9.0, 143771, 90000, 0", "GPU 0: 90000 of 143771 MiB", "nvidia-smi"),
        ("NVIDIA H200, GPU-{i}, 580.95.05, 9.0, 143771, 1, 3", "GPU 0: 3 uncorrected", "--slurm.exclude"),
    ],
)
def test_bad_gpus(smi, four_b, line, text, fix):
    smi(line, *[H200] * 7)
    findings = [f for f in check_gpus([four_b]) if f.level == "error"]
    assert len(findings) == 1 and text in findings[0].text and fix in findings[0].fix


def test_an_old_driver(smi, four_b, monkeypatch):
    monkeypatch.setattr("fp8slurm.check.doctor.gpu.chosen_set", lambda: versions.SETS[1])
    smi(*["NVIDIA H200, GPU-{i}, 550.54.14, 9.0, 143771, 1, 0"] * 8)
    assert any("driver 550.54.14: CUDA 13.0" in t and "580" in t for t in texts(check_gpus([four_b]), "error"))


@pytest.mark.parametrize(
    "line, extra, level, said",
    [
        (H200, [], "ok", "attention of the engines: fa3"),
        (H200, ["--attention-backend", "triton"], "warning", "Triton's"),
        (H200, ["--decode-attention-backend=triton"], "warning", "Triton's"),
        (H200, ["--attention-backend=triton", "--attention-backend", "fa3"], "ok", "attention of the engines: fa3"),
        (H200, ["--kv-cache-dtype", "fp8_e5m2"], "warning", "Triton's"),
        (H200, ["--attention-backend", "flashinfer", "--disable-cuda-graph"], "ok", "engines: flashinfer"),
        ("NVIDIA L40S, GPU-{i}, 580.95.05, 8.9, 46068, 1, 0", [], "ok", "engines: flashinfer"),
    ],
)
def test_the_engines_attention_is_named(smi, four_b, line, extra, level, said):
    smi(*[line] * 8)
    engine = four_b.engine.model_copy(update={"extra_args": extra})
    findings = list(check_gpus([four_b.model_copy(update={"engine": engine})]))
    assert [f.level for f in findings if "attention of the engines" in f.text] == [level]
    (finding,) = (f for f in findings if "attention of the engines" in f.text)
    assert said in finding.text
    if level == "warning":
        assert "nats" in finding.text and "engine.extra_args" in finding.fix


@pytest.mark.parametrize("there", [True, False])
def test_a_kernel_package_without_fa3_is_an_error(smi, four_b, there, tmp_path, monkeypatch):
    package = tmp_path / "site" / "sgl_kernel"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('the doctor imports no kernels')")
    if there:
        (package / "flash_ops.abi3.so").touch()
    distribution(package.parent, "sglang-kernel", "0.4.7")
    monkeypatch.syspath_prepend(package.parent)
    smi(*[H200] * 8)
    errors = texts(check_gpus([four_b]), "error")
    assert errors == [] if there else "engines would not start" in errors[0] and "0.4.7" in errors[0]


def test_only_the_gpus_of_the_job_count(smi, four_b, monkeypatch):
    smi(*[H200] * 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-3")
    assert any("2 GPUs are visible" in t for t in texts(check_gpus([four_b]), "error"))


def test_nvlink_lines():
    eight = "".join(
        f"GPU {i}: NVIDIA H200 (UUID: GPU-{i})\n" + "".join(f"\t Link {k}: 26.562 GB/s\n" for k in range(18))
        for i in range(8)
    )
    assert nvlink(eight).text == "NVLink: 18 links a GPU, 478 GB/s each way"
    assert nvlink("GPU 0: NVIDIA L40S\n").level == "warning"


def test_slow_nccl_is_a_warning_and_gloo_is_not():
    assert [f.level for f in judge({"within": 350e9, "across": 3e9}, "NCCL", 2)] == ["ok", "warning"]
    assert [f.level for f in judge({"within": 1e9, "across": 0.3e9}, "gloo", 2)] == ["ok", "ok"]


# -- memory, limits, files ---------------------------------------------------------------------------------------------


def test_host_memory_is_compared_with_the_plan(four_b, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 64e9, "total": 64e9})())
    findings = [f for f in check_machine([four_b], plans=True) if f.check == "memory"]
    assert (
        [f.level for f in findings] == ["error"]
        and "GB of host memory" in findings[0].text
        and "--slurm.memory 0" in findings[0].fix
    )


@pytest.mark.parametrize(
    "controllers, base, name", [("", ".", "memory.max"), ("memory", "memory", "memory.limit_in_bytes")]
)
def test_the_cgroups_limit_counts(tmp_path, monkeypatch, four_b, controllers, base, name):
    process, job = tmp_path / "cgroup", tmp_path / base / "slurm" / "job_1"
    process.write_text(f"5:cpu:/elsewhere\n0:{controllers}:/slurm/job_1/step_0\n")
    (job / "step_0").mkdir(parents=True)
    (job / "step_0" / name).write_text("max" if not controllers else str(2**63 - 4096))
    (job / name).write_text(str(32 * 10**9))
    (job.parent / name).write_text(str(64 * 10**9))
    assert sorted(machine.cgroup_limits(process, tmp_path)) == [32 * 10**9, 64 * 10**9]
    monkeypatch.setattr(machine, "cgroup_limits", lambda: [10**9, 2 * 10**9])
    (finding,) = (f for f in check_machine([four_b], plans=True) if f.check == "memory")
    assert finding.level == "error" and "1 GB are free here, the cgroup's limit" in finding.text


def test_few_open_files():
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))\n"
        "from fp8slurm.check.doctor.machine import check_machine\n"
        "print([f.text for f in check_machine([], False) if f.level == 'error'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "open files: 512 (hard limit 512)" in out
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 512


def test_the_folder_of_the_runs(tmp_path):
    assert texts(check_folder(tmp_path), "ok") and not list(tmp_path.iterdir())
    assert texts(check_folder(tmp_path / "not" / "there" / "yet"), "ok") and not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_folder_of_somebody_else(tmp_path):
    tmp_path.chmod(0o700)
    code = (
        "from pathlib import Path; from fp8slurm.check.doctor.files import check_folder;"
        f" print(list(check_folder(Path({str(ROOT / 'docs')!r}))))"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "cannot create a folder: Permission denied" in done.stdout, done.stdout + done.stderr


def test_a_path_that_is_missing_or_differs_between_nodes(config, tmp_path):
    config = parse("tiny-fp8", [f"--model.hf-checkpoint={tmp_path / 'none'}"])
    assert any("--model.hf-checkpoint" in t and "No such file" in t for t in texts(check_paths([config])[0], "error"))
    assert not compare_paths({"node1": {"/data": "a"}, "node2": {"/data": "a"}})
    assert compare_paths({"node1": {"/data": "a"}, "node2": {"/data": "b"}})[0].node == "node1,node2"


def test_ports_on_an_address_that_is_not_here():
    assert texts(check_ports("127.0.0.1"), "ok")
    assert "Cannot assign" in texts(check_ports("192.0.2.1"), "error")[0]


# -- what is said ------------------------------------------------------------------------------------------------------


def test_equal_findings_of_all_nodes_are_one_line():
    one, two, other = (Finding("shm", "ok", t, node=n) for t, n in (("a", "n1"), ("a", "n2"), ("b", "n2")))
    assert [(f.text, f.node) for f in merge([one, two, other], 2)] == [("a", ""), ("b", "n2")]
    assert worst([]) == "ok" and worst([one, Finding("x", "error", "")]) == "error"


def test_exit_status_and_json(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] in ("ok", "warning")
    assert main(["--quick", "--recipe", "tiny-fp8"]) == 1, "neither model nor data are in an empty folder"
    shown = capsys.readouterr().out
    assert "--model.hf-checkpoint models/tiny" in shown and "->" in shown and "errors" in shown
    with pytest.raises(ValueError, match="--recipe"):
        main(["--slurm.nodes", "2"])
    with pytest.raises(ValueError, match="no such recipe"):
        main(["--recipe", "nonsense"])
    with pytest.raises(ValueError, match="--svg .*/no/x.svg: there is no folder .*/no$"):
        main(["--svg", str(tmp_path / "no" / "x.svg")])


def test_the_quick_part_refuses_what_cannot_run_and_only_warns_of_another_version(
    config, four_b, tmp_path, monkeypatch
):
    assert quick(config) == []
    local = parse("qwen3-4b-fp8", [f"--run.root={tmp_path}", "--slurm.executor=local"])
    with pytest.raises(ValueError, match="gpus-per-node 8"):
        quick(local)
    distribution(tmp_path, "sglang", "0.5.20")
    monkeypatch.syspath_prepend(tmp_path)
    assert ["sglang 0.5.20" in line for line in quick(config)] == [True]


def test_the_quick_part_does_not_import_torch():
    code = (
        "import sys; from fp8slurm.config import parse; from fp8slurm.check.doctor.quick import quick\n"
        "quick(parse('tiny-fp8', [])); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
