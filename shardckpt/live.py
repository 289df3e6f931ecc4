# SPDX-License-Identifier: Apache-2.0
"""A rank's file straight from the state's tensors, which nobody changes meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .buffer import BufferPool
from .feed import Chunk, Digest, Samples, Source
from .stage import FileData, wait_for_devices


class LiveSource(Source):
    """Takes bytes from the tensors themselves, through a few buffers, and digests right after the copy."""

    def __init__(self, data: FileData, chunk: int, workers: int, sample: Callable[[], Samples]) -> None:
        self.nbytes = data.nbytes
        self.chunk = chunk
        self._data = data
        self._pool = BufferPool(workers, chunk)
        self._sample = sample

    def begin(self, digest: Digest, workers: int) -> None:
        self._digest = digest
        wait_for_devices(self._data.tensors.values())

    @contextmanager
    def take(self, index: int) -> Iterator[Chunk]:
        start = index * self.chunk
        with self._pool.borrow() as buffer:
            for part in self._data.where.cut(self.chunk)[index]:
                self._data.copy(part, buffer, part.offset - start)
            yield Chunk(buffer.bytes, self._digest(buffer.bytes[: self.nbytes - start]))

    def samples(self) -> Samples:
        return self._sample()
