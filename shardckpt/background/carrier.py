# SPDX-License-Identifier: Apache-2.0
"""The interface to what finishes staged saves, and the one that does so in a thread of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError
from shardckpt.events import Timings
from shardckpt.feed import Feed, News, Source, Staged, failed_feed
from shardckpt.finish import Job, finish_save
from shardckpt.hostmemory import HostMemory
from shardckpt.protect import Committed, protect
from shardckpt.store import Store


class Carrier(ABC):
    """Finishes saves, one at a time. All ranks have carriers of one kind."""

    memory: HostMemory
    """Where the states that it takes over are staged."""
    is_independent: bool
    """Whether a save that it has taken over goes on when this process ends."""

    @abstractmethod
    def notice(self) -> bytes:
        """On rank 0, before each save: what the other ranks' carriers have to know for it."""

    @abstractmethod
    def feed(self, nbytes: int, chunk: int, on_staged: Callable[[], None]) -> Feed:
        """A feed for a file of ``nbytes`` bytes; ``on_staged`` is called when the save no longer depends on the state, nor
        on this process, if the carrier is independent: then in the thread that carries.

        When there is no memory for it, the feed has failed already, so that the other ranks hear of it.
        """

    @abstractmethod
    def carry(self, job: Job, source: Source, notice: bytes, timings: Timings) -> str:
        """Finish a save; the SHA-256 of its manifest. Collective, in a thread that training does not wait for."""

    @abstractmethod
    def protect(self, job: Job, digest: str) -> None:
        """Write the parity of a save that `carry` has just made durable, if there is to be one. Collective; never fails."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything, when no save is under way."""


def make_feed(memory: HostMemory, nbytes: int, chunk: int, tell: Callable[[News], None]) -> Feed:
    """A feed in ``memory``, which has failed already when there is not enough."""
    try:
        return Feed(memory.reserve(nbytes, chunk), nbytes, chunk, tell)
    except CheckpointError as error:
        return failed_feed(nbytes, chunk, error)


class ThreadCarrier(Carrier):
    """Finishes saves in the thread that asks for it."""

    is_independent = False

    def __init__(
        self, coordinator: Coordinator, store: Store, memory: HostMemory, *, workers: int, parity: int | None = None
    ) -> None:
        """``parity`` is the number of ranks that share one, at most."""
        self.memory = memory
        self._parity = parity
        self._coordinator = coordinator.channel("background")
        self._store = store
        self._workers = workers
        self._image: Feed | None = None

    def notice(self) -> bytes:
        return b""

    def feed(self, nbytes: int, chunk: int, on_staged: Callable[[], None]) -> Feed:
        def tell(news: News) -> None:
            if isinstance(news, Staged):
                on_staged()

        return make_feed(self.memory, nbytes, chunk, tell)

    def carry(self, job: Job, source: Source, notice: bytes, timings: Timings) -> str:
        # a ring holds the end of the file only, and the state itself may change when the save is durable
        self._image = source if isinstance(source, Feed) and not source.is_ring else None
        return finish_save(job, source, self._store, self._coordinator, workers=self._workers, timings=timings)

    def protect(self, job: Job, digest: str) -> None:
        if self._parity is not None:
            committed = Committed(job.prefix, job.attempt, digest)
            protect(self._coordinator, self._store, committed, self._parity, workers=self._workers, source=self._image)

    def close(self) -> None:
        self._image = None
        self.memory.close()
        self._coordinator.close()
