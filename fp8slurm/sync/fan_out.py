"""One stream of buckets for several engines, in step.

    consumer:  asks for bucket k (it is done with k - 2) -> waits -> has k ...
    producer:  all consumers that are left have asked -> takes k from the source -> hands it to all of them

A bucket may be overwritten once the next but one is asked for (sync/receiver.py), so the source is asked only when the
slowest consumer asks. A consumer that fails leaves; without any the source is still taken to its end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from fp8slurm.sync.bucket import WeightBucket


class FanOut:
    """Every consumer, numbered from 0, iterates over `buckets` in a thread of its own while `produce` runs."""

    def __init__(self, consumers: int) -> None:
        self._present = set(range(consumers))
        self._waiting: set[int] = set()
        self._changed = threading.Condition()
        self._turn = 0
        self._bucket: WeightBucket | None = None
        self._error: BaseException | None = None

    def produce(self, source: Iterator[WeightBucket]) -> None:
        """Hand out all of `source`; what it raises is raised here and in all consumers."""
        bucket: WeightBucket | None = None
        while bucket is not None or not self._turn:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting >= self._present)
            try:
                bucket = next(source, None)
            except BaseException as error:
                self._hand(None, error)
                raise
            self._hand(bucket, None)

    def _hand(self, bucket: WeightBucket | None, error: BaseException | None) -> None:
        with self._changed:
            self._bucket, self._error = bucket, error
            self._waiting.clear()
            self._turn += 1
            self._changed.notify_all()

    def buckets(self, consumer: int) -> Iterator[WeightBucket]:
        """The buckets in order; the consumer must `leave` afterwards, however it ends."""
        turn = 0
        while True:
            with self._changed:
                self._waiting.add(consumer)
                self._changed.notify_all()
                turn += 1
                self._changed.wait_for(lambda: self._turn >= turn)
                bucket, error = self._bucket, self._error
            if error is not None:
                raise RuntimeError(f"the stream of weights ended early: {error}") from error
            if bucket is None:
                return
            yield bucket

    def leave(self, consumer: int) -> None:
        """This consumer asks for nothing any more."""
        with self._changed:
            self._present.discard(consumer)
            self._changed.notify_all()
