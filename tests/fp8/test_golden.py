"""Our quantizers against bytes that TransformerEngine's Float8BlockQuantizer made on a GPU (tools/gpu/te_golden.py)."""

import hashlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fp8slurm.fp8.quantize import quantize, quantize_1x128
from fp8slurm.fp8.reference import quantize_reference

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
FOLDER = Path(__file__).with_name("golden")
FILES = sorted(FOLDER.glob("te_*.xz"))
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
BLOCKS = {"block": (128, 128), "row": (1, 128), "column": (128, 1)}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


cases, store = module("cases"), module("store")


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check(case, codes: torch.Tensor, scale_inv: torch.Tensor, golden: tuple[dict, bytes | None, bytes]) -> None:
    record, golden_codes, golden_scales = golden
    assert as_bytes(scale_inv) == golden_scales, f"scales of {case}"
    mine = as_bytes(codes)
    if golden_codes is None:
        assert hashlib.sha256(mine).hexdigest() == record["sha256"], f"codes of {case}"
    else:
        assert mine == golden_codes, f"codes of {case}"


def golden(path: Path) -> list[tuple]:
    """[(case, what the file holds of it)]."""
    _, records = store.read(path)
    return [(cases.Case(**{k: r[0][k] for k in cases.Case.__dataclass_fields__}), r) for r in records]


def test_the_file_is_there_and_complete() -> None:
    assert FILES, "no golden bytes: tools/gpu/te_golden.py makes them on a GPU"
    wanted = list(cases.cases())
    for path in FILES:
        versions, _ = store.read(path)
        assert path.stem == f"te_{versions['transformer_engine']}"
        assert versions["torch"] and versions["cuda"] and versions["gpu"]
        found = golden(path)
        assert [case for case, _ in found] == wanted
        for case, (record, codes, scales) in found:
            assert "refused" not in record, case
            rows, columns = (-(-n // block) for n, block in zip((case.rows, case.columns), BLOCKS[case.kind]))
            assert len(scales) == 4 * rows * columns, case
            assert "sha256" in record if codes is None else len(codes) == case.rows * case.columns, case


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_same_bytes_as_transformer_engine(path: Path) -> None:
    compared = Counter()
    for case, wanted in golden(path):
        w = case.input()
        q = quantize_reference(w, BLOCKS[case.kind], case.power_of_two)
        check(case, q.data, q.scale_inv, wanted)
        if case.kind == "block" and w.isfinite().all():
            fast = quantize(w, power_of_two=case.power_of_two)
            check(case, fast.data, fast.scale_inv, wanted)
            compared["panels, blocks"] += 1
        if case.kind == "row":
            check(case, *quantize_1x128(w, case.power_of_two), wanted)
            compared["panels, rows"] += 1
        compared[f"reference, {case.kind}"] += 1
    assert compared == {
        "reference, block": 448,
        "reference, row": 140,
        "reference, column": 140,
        "panels, blocks": 442,
        "panels, rows": 140,
    }


@pytest.mark.parametrize("device", DEVICES)
def test_weights_that_are_not_finite_are_refused_though_transformer_engine_takes_them(device: str) -> None:
    refused = [c for c in cases.cases() if c.kind == "block" and c.style in cases.NOT_FINITE]
    assert len(refused) == 6
    for case in refused:
        w = case.input()
        row, column = (~w.isfinite()).nonzero()[0].tolist()
        value = "nan" if case.style == "nan" else "-?inf"
        with pytest.raises(ValueError, match=rf"layers\.7\.w holds {value} at \[{row}, {column}\]"):
            quantize(w.to(device), name="layers.7.w", power_of_two=case.power_of_two)


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_triton_gives_the_bytes_of_transformer_engine(path: Path) -> None:
    compared = 0
    for case, wanted in golden(path):
        w = case.input()
        if case.kind == "block" and w.isfinite().all():
            q = quantize(w.cuda(), power_of_two=case.power_of_two)
            check(case, q.data.cpu(), q.scale_inv.cpu(), wanted)
            compared += 1
    assert compared == 442


def test_the_inputs_are_what_their_names_say() -> None:
    made = {c.seed: c for c in cases.cases()}
    assert len(made) > 400
    by_style: dict[str, torch.Tensor] = {}
    for case in made.values():
        if (
            case.rows * case.columns == 128 * 128
            and case.kind == "block"
            and case.dtype == "bfloat16"
            and not case.power_of_two
        ):
            by_style[case.style] = case.input()
    assert by_style["zero"].count_nonzero() == 0
    assert 0 < by_style["subnormal"].abs().max() < torch.finfo(torch.bfloat16).smallest_normal
    assert by_style["huge"].abs().max() > 1e37 and by_style["huge"].isfinite().all()
    assert by_style["largest"].abs().max() == torch.finfo(torch.bfloat16).max
    assert by_style["nan"].isnan().sum() == 1 and by_style["infinity"].isinf().sum() == 1
    # a checksum: the inputs must be the same wherever the bytes were made
    digest = hashlib.sha256(b"".join(as_bytes(c.input()) for c in list(made.values())[::40]))
    assert digest.hexdigest()[:16] == "3e552ee82235d1c4"


def test_the_file_format_round_trips(tmp_path: Path) -> None:
    records = [
        store.pack_record({"a": 1}, b"123", b"4567"),
        ({"refused": "no"}, b""),
        store.pack_record({"a": 2}, bytes(3000), b"89ab"),
    ]
    store.write(tmp_path / "te_x.xz", {"transformer_engine": "1"}, records)
    versions, back = store.read(tmp_path / "te_x.xz")
    assert versions == {"transformer_engine": "1"}
    assert [(c, s) for _, c, s in back] == [(b"123", b"4567"), (None, b""), (None, b"89ab")]
    assert back[2][0]["sha256"] == hashlib.sha256(bytes(3000)).hexdigest()
