"""Commands between rank 0 and a rollout worker, over a real store."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from fp8slurm.rollout import channel
from fp8slurm.rollout.channel import RankChannel, WorkerChannel
from fp8slurm.sync.groups import host_store


def test_a_worker_without_work_beats_and_still_hears_the_command(monkeypatch):
    monkeypatch.setattr(channel, "IDLE_HEARTBEAT", timedelta(milliseconds=50))
    store, port = host_store("127.0.0.1")
    here = dist.TCPStore("127.0.0.1", port, None, is_master=False, wait_for_workers=False)
    ranks = RankChannel(store, SimpleNamespace(rank=0), ranks=1, workers=1)
    beats = threading.Semaphore(0)
    worker = WorkerChannel(here, SimpleNamespace(rank=1, size=2), 1, 0, beats.release)
    heard: list[dict] = []

    def work() -> None:
        heard.append(worker.next())
        worker.answer({"done": 7})

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(3):
        assert beats.acquire(timeout=20), "an idle rollout worker says nothing: the watchdog would end it"
    ((answer, payload),) = ranks.call("evaluate", number=3)
    thread.join(20)
    assert heard == [{"kind": "evaluate", "number": 3}] and answer["done"] == 7 and payload.numel() == 0
