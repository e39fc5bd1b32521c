"""Placement is a pure value: who runs where, on which GPU, in which group."""

import pytest

from fp8slurm.config import RunConfig
from fp8slurm.config.placement import EnginePlace, place


def config(nodes: int, ranks: int, node_gpus: int = 0, **engine) -> RunConfig:
    return RunConfig(slurm={"nodes": nodes, "ranks_per_node": ranks, "gpus_per_node": node_gpus}, engine=engine)


@pytest.mark.parametrize(
    "nodes, ranks, gpus, engine, engines_per_node",
    [
        (1, 1, 0, {}, [()]),
        (1, 2, 0, {}, [()]),
        (2, 2, 0, {}, [()]),
        (1, 8, 8, {"tensor_parallel_size": 8}, [(0, 1, 2, 3, 4, 5, 6, 7)]),
        (1, 8, 8, {"per_node": 4, "tensor_parallel_size": 2}, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (1, 8, 8, {"per_node": 8}, [(i,) for i in range(8)]),
        (2, 8, 8, {"per_node": 2, "tensor_parallel_size": 4}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (16, 4, 4, {"per_node": 4}, [(0,), (1,), (2,), (3,)]),
        (64, 8, 8, {"per_node": 2, "tensor_parallel_size": 4}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (1, 6, 8, {"placement": "split", "gpus": 2, "tensor_parallel_size": 2}, [(6, 7)]),
        (1, 4, 8, {"placement": "split", "gpus": 4, "per_node": 4}, [(4,), (5,), (6,), (7,)]),
        (64, 4, 8, {"placement": "split", "gpus": 4, "per_node": 2, "tensor_parallel_size": 2}, [(4, 5), (6, 7)]),
    ],
)
def test_table(nodes, ranks, gpus, engine, engines_per_node):
    p = place(config(nodes, ranks, gpus, **engine))
    assert p.world_size == nodes * ranks and p.tasks_per_node == ranks + 1 and len(p.tasks) == nodes * (ranks + 1)
    assert [t.index for t in p.tasks] == list(range(len(p.tasks)))
    # Slurm deals tasks in blocks: the node of a task follows from its number alone
    assert all(t.node == t.index // (ranks + 1) for t in p.tasks)
    trainers = [t for t in p.tasks if t.role == "rank"]
    workers = [t for t in p.tasks if t.role == "worker"]
    assert [t.number for t in trainers] == list(range(nodes * ranks))
    assert [(t.number, t.node, t.gpu) for t in workers] == [(n, n, None) for n in range(nodes)]
    for node in range(nodes):
        assert [t.gpu for t in trainers if t.node == node] == list(range(ranks))
        assert p.engines_of(node) == tuple(EnginePlace(node, i, g) for i, g in enumerate(engines_per_node))
        if engine.get("placement") == "split":
            serving = [g for e in p.engines_of(node) for g in e.gpus]
            assert sorted(serving + [t.gpu for t in trainers if t.node == node]) == list(range(gpus))


@pytest.mark.parametrize(
    "settings, says",
    [
        (config(1, 4, 8), "--slurm.ranks-per-node 4"),
        (config(1, 8, 8, per_node=2, tensor_parallel_size=8), "= 16 GPUs"),
        (config(1, 8, 8, gpus=2), "--engine.gpus 2"),
        (config(1, 2, 0, placement="split", gpus=1), "--slurm.gpus-per-node"),
        (config(1, 8, 8, placement="split"), "--engine.gpus 0"),
        (
            config(1, 5, 8, placement="split", gpus=2, tensor_parallel_size=2),
            "--slurm.ranks-per-node 5 + --engine.gpus 2",
        ),
        (config(1, 4, 8, placement="split", gpus=4, per_node=1), "--engine.gpus is 4"),
    ],
)
def test_what_does_not_fit_is_refused(settings, says):
    with pytest.raises(ValueError) as error:
        place(settings)
    assert says in str(error.value)
