# SPDX-License-Identifier: Apache-2.0
"""Copy a rank's file into a feed: at once, chunk by chunk as there is room, or shared out so that any thread can help."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeAlias

from .checksum import block_digests
from .crew import share_out
from .device_staging import DeviceCopies, DeviceStaging
from .events import Timings
from .feed import Feed, Samples
from .stage import FileData, Part

Batch = Sequence[Part]
"""Parts that one thread copies in one go."""

Select: TypeAlias = Callable[[str], bool]
"""Which tensors, by name."""


def everything(name: str) -> bool:
    """Select all tensors."""
    return True


def stage_through_ring(data: FileData, feed: Feed, block_size: int, sample: Callable[[], Samples], timings: Timings) -> None:
    """Copy chunk after chunk, each when the writer has made room for it, and take its digests while it is in the cache.

    Returns when all is staged. ``block_size`` is that of digests, in bytes.
    """
    for index in range(feed.chunks):
        position = feed.room(index)
        start = index * feed.chunk
        stop = min(start + feed.chunk, data.nbytes)
        with timings.measure("stage", stop - start):
            for part in data.where.cut(feed.chunk)[index]:
                data.copy(part, feed.memory, position + part.offset - start)
        with timings.measure("hash", stop - start):
            digests = block_digests(feed.memory.bytes[position : position + stop - start], block_size)
        feed.filled(index, digests)
    feed.staged(sample(), timings.seconds)


def stage_at_once(
    data: FileData, feed: Feed, devices: DeviceStaging, threads: int, timings: Timings, select: Select = everything
) -> None:
    """Copy the selected tensors to their places in memory that holds the whole file."""

    def copy(batch: Batch) -> None:
        for part in batch:
            data.copy(part, feed.memory, part.offset)

    with timings.measure("stage", data.nbytes):
        copies = devices.start(data, feed.memory.tensor, select)
        try:
            share_out(copy, host_batches(data, feed.chunk, devices, select), threads, "shardckpt-stage")
        finally:
            copies.synchronize()


def host_batches(data: FileData, chunk: int, devices: DeviceStaging, select: Select = everything) -> Sequence[Batch]:
    """The parts of the selected tensors that ``devices`` leave to threads, in batches of at most ``chunk`` bytes."""
    names = {name for name, tensor in data.tensors.items() if select(name) and not devices.takes(tensor)}
    if len(names) == len(data.tensors):
        return data.where.cut(chunk)
    chosen = ([part for part in parts if part.name in names] for parts in data.where.cut(chunk))
    return [parts for parts in chosen if parts]


class LazyStaging:
    """Copies that are made while training goes on; whoever is about to change the tensors waits for them, and helps.

    Threads copy what lies in host memory. Copies from GPUs are under way already when this is made: there it is the work given
    to the GPUs after the wait that waits for them.
    """

    def __init__(
        self,
        data: FileData,
        feed: Feed,
        batched: Sequence[Batch],
        copies: DeviceCopies,
        look: Callable[[], None],
        end: Callable[[], None],
        on_wait: Callable[[float], None],
        timings: Timings,
    ) -> None:
        """``look`` is called once, when nobody has changed a tensor yet and soon somebody may; ``end`` once, when all is copied
        or never will be; ``on_wait`` with the seconds of each wait."""
        self._data = data
        self._feed = feed
        self._batches = list(reversed(batched))
        self._busy = 0
        self._settled = False
        self._copies = copies
        self._look = once(look)
        self._end = end
        self._on_wait = on_wait
        self._timings = timings
        self._changed = threading.Condition()
        self._batches_over = threading.Event()
        self._over = threading.Event()

    def start(self, threads: int) -> None:
        """Begin to copy."""
        if self._copies:
            self._spawn(self._settle, "devices")
        for at in range(min(threads, len(self._batches))):
            self._spawn(self._help, str(at))
        self._settle_if_last()

    def wait_before_change(self) -> None:
        """Return when the tensors may be changed by this thread. A failure to copy is the save's."""
        if self._over.is_set():
            return
        begun = perf_counter()
        self._help()
        if self._copies:
            self._batches_over.wait()
            self._try(self._look)
            self._copies.wait_on_current_streams()
        else:
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

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        threading.Thread(target=target, name=f"shardckpt-stage-{name}", daemon=True).start()

    def _help(self) -> None:
        """Copy what nobody copies yet; the thread that ends the last copy settles the rest."""
        while (batch := self._claim()) is not None:
            try:
                with self._timings.measure("stage", 0):
                    for part in batch:
                        self._data.copy(part, self._feed.memory, part.offset)
            except BaseException as error:
                with self._changed:
                    self._batches.clear()
                self._give_up(error)
            finally:
                with self._changed:
                    self._busy -= 1
                self._settle_if_last()

    def _claim(self) -> Batch | None:
        with self._changed:
            if not self._batches:
                return None
            self._busy += 1
            return self._batches.pop()

    def _settle_if_last(self) -> None:
        with self._changed:
            if self._settled or self._busy or self._batches:
                return
            self._settled = True
        self._batches_over.set()
        if not self._copies:
            self._settle()

    def _settle(self) -> None:
        """Wait for copies from GPUs and for batches; then everything is copied."""
        try:
            with self._timings.measure("stage", 0):
                self._try(self._copies.synchronize)
            self._batches_over.wait()
            self._try(self._look)
        finally:
            try:
                self._try(self._end)
            finally:
                self._over.set()

    def _try(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        self._feed.fail(error)
        if not isinstance(error, Exception):
            # Ctrl-C, or another end that was meant for the training that helps here
            raise error


def once(function: Callable[[], None]) -> Callable[[], None]:
    """A function that calls ``function`` the first time; all calls return when that one has."""
    lock = threading.Lock()
    left = [function]

    def call() -> None:
        with lock:
            if left:
                left.pop()()

    return call
