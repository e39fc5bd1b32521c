"""Real Megatron ranks send updates to real engines, in every pairing of layouts: the converter's bytes arrive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from sender import LAST
from w8a8_reference import reference

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.digest import expected_digests, first_difference
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.models.names import NameTable
from fp8slurm.models.qwen3 import ModelSpec, QuantizationSpec
from fp8slurm.models.tiny import write_model
from fp8slurm.sync.engine_link import EngineLink
from fp8slurm.sync.groups import Group, host_store, publish
from fp8slurm.sync.plan import source_names
from fp8slurm.sync.receiver import Receiver
from fp8slurm.sync.stream import parse_description
from fp8slurm.sync.traffic import traffic

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
BATCH = [GenerateRequest([7 * i % 300, 3, i, 2 * i], 6, seed=i) for i in range(12)]


class Engines:
    """The same model at TP 1 and 2."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        self.model.mkdir()
        write_model(self.model)
        hf_to_fp8(self.model, folder / "fp8")
        self.engines = {tp: self._engine(folder, tp) for tp in (1, 2)}
        for engine in self.engines.values():
            engine.start()
        for engine in self.engines.values():
            engine.wait_ready()

    def _engine(self, folder: Path, tp: int) -> Engine:
        section = EngineSection(tensor_parallel_size=tp, max_running_requests=16, max_total_tokens=4096, dtype="float32",
                                ready_timeout_s=240)  # fmt: skip
        return Engine(folder / "fp8", folder / "log", EngineSettings(section, cpu=True, cpu_threads=1), f"tp{tp}")

    def client(self, tp: int) -> EngineClient:
        return EngineClient(self.engines[tp].url, self.engines[tp].api_key, timeout_s=120)


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("layouts"))
    yield made
    for engine in made.engines.values():
        engine.stop()


class Trainers:
    """Training ranks in processes of their own, and this process as their agent."""

    def __init__(self, folder: Path, model: Path, tp: int, pp: int) -> None:
        self.folder, self.model, self.tp, self.pp = folder, model, tp, pp
        self.store, port = host_store("127.0.0.1")
        publish(folder / "store.json", "127.0.0.1", port)
        self.processes: list[subprocess.Popen] = []

    def start(self, die_in: int = 0) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        world = self.tp * self.pp
        for rank in range(world):
            arguments = [self.folder, rank, world, self.model, self.tp, self.pp, die_in]
            with open(self.folder / f"rank{rank}.log", "w") as log:
                command = [sys.executable, str(HERE / "sender.py"), *map(str, arguments)]
                self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        names = source_names(self.pp)
        plans = {n: parse_description(self._get(f"sync/plan/{n}")) for n in names}
        groups = {n: Group(self.store, f"sync/{n}", 1, 2, "127.0.0.1") for n in names}
        self.receiver = Receiver(self.store, [(n, groups[n], plans[n]) for n in names], keep=True)

    def _get(self, key: str) -> str:
        while not self.store.check([key]):
            dead = [p.args for p in self.processes if p.poll() not in (None, 0)]
            assert not dead, "\n".join(p.read_text()[-3000:] for p in sorted(self.folder.glob("rank*.log")))
            try:
                self.processes[0].wait(0.2)
            except subprocess.TimeoutExpired:
                pass
        return self.store.get(key).decode()

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        """The HF tensors of the ranks' shards after that update."""
        for rank in range(self.tp * self.pp):
            self._get(f"sent/{version}/{rank}")
        table = NameTable(ModelSpec.from_hf_dir(self.model))
        slices: dict[str, list[tuple[int, torch.Tensor, int | None]]] = {}
        for rank in range(self.tp * self.pp):
            for name, shard in load_file(self.folder / f"{version}.{rank}.safetensors").items():
                world = self.tp if table[name].tp_dim is not None else 1
                for piece in table[name].split(shard, rank % self.tp if world > 1 else 0, world):
                    slices.setdefault(piece.name, []).append((piece.spec.start, piece.data, piece.spec.dim))
        out = {}
        for name, pieces in slices.items():
            pieces.sort(key=lambda p: p[0])
            if pieces[0][2] is None:
                assert all(torch.equal(p[1], pieces[0][1]) for p in pieces), f"{name} differs between ranks"
                out[name] = pieces[0][1].contiguous()
            else:
                out[name] = torch.cat([p[1] for p in pieces], pieces[0][2])
        return out


