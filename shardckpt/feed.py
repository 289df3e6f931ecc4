# SPDX-License-Identifier: Apache-2.0
"""A rank's file on its way from who stages it to who writes it, chunk by chunk, through host memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from .buffer import CHUNK, Buffer
from .changes import Changes
from .crew import share_out
from .events import Phase
from .failure import Failure, describe, rebuild

Samples = dict[str, dict[str, int]]
"""Digests of a few elements of replicated tensors, by group of ranks and by name; equal where copies are equal."""
Digest: TypeAlias = Callable[[memoryview], bytes]
"""What takes the digests of the blocks of a chunk."""


def chunk_size(block_size: int) -> int:
    """Bytes that are staged, hashed and written in one go: whole digest blocks."""
    return max(CHUNK, block_size)


def num_chunks(nbytes: int, chunk: int) -> int:
    """Chunks of a region of ``nbytes`` bytes."""
    return -(-nbytes // chunk)


class Filled(msgspec.Struct, frozen=True, tag=True):
    """A chunk of a ring may be written."""

    index: int
    digests: bytes
    """Of its blocks, from when it was filled."""


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes that are written in one go."""

    memory: memoryview
    """Page-aligned; what lies behind the end of the region, up to a whole chunk, may be read too."""
    digests: bytes
    """Of the blocks, one after the other; a bit that flips from now on shows."""


class Source(ABC):
    """Where a writer takes the data region of a rank's file, and the digests of its blocks, from.

    Digests are taken as early as can be, and never again: what changes between then and a load, in host memory, on the way to
    the storage or there, is found.
    """

    nbytes: int
    """Length of the region."""
    chunk: int
    """Bytes per chunk; the last one may be shorter."""
    seconds: Mapping[Phase, float] = {}
    """What the save took until all was staged, by phase, where another process has measured it."""

    @abstractmethod
    def begin(self, digest: Digest, workers: int) -> None:
        """Make ready to be taken from, in ``workers`` threads. Called once."""

    @abstractmethod
    def take(self, index: int) -> AbstractContextManager[Chunk]:
        """A chunk, which is there for as long as the block lasts."""

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

    Memory that holds the whole region is written when all of it is staged, so that the two do not compete. The digests of all
    of it are taken then, before any of it is written. Smaller memory is a ring of chunks: the writer takes each as soon as it
    is filled, and the stager, who takes its digests right after the copy, waits for room.

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
        self._digests: dict[int, bytes] = {}
        self._written: set[int] = set()
        self._samples: Samples | None = None
        self._failure: Failure | None = None
        self._changed = Changes()

    def hear(self, news: News) -> bool:
        """Learn what has happened; False, and no effect, for a failure after all was staged, and the other way round."""
        with self._changed.lock:
            match news:
                case Filled(index, digests):
                    self._digests[index] = digests
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

    def filled(self, index: int, digests: bytes) -> None:
        """Chunk ``index``, whose blocks have these digests, may be written."""
        self.hear(Filled(index, digests))
        self._tell(Filled(index, digests))

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

    def begin(self, digest: Digest, workers: int) -> None:
        if not self.is_ring:
            self._wait(lambda: self._samples is not None)
            found = share_out(lambda index: digest(self._part(index)), range(self.chunks), workers, "shardckpt-hash")
            self._digests = dict(enumerate(found))

    @contextmanager
    def take(self, index: int) -> Iterator[Chunk]:
        self._wait(lambda: index in self._digests)
        start = index % self.slots * self.chunk
        yield Chunk(self.memory.bytes[start : start + self.chunk], self._digests[index])
        if self.is_ring:
            self.hear(Written(index))
            self._tell(Written(index))

    def wait_over(self) -> None:
        """Return when everything is filled, or never will be."""
        self._changed.wait_for(lambda: self._failure is not None or self._samples is not None)

    def samples(self) -> Samples:
        self._wait(lambda: self._samples is not None)
        assert self._samples is not None
        return self._samples

    def _part(self, index: int) -> memoryview:
        """A chunk of memory that holds the whole region."""
        start = index * self.chunk
        return self.memory.bytes[start : min(start + self.chunk, self.nbytes)]

    def _wait(self, there: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: self._failure is not None or there())
        if self._failure is not None:
            raise rebuild(self._failure)
