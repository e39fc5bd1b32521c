"""One stream of buckets into several consumers: in step, whoever fails."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fp8slurm.sync.bucket import WeightBucket
from fp8slurm.sync.fan_out import FanOut


def source(count: int, buffers: list[torch.Tensor], fails_at: int | None = None):
    """As sync/receiver.py hands them out: a buffer is written again when the next but one is asked for."""
    for i in range(count):
        if i == fails_at:
            raise OSError("the trainer is gone")
        buffers[(i + 1) % 3].fill_((i + 1) % 256)  # the next one arrives already
        if i == 0:
            buffers[0].fill_(0)
        yield WeightBucket(3, (), buffers[i % 3])


def consume(fan: FanOut, number: int, until: int | None = None) -> list[int]:
    """Load like EngineLink: bucket k is in use until k + 1 has been asked for and k is finished."""
    seen = []
    try:
        before = None
        for bucket in fan.buckets(number):
            if before is not None:
                seen.append(int(before.payload.unique()))
            before = bucket
            if len(seen) == until:
                raise RuntimeError("this engine died")
        seen.append(int(before.payload.unique()))
        return seen
    finally:
        fan.leave(number)


@pytest.mark.parametrize("consumers", [1, 2, 5])
def test_every_consumer_sees_every_bucket_unharmed(consumers):
    fan = FanOut(consumers)
    with ThreadPoolExecutor(consumers) as pool:
        done = [pool.submit(consume, fan, i) for i in range(consumers)]
        fan.produce(source(40, [torch.zeros(4096, dtype=torch.uint8) for _ in range(3)]))
    assert all(d.result() == list(range(40)) for d in done)


def test_one_that_fails_does_not_disturb_the_others_and_the_source_is_taken_to_its_end():
    fan, taken = FanOut(3), []
    buffers = [torch.zeros(4096, dtype=torch.uint8) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(consume, fan, i, until) for i, until in enumerate((None, 4, None))]
        fan.produce(bucket for bucket in source(30, buffers) if not taken.append(1))
    assert [d.exception() is None for d in done] == [True, False, True] and len(taken) == 30
    assert done[0].result() == done[2].result() == list(range(30))
    fan, taken = FanOut(1), []
    fan.leave(0)
    fan.produce(bucket for bucket in source(30, buffers) if not taken.append(1))
    assert len(taken) == 30, "without any consumer the trainer would wait for ever"


def test_an_error_of_the_source_reaches_everybody():
    fan, before = FanOut(2), set(threading.enumerate())
    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(consume, fan, i) for i in range(2)]
        with pytest.raises(OSError, match="the trainer is gone"):
            fan.produce(source(30, [torch.zeros(16, dtype=torch.uint8) for _ in range(3)], fails_at=7))
    assert all("the trainer is gone" in str(d.exception()) for d in done)
    assert not set(threading.enumerate()) - before
