# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory, which bytes of a file lie in on their way to or from storage."""

from __future__ import annotations

import mmap
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

CHUNK = 4 << 20
"""Bytes that are staged, hashed and written in one go, unless a digest block is larger."""


class Buffer:
    """Page-aligned host memory, seen as bytes by Python, numpy and torch. It is given back when nobody refers to it."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        """Map ``size`` bytes: memory of this process, or of the file ``fd``, which other processes can map too."""
        self.size = size
        """Bytes."""
        if fd is None:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if size >= CHUNK and hasattr(mmap, "MADV_HUGEPAGE"):
                # a third faster to copy into
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        else:
            self._memory = mmap.mmap(fd, size)
        self.bytes = memoryview(self._memory)
        """The memory, as bytes."""
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._memory, dtype=np.uint8)
        """The same as an array."""
        self.address: int = self.array.ctypes.data
        """Where it begins."""

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The same as a tensor."""
        import torch  # the background process has no need of it, and starts faster and smaller without

        return torch.frombuffer(self._memory, dtype=torch.uint8)

    def keep_from_forks(self) -> None:
        """Leave the memory out of processes forked from now on: their copy-on-write would move it from under a GPU."""
        if hasattr(mmap, "MADV_DONTFORK"):
            self._memory.madvise(mmap.MADV_DONTFORK)


class BufferPool:
    """A bounded number of equal buffers; whoever wants one more waits."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        """Bytes per buffer."""
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def borrow(self) -> Iterator[Buffer]:
        """A buffer for as long as the block lasts; its content is whatever the last user left."""
        buffer = self._free.get() or Buffer(self.size)
        try:
            yield buffer
        finally:
            self._free.put(buffer)