@contextmanager
def trainers(folder: Path, engines: Engines, tp: int, pp: int, die_in: int = 0) -> Iterator[Trainers]:
    made = Trainers(folder, engines.model, tp, pp)
    try:
        made.start(die_in)
        yield made
        made.store.set("done", "")
        for process in made.processes:
            process.wait(60)
    finally:
        for process in made.processes:
            process.kill()
            process.wait()


def gap(folder: Path, tensors: dict[str, torch.Tensor], generations) -> torch.Tensor:
    """|engine - transformers| of the log-probability of every generated token."""
    model, gaps = reference(folder, tensors), []
    for request, g in zip(BATCH, generations):
        ids = torch.tensor([[*request.token_ids, *g.token_ids]])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)
        own = logprobs[len(request.token_ids) - 1 : -1].gather(1, ids[0, len(request.token_ids) :, None])[:, 0]
        gaps.append((own - torch.tensor(g.logprobs)).abs())
    return torch.cat(gaps)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["TP1", "TP2", "PP2"])
def test_the_converters_bytes_arrive(engines: Engines, tmp_path: Path, tp: int, pp: int) -> None:
    links = {size: EngineLink(engines.client(size), size) for size in (1, 2)}
    for link in links.values():
        link.open()
    expected = traffic(NameTable(ModelSpec.from_hf_dir(engines.model)), QuantizationSpec(), 300_000,
                       tensor_parallel_size=tp, pipeline_parallel_size=pp, dtype=torch.float32)  # fmt: skip
    with trainers(tmp_path, engines, tp, pp) as ranks:
        for version in range(1, LAST + 1):
            ranks.store.set(f"go/{version}", "")
            links[1].update(version, ranks.receiver.receive(version, version, verify=version == 1))
            links[2].update(version, iter(ranks.receiver.held))
            for link in links.values():
                assert link.counts == {"loaded": expected.loaded, "buckets": expected.buckets}
            if version not in (1, LAST):
                continue
            shutil.copytree(engines.model, tmp_path / f"hf{version}")
            save_file(ranks.weights(version), tmp_path / f"hf{version}/model.safetensors", metadata={"format": "pt"})
            hf_to_fp8(tmp_path / f"hf{version}", tmp_path / f"fp8{version}")
            converted = {}
            for file in sorted((tmp_path / f"fp8{version}").glob("*.safetensors")):
                converted |= load_file(file)
            for size, link in links.items():
                facts = {"num_key_value_heads": 2, "tie_word_embeddings": True, "tensor_parallel_size": size}
                digests = expected_digests(converted.items(), dtype=torch.float32, **facts)
                assert first_difference(link.client.digest(), digests) is None
                generated = link.client.generate(BATCH, one_batch=True)
                assert {v for g in generated for v in g.weight_versions} == {version}
                assert gap(tmp_path / f"fp8{version}", converted, generated).median() < 1e-4
    for link in links.values():
        link.close()


def test_a_killed_sender_leaves_an_engine_that_serves_nothing(engines: Engines, tmp_path: Path) -> None:
    link = EngineLink(engines.client(1), 1)
    link.open()
    with trainers(tmp_path, engines, 1, 1, die_in=2) as ranks:
        ranks.store.set("go/1", "")
        link.update(1, ranks.receiver.receive(1, 1, verify=True), verify=True)
        ranks.store.set("go/2", "")
        with pytest.raises(RuntimeError, match="(?i)connection|closed|reset|peer"):
            link.update(2, ranks.receiver.receive(2, 2, verify=False))
        assert ranks.processes[0].wait(60) == -9
    assert not ranks.receiver.held  # half an update is no update
    with pytest.raises(EngineError, match="must not generate: the update to version 2 failed"):
        link.client.generate(BATCH)
    engines.engines[1].stop()
