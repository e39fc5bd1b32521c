"""What fp8slurm reads that it did not write, and what must come of a damaged one.

A surface makes something good once, damages it (`damage`), and reads it as a user would (`read`). `read` returns where
the damage did no harm, having compared what it got with an oracle, raises Refused with what a user is told, or raises
something else, which is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_run
import test_compare
import test_config_reading
import tiny
import tiny_folders
import torch
from damage import VALUES, bytes_damaged, damaged, json_damaged, lines_damaged, value_damaged
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from fp8slurm.cli import main
from fp8slurm.core.errors import InputError


class Refused(Exception):
    """What was told, and the files of which one must be named in it."""

    def __init__(self, said: str, names: list[str]) -> None:
        super().__init__(said)
        self.said, self.names = said, names


class WrongResult(AssertionError):
    """Read, but not as it is."""


def agree(ours: Any, theirs: Any, what: str) -> None:
    if ours != theirs:
        raise WrongResult(f"{what}: {ours!r:.300} instead of {theirs!r:.300}")


def command(*arguments: str | Path, names: list[str]) -> str:
    """What a command prints. Refused: status 2."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(map(str, arguments)))
    except SystemExit as error:
        status = int(error.code or 0)
    if status == 2:
        raise Refused(err.getvalue(), names)
    agree(status in (0, 1), True, f"status {status}")
    if status == 1:  # says so too
        raise Refused(err.getvalue() or out.getvalue(), names)
    return out.getvalue()


def called(function: Callable[[], Any], names: list[str]) -> Any:
    """What a function returns. Refused: an InputError."""
    try:
        return function()
    except InputError as error:
        raise Refused(str(error), names) from None


class Surface:
    """One kind of input."""

    cost = 1
    """How many times fewer cases of it are tried than of a cheap one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    def damage(self, rng: random.Random) -> None:
        raise NotImplementedError

    def read(self, rng: random.Random) -> None:
        raise NotImplementedError


class OneFile(Surface):
    """One file of the folder is damaged, and put right again before the next."""

    def files(self) -> list[Path]:
        raise NotImplementedError

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.good = {path: path.read_bytes() for path in self.files()}
        self.path = next(iter(self.good))

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(self.good[self.path])
        self.path = rng.choice(list(self.good))
        self.path.write_bytes(self.damaged(self.path.name, self.good[self.path], rng))

    def damaged(self, name: str, data: bytes, rng: random.Random) -> bytes:
        return damaged(name, data, rng)


class Safetensors(OneFile):
    """A header, as the safetensors library reads it, or refused."""

    def make(self) -> None:
        self.source = tiny_folders.make(self.folder / "hf")

    def files(self) -> list[Path]:
        return [self.source / "model.safetensors"]

    def damaged(self, name: str, data: bytes, rng: random.Random) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + length], data[8 + length :]
        kind = rng.random()
        if kind < 0.2:
            return bytes_damaged(data, rng)
        if kind < 0.3:
            return rng.choice([0, 1, length + 1, length - 1, 2**40, 2**64 - 1]).to_bytes(8, "little") + data[8:]
        header = json_damaged(header, rng) if kind < 0.8 else bytes_damaged(header, rng)
        return len(header).to_bytes(8, "little") + header + rest

    def read(self, rng: random.Random) -> None:
        from fp8slurm.checkpoint.formats.hf_folder import open_hf
        from fp8slurm.checkpoint.formats.sources import HfSource

        folder = called(lambda: open_hf(self.source), ["model.safetensors"])
        ours = HfSource(folder)
        theirs = load_file(self.source / "model.safetensors")
        agree({n: (t.dtype, t.shape) for n, t in ours.tensors.items()},
              {n: (t.dtype, tuple(t.shape)) for n, t in theirs.items()}, "tensors")  # fmt: skip
        for name, tensor in theirs.items():
            same = torch.equal(ours.whole(name).flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
            agree(same, True, f"bytes of {name}")
        ours.close()


class Index(OneFile):
    """The index of three shards: what it says must be what the shards hold."""

    def make(self) -> None:
        self.source = tiny_folders.make(self.folder / "hf", files=3)
        self.truth = json.loads((self.source / "model.safetensors.index.json").read_text())["weight_map"]

    def files(self) -> list[Path]:
        return [self.source / "model.safetensors.index.json"]

    def read(self, rng: random.Random) -> None:
        from fp8slurm.checkpoint.formats.hf_folder import open_hf

        folder = called(lambda: open_hf(self.source), [str(self.source)])
        agree({name: t.path.name for name, t in folder.tensors.items()}, self.truth, "weight_map")


class TorchDist(OneFile):
    """.metadata or the archives, as torch's own reader reads them."""

    def make(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.source = self.folder / "torch_dist"
        g = torch.Generator().manual_seed(0)
        self.shapes = {"a": (6, 4), "b": (8,), "c": (2, 3, 4)}
        state = {name: torch.randn(shape, generator=g) for name, shape in self.shapes.items()}
        dcp.save(state, checkpoint_id=self.source, no_dist=True)

    def files(self) -> list[Path]:
        return [self.source / ".metadata", next(self.source.glob("*.distcp"))]

    def read(self, rng: random.Random) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint import CheckpointException

        from fp8slurm.checkpoint.formats.torch_dist import TorchDistReader

        def read() -> dict[str, torch.Tensor]:
            reader = TorchDistReader(self.source)
            found = {}
            for name, saved in reader.tensors.items():
                if math.prod(saved.shape) > 10_000 or len(saved.shape) < 1:
                    continue
                columns = math.prod(saved.shape[1:])
                found[name] = torch.zeros(saved.shape[0], columns, dtype=saved.dtype)
                reader.read_rows(name, (), 0, saved.shape[0], found[name])
                found[name] = found[name].view(saved.shape)
            reader.close()
            return found

        ours = called(read, [str(self.source)])
        theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
        try:  # what we accepted, torch may read: no name in it is one that is called
            with contextlib.redirect_stderr(io.StringIO()):
                dcp.load(theirs, checkpoint_id=self.source, no_dist=True)
        except (Exception, CheckpointException):  # torch checks other things, such as the CRC of what it does not use
            return
        for name, tensor in ours.items():
            agree(torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), True, f"bytes of {name}")


