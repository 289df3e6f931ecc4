# SPDX-License-Identifier: Apache-2.0
"""A rank's file on its way from who stages it to who writes it, chunk by chunk, through host memory."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import msgspec

from .buffer import CHUNK, Buffer
from .events import Phase
from .failure import Failure, describe, rebuild

Samples = dict[str, dict[str, int]]
"""Digests of a few elements of replicated tensors, by group of ranks and by name; equal where copies are equal."""


def chunk_size(block_size: int) -> int:
    """Bytes that are staged, hashed and written in one go: whole digest blocks."""
    return max(CHUNK, block_size)


def num_chunks(nbytes: int, chunk: int) -> int:
    """Chunks of a region of ``nbytes`` bytes."""
    return -(-nbytes // chunk)


class Filled(msgspec.Struct, frozen=True, tag=True):
    """A chunk of a ring may be written, and all before it."""

    index: int


class Written(msgspec.Struct, frozen=True, tag=True):
    """The memory of a chunk of a ring may be filled again."""

    index: int


class Staged(msgspec.Struct, frozen=True, tag=True):
    """Everything is filled, and nothing more will be taken from the tensors."""

    samples: Samples
    seconds: dict[Phase, float]
    """What the save took so far, by phase, as far as the stager knows."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The file will never be whole."""

    error: Failure


News: TypeAlias = Filled | Written | Staged | Failed


class Source(ABC):
    """Where a writer takes the data region of a rank's file from."""

    nbytes: int
    """Length of the region."""
    chunk: int
    """Bytes per chunk; the last one may be shorter."""
    seconds: Mapping[Phase, float] = {}
    """What the save took until all was staged, by phase, where another process has measured it."""

    @abstractmethod
    def begin(self) -> None:
        """Make ready to be taken from. Called once; what goes wrong here is heard by all ranks."""

    @abstractmethod
    def take(self, index: int) -> AbstractContextManager[memoryview]:
        """The bytes of a chunk, page-aligned; what lies behind its end, up to a whole chunk, may be read too."""

    @abstractmethod
    def samples(self) -> Samples:
        """Digests of this rank's replicas, as of the call of save."""


def failed_feed(nbytes: int, chunk: int, error: BaseException) -> Feed:
    """A feed without memory for a file, which all who wait for it hear ``error`` from."""
    feed = Feed(Buffer(chunk), nbytes, chunk)
    feed.fail(error)
    return feed


class Feed(Source):
    """Takes bytes from host memory that somebody else fills.

    Memory that holds the whole region is written when all of it is staged, so that the two do not compete. Smaller memory is a
    ring of chunks: the writer takes each as soon as it is filled, and the stager waits for room.

    Where stager and writer are in different processes, each has a feed on the same memory: ``tell`` carries what happens to one
    of them to the `hear` of the other.
    """

    def __init__(self, memory: Buffer, nbytes: int, chunk: int, tell: Callable[[News], None] = lambda news: None) -> None:
        self.memory = memory
        self.nbytes = nbytes
        self.chunk = chunk
        self.chunks = num_chunks(nbytes, chunk)
        """Number of chunks."""
        self.slots = memory.size // chunk
        """Chunks that the memory has room for."""
        self.is_ring = self.slots < self.chunks
        """Whether chunks are staged while others are written."""
        self._tell = tell
        self._filled = 0
        self._written: set[int] = set()
        self._samples: Samples | None = None
        self._failure: Failure | None = None
        self._changed = threading.Condition()

    def hear(self, news: News) -> bool:
        """Learn what has happened; False, and no effect, for a failure after all was staged, and the other way round."""
        with self._changed:
            match news:
                case Filled(index):
                    self._filled = index + 1
                case Written(index):
                    self._written.add(index)
                case Staged(samples, seconds):
                    if self._failure is not None:
                        return False
                    self._samples, self.seconds = samples, seconds
                case Failed(error):
                    if self._samples is not None:
                        return False
                    self._failure = self._failure or error
            self._changed.notify_all()
        return True

    @property
    def is_staged(self) -> bool:
        """Whether everything is filled."""
        return self._samples is not None

    @property
    def failure(self) -> Failure | None:
        """Why the file will never be whole."""
        return self._failure

    # ---- for who stages

    def room(self, index: int) -> int:
        """Wait until chunk ``index`` may be filled; the byte of the memory where it goes. Raises what made the save fail."""
        before = index - self.slots
        self._wait(lambda: before < 0 or before in self._written)
        return index % self.slots * self.chunk

    def filled(self, index: int) -> None:
        """Chunk ``index``, and all before it, may be written."""
        self.hear(Filled(index))
        self._tell(Filled(index))

    def staged(self, samples: Samples, seconds: dict[Phase, float]) -> None:
        """All is filled, and nothing will be taken from the tensors any more. Raises what made the save fail meanwhile."""
        if not self.hear(Staged(samples, seconds)):
            assert self._failure is not None
            raise rebuild(self._failure)
        self._tell(Staged(samples, seconds))

    def fail(self, error: BaseException) -> bool:
        """End all waiting with ``error``; False, and no effect, when everything is staged already."""
        news = Failed(describe(error))
        heard = self.hear(news)
        if heard:
            self._tell(news)
        return heard

    # ---- for who writes

    def begin(self) -> None:
        pass

    @contextmanager
    def take(self, index: int) -> Iterator[memoryview]:
        self._wait(lambda: self._samples is not None or (self.is_ring and index < self._filled))
        start = index % self.slots * self.chunk
        yield self.memory.bytes[start : start + self.chunk]
        if self.is_ring:
            self.hear(Written(index))
            self._tell(Written(index))

    def wait_over(self) -> None:
        """Return when everything is filled, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._samples is not None)

    def samples(self) -> Samples:
        self._wait(lambda: self._samples is not None)
        assert self._samples is not None
        return self._samples

    def _wait(self, there: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or there())
            if self._failure is not None:
                raise rebuild(self._failure)
