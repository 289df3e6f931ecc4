# SPDX-License-Identifier: Apache-2.0
"""Copy a rank's file into a feed: at once, chunk by chunk as there is room, or shared out so that any thread can help."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter

from .crew import share_out
from .events import Timings
from .feed import Feed, Samples
from .stage import FileData, Part

Batch = Sequence[Part]
"""Parts that one thread copies in one go."""


def batches(data: FileData, chunk: int, select: Callable[[str], bool] = lambda name: True) -> list[Batch]:
    """All parts of a file, of tensors whose name is selected, in batches of about ``chunk`` bytes."""
    found: list[Batch] = []
    for start in range(0, data.nbytes, chunk):
        batch = [part for part in data.parts(start, min(start + chunk, data.nbytes)) if select(part.name)]
        if batch:
            found.append(batch)
    return found


def stage_through_ring(data: FileData, feed: Feed, sample: Callable[[], Samples], timings: Timings) -> None:
    """Copy chunk after chunk, each when the writer has made room for it. Returns when all is staged."""
    for index in range(feed.chunks):
        position = feed.room(index)
        start = index * feed.chunk
        stop = min(start + feed.chunk, data.nbytes)
        with timings.measure("stage", stop - start):
            for part in data.parts(start, stop):
                data.copy(part, feed.memory, position + part.offset - start)
        feed.filled(index)
    feed.staged(sample())


def stage_at_once(data: FileData, feed: Feed, batched: Sequence[Batch], threads: int, timings: Timings) -> None:
    """Copy batches to their places in memory that holds the whole file."""

    def copy(batch: Batch) -> None:
        for part in batch:
            data.copy(part, feed.memory, part.offset)

    with timings.measure("stage", data.nbytes):
        share_out(copy, batched, threads, "shardckpt-stage")


class LazyStaging:
    """Copies batches in the background; whoever is about to change the tensors helps, and waits until all is copied."""

    def __init__(
        self,
        data: FileData,
        feed: Feed,
        batched: Sequence[Batch],
        finish: Callable[[], None],
        on_wait: Callable[[float], None],
        timings: Timings,
    ) -> None:
        """``finish`` runs once, when all is copied, before anybody may change a tensor; ``on_wait`` hears of seconds waited."""
        self._data = data
        self._feed = feed
        self._batches = list(reversed(batched))
        self._busy = 0
        self._settled = False
        self._finish = finish
        self._on_wait = on_wait
        self._timings = timings
        self._changed = threading.Condition()
        self._over = threading.Event()

    def start(self, threads: int) -> None:
        """Begin to copy."""
        for at in range(min(threads, len(self._batches))):
            threading.Thread(target=self._help, name=f"shardckpt-stage-{at}", daemon=True).start()
        self._settle_if_last()

    def wait_before_change(self) -> None:
        """Return when the tensors may be changed. Never raises: a failure is the save's."""
        if self._over.is_set():
            return
        begun = perf_counter()
        self._help()
        self._over.wait()
        self._on_wait(perf_counter() - begun)

    def fail(self, error: Exception) -> None:
        """Give the save up: somebody is going to change the tensors without waiting."""
        self._feed.fail(error)

    def settle(self) -> None:
        """Return when nothing is copied any more; of a save that has failed, what nobody copies yet is left."""
        with self._changed:
            self._batches.clear()
        self._settle_if_last()
        self._over.wait()

    def _help(self) -> None:
        """Copy what nobody copies yet; the thread that ends the last copy finishes."""
        while (batch := self._claim()) is not None:
            error: BaseException | None = None
            try:
                with self._timings.measure("stage", 0):
                    for part in batch:
                        self._data.copy(part, self._feed.memory, part.offset)
            except BaseException as caught:
                error = caught
            self._release(error)

    def _claim(self) -> Batch | None:
        with self._changed:
            if not self._batches:
                return None
            self._busy += 1
            return self._batches.pop()

    def _release(self, error: BaseException | None) -> None:
        with self._changed:
            self._busy -= 1
            if error is not None:
                self._batches.clear()
                self._feed.fail(error)
        self._settle_if_last()

    def _settle_if_last(self) -> None:
        with self._changed:
            if self._settled or self._busy or self._batches:
                return
            self._settled = True
        try:
            self._finish()
        except BaseException as caught:
            self._feed.fail(caught)
        finally:
            self._over.set()