class Config(OneFile):
    """config.json and generation_config.json: as transformers reads them, or refused."""

    def make(self) -> None:
        self.source = tiny_folders.make(self.folder / "hf")
        for name, config in test_config_reading.PUBLISHED.items():
            (self.folder / f"{name}.json").write_text(json.dumps(config))

    def files(self) -> list[Path]:
        return [
            *sorted(self.folder.glob("*.json")),
            self.source / "config.json",
            self.source / "generation_config.json",
        ]

    def read(self, rng: random.Random) -> None:
        from fp8slurm.config import RunConfig
        from fp8slurm.core.files import read_json
        from fp8slurm.models.layout import check_layout
        from fp8slurm.models.spec import ModelSpec

        if self.path.parent == self.source:
            command("convert", "hf-to-torch-dist", self.source, self.folder / "out", "--dry-run", "--quiet",
                    names=["config.json", str(self.source)])  # fmt: skip
            return
        config = called(lambda: read_json(self.path), [self.path.name])
        spec = called(lambda: ModelSpec.from_hf_config(config, str(self.path)), [self.path.name])
        try:
            test_config_reading.check(config)
        except StrictDataclassError:  # a key that is none of ours; the tokenizer's reader refuses it, too
            return
        sections = {"parallel": {"tensor_parallel_size": rng.choice([1, 2, 3, 64])}}
        parallel = RunConfig.model_validate(sections).parallel
        with contextlib.suppress(InputError):
            check_layout(spec, parallel, fp8=rng.random() < 0.5)


class Tokenizer(OneFile):
    """A tokenizer's files: one that works, or a sentence that names the folder."""

    cost = 2

    def make(self) -> None:
        self.source = self.folder / "model"
        self.source.mkdir()
        tiny.write_model(self.source)

    def files(self) -> list[Path]:
        names = (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
        )
        return [self.source / name for name in names if (self.source / name).exists()]

    def read(self, rng: random.Random) -> None:
        from fp8slurm.config.schema import DataSection
        from fp8slurm.data import prompts

        path = self.folder / "data.jsonl"
        rows = [{"prompt": "12+34=", "label": 46}, {"prompt": [{"role": "user", "content": "1"}], "label": "1"}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def read() -> None:
            prompts._spec_of.cache_clear()
            tokenizer = prompts.load_tokenizer(self.source)
            ends = prompts.end_token_ids(self.source, tokenizer)
            agree(all(type(token) is int for token in ends), True, f"end tokens {ends}")
            for prompt in prompts.load_prompts(DataSection(), tokenizer, path):
                agree(all(type(token) is int for token in prompt.token_ids), True, "tokens")

        called(read, [str(self.source), str(path)])


class Data(Surface):
    """Rows of JSONL: what json reads in the lines that are used."""

    def make(self) -> None:
        from fp8slurm.data.prompts import load_tokenizer

        (self.folder / "model").mkdir()
        tiny.write_model(self.folder / "model")
        self.tokenizer = load_tokenizer(self.folder / "model")
        self.path = self.folder / "data.jsonl"
        rows = [{"prompt": f"{n}+1=", "label": n + 1, "source": "made up", "more": [n, {"x": None}]} for n in range(12)]
        rows += [{"prompt": [{"role": "user", "content": f"{n}?"}], "label": str(n)} for n in range(6)]
        self.good = "".join(json.dumps(row) + "\n" for row in rows).encode()

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(lines_damaged(self.good, rng))

    def read(self, rng: random.Random) -> None:
        from fp8slurm.config.schema import DataSection
        from fp8slurm.data.prompts import load_prompts

        data = DataSection(on_bad_line=rng.choice(["error", "skip"]))
        found = called(lambda: load_prompts(data, self.tokenizer, self.path), [self.path.name])
        lines = self.path.read_bytes().split(b"\n")
        for prompt in found:
            row = json.loads(lines[prompt.index].decode("utf-8-sig"))
            if isinstance(row["prompt"], str) and not row["prompt"].startswith("["):
                tokens = self.tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
                agree(list(prompt.token_ids), tokens, f"tokens of row {prompt.index}")
            label = row["label"]
            whole = isinstance(label, float) and label.is_integer() and abs(label) < 2**53
            agree(prompt.label, str(int(label) if whole else label), f"label of row {prompt.index}")


class Parquet(Data):
    """The same rows as parquet: damaged ones may lose a page, never change a row without a word that Arrow has not."""

    def make(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        super().make()
        self.path = self.folder / "data.parquet"
        rows = [json.loads(line) for line in self.good.splitlines()][:12]
        table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if k != "more"} for row in rows])
        parquet.write_table(table, self.path, compression="snappy", write_page_checksum=True)
        self.good = self.path.read_bytes()

    def damage(self, rng: random.Random) -> None:
        self.path.write_bytes(bytes_damaged(self.good, rng))

    def read(self, rng: random.Random) -> None:
        from fp8slurm.config.schema import DataSection
        from fp8slurm.data.prompts import load_prompts

        called(lambda: load_prompts(DataSection(), self.tokenizer, self.path), [self.path.name])


