"""Real Megatron ranks send updates to real engines, in every pairing of layouts: the converter's bytes arrive."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sender import LAST
from tiny import write_model
from w8a8_reference import reference

from fp8slurm.checkpoint import hf_to_fp8
from fp8slurm.config.schema import EngineSection
from fp8slurm.engine.client import EngineClient, GenerateRequest
from fp8slurm.engine.inside.digest import expected_digests, first_difference
from fp8slurm.engine.server import Engine, EngineError, EngineSettings
from fp8slurm.models.names import NameTable
from fp8slurm.models.spec import ModelSpec, QuantizationSpec
from fp8slurm.sync.engine_link import EngineLink
from fp8slurm.sync.groups import Group, host_store, publish
from fp8slurm.sync.plan import source_names
from fp8slurm.sync.receiver import HostReceiver
from fp8slurm.sync.stream import parse_description
from fp8slurm.sync.traffic import traffic

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
BATCH = [GenerateRequest([7 * i % 300, 3, i, 2 * i], 6, seed=i) for i in range(12)]


class Engines:
    """One model in several layouts: (tensor, expert) parallel sizes."""

    def __init__(self, folder: Path, layouts: list[tuple[int, int]], moe: bool = False) -> None:
        self.model = folder / "model"
        self.model.mkdir()
        write_model(self.model, moe=moe)
        hf_to_fp8(self.model, folder / "fp8")
        self.engines = {layout: self._engine(folder, *layout) for layout in layouts}
        for engine in self.engines.values():
            engine.start()
        for engine in self.engines.values():
            engine.wait_ready()

    def _engine(self, folder: Path, tp: int, ep: int) -> Engine:
        section = EngineSection(tensor_parallel_size=tp, expert_parallel_size=ep, max_running_requests=16,
                                max_total_tokens=4096, dtype="float32", ready_timeout_s=240)  # fmt: skip
        return Engine(folder / "fp8", folder / "log", EngineSettings(section, cpu=True, cpu_threads=1), f"tp{tp}ep{ep}")

    def link(self, tp: int, ep: int) -> EngineLink:
        engine = self.engines[tp, ep]
        return EngineLink(EngineClient(engine.url, engine.api_key, timeout_s=120), tp, expert_parallel_size=ep)

    def stop(self) -> None:
        for engine in self.engines.values():
            engine.stop()


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Iterator[Engines]:
    made = Engines(tmp_path_factory.mktemp("layouts"), [(1, 1), (2, 1)])
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expert_engines(tmp_path_factory) -> Iterator[Engines]:
    """TP1 is in tests/e2e/test_tiny_moe.py."""
    made = Engines(tmp_path_factory.mktemp("experts"), [(2, 2)], moe=True)
    yield made
    made.stop()


class Trainers:
    """Training ranks in processes of their own, and this process as their rollout worker."""

    def __init__(self, folder: Path, model: Path, tp: int, pp: int, ep: int) -> None:
        self.folder, self.model, self.tp, self.pp, self.ep = folder, model, tp, pp, ep
        self.world = tp * pp * ep
        self.table = NameTable(ModelSpec.from_hf_dir(model))
        self.store, port = host_store("127.0.0.1")
        publish(folder / "store.json", "127.0.0.1", port)
        self.processes: list[subprocess.Popen] = []

    def start(self, die_in: int = 0) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for rank in range(self.world):
            arguments = [self.folder, rank, self.world, self.model, self.tp, self.pp, self.ep, die_in]
            with open(self.folder / f"rank{rank}.log", "w") as log:
                command = [sys.executable, str(HERE / "sender.py"), *map(str, arguments)]
                self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        names = source_names(self.pp, self.ep if self.table.spec.is_moe else 0)
        plans = {n: parse_description(self._get(f"sync/plan/{n}")) for n in names}
        groups = {n: Group(self.store, f"sync/{n}", 1, 2, "127.0.0.1") for n in names}
        self.receiver = HostReceiver(self.store, [(n, groups[n], plans[n]) for n in names], keep=True)

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
        for rank in range(self.world):
            self._get(f"sent/{version}/{rank}")
        slices: dict[str, dict[int, tuple[torch.Tensor, int | None]]] = {}
        for rank in range(self.world):
            for name, shard in load_file(self.folder / f"{version}.{rank}.safetensors").items():
                world = self.tp if self.table[name].tp_dim is not None else 1
                for piece in self.table[name].split(shard, rank % world, world):
                    data, _ = slices.setdefault(piece.name, {}).setdefault(
                        piece.spec.start, (piece.data, piece.spec.dim)
                    )
                    assert torch.equal(data, piece.data), f"{name} differs between ranks"
        out = {}
        for name, pieces in slices.items():
            parts = [pieces[start][0] for start in sorted(pieces)]
            out[name] = (
                torch.cat(parts, next(iter(pieces.values()))[1] or 0) if len(parts) > 1 else parts[0].contiguous()
            )
        return out


@contextmanager
def trainers(folder: Path, engines: Engines, tp: int, pp: int, ep: int = 1, die_in: int = 0) -> Iterator[Trainers]:
    made = Trainers(folder, engines.model, tp, pp, ep)
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


def send_and_compare(engines: Engines, folder: Path, tp: int = 1, pp: int = 1, ep: int = 1) -> None:
    """All engines hold the converter's bytes after the first and the last update, and compute with them."""
    links = {layout: engines.link(*layout) for layout in engines.engines}
    first, *others = links.values()
    for link in links.values():
        link.open()
    spec = ModelSpec.from_hf_dir(engines.model)
    expected = traffic(NameTable(spec), QuantizationSpec(), 300_000, tensor_parallel_size=tp, pipeline_parallel_size=pp,
                       expert_parallel_size=ep, dtype=torch.float32)  # fmt: skip
    with trainers(folder, engines, tp, pp, ep) as ranks:
        for version in range(1, LAST + 1):
            ranks.store.set(f"go/{version}", "")
            first.update(version, ranks.receiver.receive(version, version, verify=version == 1))
            for link in others:
                link.update(version, iter(ranks.receiver.held))
            for link in links.values():
                assert link.counts == {"loaded": expected.loaded, "buckets": expected.buckets}
            if version not in (1, LAST):
                continue
            shutil.copytree(engines.model, folder / f"hf{version}")
            save_file(ranks.weights(version), folder / f"hf{version}/model.safetensors", metadata={"format": "pt"})
            hf_to_fp8(folder / f"hf{version}", folder / f"fp8{version}")
            converted = {}
            for file in sorted((folder / f"fp8{version}").glob("*.safetensors")):
                converted |= load_file(file)
            for (tensor, expert), link in links.items():
                facts = {"num_key_value_heads": 2, "tie_word_embeddings": spec.tie_word_embeddings}
                facts |= {"tensor_parallel_size": tensor, "expert_parallel_size": expert}
                digests = expected_digests(converted.items(), dtype=torch.float32, **facts)
                assert first_difference(link.client.digest(), digests) is None
                generated = link.client.generate(BATCH, one_batch=True)
                assert {v for g in generated for v in g.weight_versions} == {version}
                assert gap(folder / f"fp8{version}", converted, generated).median() < 1e-4
    for link in links.values():
        for (
            replays
        ) in link.client.recorded():  # all updates but the first are copies that were written down in that one
            assert len(replays) >= expected.buckets and all(n >= LAST - 1 for n in replays)
        link.close()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["TP1", "TP2", "PP2"])
def test_the_converters_bytes_arrive(engines: Engines, tmp_path: Path, tp: int, pp: int) -> None:
    send_and_compare(engines, tmp_path, tp, pp)


def test_experts_arrive_from_expert_parallel_ranks_at_an_expert_parallel_engine(
    expert_engines: Engines, tmp_path: Path
) -> None:
    """Trainer EP2, engine TP2 + EP2: each of the engine's ranks holds four whole experts of the eight."""
    send_and_compare(expert_engines, tmp_path, ep=2)
    held, other = expert_engines.link(2, 2).client.digest()
    assert all(held[name] != other[name] for name in held if ".experts." in name)
    assert all(held[name] == other[name] for name in held if "norm" in name or ".gate." in name)


def test_a_killed_sender_leaves_an_engine_that_serves_nothing(engines: Engines, tmp_path: Path) -> None:
    link = engines.link(1, 1)
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
    engines.engines[1, 1].stop()