class Recipe(Surface):
    """Recipes: what was read is what is written out again, and flags are refused as recipes are."""

    def make(self) -> None:
        from fp8slurm.config import read_recipe, recipe_names, to_toml

        self.good = [to_toml(read_recipe(name)).encode() for name in recipe_names()]
        self.path = self.folder / "recipe.toml"

    def damage(self, rng: random.Random) -> None:
        import tomllib

        from fp8slurm.config.load import _toml_value

        data = rng.choice(self.good)
        if rng.random() < 0.4:
            self.path.write_bytes(bytes_damaged(data, rng))
            return
        values = value_damaged(tomllib.loads(data.decode()), rng)
        lines = []
        for section, held in values.items() if isinstance(values, dict) else []:
            if isinstance(held, dict):
                lines.append(f"[{json.dumps(section)}]")
                lines += [
                    f"{json.dumps(k)} = {written}" for k, v in held.items() if (written := _written(v, _toml_value))
                ]
            elif written := _written(held, _toml_value):
                lines.insert(0, f"{json.dumps(section)} = {written}")
        self.path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")

    def read(self, rng: random.Random) -> None:
        from fp8slurm.config import read_recipe, to_toml

        config = called(lambda: read_recipe(self.path), [self.path.name])
        again = self.folder / "again.toml"
        again.write_text(to_toml(config), encoding="utf-8", errors="surrogatepass")
        agree(called(lambda: read_recipe(again), [again.name]), config, "what is written out")


def _written(value: Any, toml_value: Callable[[Any], str]) -> str:
    return "" if value is None else toml_value(value).replace("Infinity", "inf").replace("NaN", "nan")


class RunFolder(OneFile):
    """A run's files, as status, report and compare read them, and as a resume begins."""

    cost = 4

    def make(self) -> None:
        from fp8slurm.run.directory import RunDirectory, RunState

        self.run = made_up_run.write_run(self.folder / "runs/made", steps=10, sft=2, samples=2)
        shutil.rmtree(self.run / "eval/step_000010-fp8")
        scored = {"x": [-1.0, -2.0], "y": [-0.5]}
        for folder in (self.run / "eval/step_000010-fp8", self.folder / "other"):
            test_compare.evaluation(folder, [1, 1, 0, 0, 1], "fp8", n=2, scored=scored)
            task = {"name": "t", "template": "{prompt}", "grader": "exact", "sha256": "0", "temperature": 1.0}
            settings = {"tasks": [task], "stop_token_ids": [1], "chat_template_kwargs": {}, "precision": "fp8"}
            (folder / "settings.json").write_text(json.dumps(settings))
        directory = RunDirectory(self.run)
        directory.acquire()
        directory.release()
        for step in (5, 10):
            saving = directory.begin_checkpoint(RunState("rl", step))
            (saving / "weights.bin").write_bytes(bytes(100))
            directory.commit_checkpoint(saving, RunState("rl", step))

    def files(self) -> list[Path]:
        return sorted(p for p in self.run.rglob("*") if p.is_file() and p.stat().st_size and p.suffix != ".bin")

    def read(self, rng: random.Random) -> None:
        names = [str(self.run), self.path.name]
        kind = rng.choice(["status", "json", "text", "report", "compare", "resume"])
        if self.path.is_relative_to(self.run / "eval") and rng.random() < 0.7:
            kind = "compare"
        if kind == "status":
            command("status", self.run, names=names)
        elif kind == "json":
            json.loads(command("status", self.run, "--json", names=names))
        elif kind == "text":
            command("report", self.run, "--text", "--out", self.folder / "report.md", names=names)
        elif kind == "report":
            command("report", self.run, "--out", self.folder / "report.html", names=names)
        elif kind == "compare":
            command("compare", self.run / "eval/step_000010-fp8", self.folder / "other", names=names)
        else:
            self.resume(names)

    def harmless(self) -> bool:
        """Whether a checkpoint's file says the same: a seal with a space more or an entry less still fits."""
        if self.path.name != "COMPLETE":
            return self.path.read_bytes() == self.good[self.path]
        files = json.loads(self.good[self.path])["files"]
        try:
            now = json.loads(self.path.read_bytes())["files"]
            return bool(now) and all(files.get(name) == entry for name, entry in now.items())
        except (ValueError, KeyError, TypeError, AttributeError):
            return False

    def resume(self, names: list[str]) -> None:
        from fp8slurm.config import read_recipe
        from fp8slurm.observe.metrics import read_metrics
        from fp8slurm.run.directory import RunDirectory
        from fp8slurm.slurm.attempt import check_configuration, finished, holder

        config = read_recipe("tiny-fp8")
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"root": self.run.parent, "name": "made"})}
        )

        def begin() -> None:
            run = RunDirectory(self.run)
            run.check_free(holder)
            check_configuration(config, run)
            finished(config, run, verify=True)
            found = {folder.name: damage for folder, damage in run.checked_checkpoints()}
            inside, name = self.path.parent.name, self.path.name
            if self.path.parent.parent == run.checkpoints and not self.harmless():
                agree(found.get(inside) is not None, True, f"{inside}, whose {name} is damaged, is taken")
            read_metrics(self.run)

        called(begin, names)


class Rewards(Surface):
    """What a reward function returns, and what its process writes: a finite number, or that sample's failure."""

    def make(self) -> None:
        self.line = b""
        self.value: Any = None

    def damage(self, rng: random.Random) -> None:
        answer = rng.choice([
            {"number": 3, "reward": 0.5}, {"number": 3, "reward": 1.0, "parts": {"a": 0.5}},
            {"number": 3, "error": "it raised"}, {"number": 3, "samples": [{"reward": 0.5}, {"reward": 1.0}]},
        ])  # fmt: skip
        self.line = json_damaged(json.dumps(answer).encode(), rng).replace(b"\n", b" ") + b"\n"
        self.value = value_damaged([rng.choice([0.5, [0.5, {"a": 1.0}], [0.5, 1.0]])], rng)
        self.value = rng.choice([self.value, rng.choice(VALUES), tuple(VALUES[:2]), 10**400, float("nan"), object()])
        if isinstance(self.value, list) and len(self.value) == 1 and rng.random() < 0.8:
            self.value = self.value[0]
            if isinstance(self.value, list):
                self.value = tuple(self.value)

    def read(self, rng: random.Random) -> None:
        from fp8slurm.rewards.signature import assess, assess_group

        said = rng.choice([lambda: [assess(self.value)], lambda: [assess_group(self.value, 2)], self.received])()
        errors = []
        for one in [one for answer in said for one in answer.get("samples", [answer])]:
            if "error" in one:
                errors.append(one["error"])
                continue
            numbers = [one["reward"], *one.get("parts", {}).values()]
            agree(all(type(n) is float and math.isfinite(n) for n in numbers), True, f"finite numbers in {one!r:.200}")
        if errors:
            raise Refused(errors[0], [""])

    def received(self) -> list[dict[str, Any]]:
        """What the pool takes from the line that a process wrote, an answer to call 3."""
        from fp8slurm.rewards.pool import _Worker

        worker = _Worker.__new__(_Worker)
        read_end, write_end = os.pipe()
        worker._stdout, worker._buffer, worker.pending, worker.killed = os.fdopen(read_end, "rb"), b"", {3: 1.0}, True
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(self.line)
        with worker._stdout:
            answers = worker.receive()
        agree([number for number, _ in answers], [3], "calls that are answered")
        return [answer for _, answer in answers if not answer.get("lost")]


SURFACES: dict[str, type[Surface]] = {
    "safetensors": Safetensors, "index": Index, "torch_dist": TorchDist, "config": Config, "tokenizer": Tokenizer,
    "data": Data, "parquet": Parquet, "recipes": Recipe, "run_folder": RunFolder, "rewards": Rewards,
}  # fmt: skip
