# SPDX-License-Identifier: Apache-2.0
"""The raw limit: the same bytes per rank, from and to a few page-aligned buffers, with nothing else to do.

A write leaves its buffers as they are, so it is a limit that no real save reaches: it neither gathers nor hashes. A read
places nothing.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch.distributed as dist

from .disk import ALIGNMENT, O_DIRECT, files_under

MAX_THREADS = 4


@dataclass(frozen=True, slots=True)
class Way:
    """How raw bytes are moved."""

    threads: int
    """Threads per rank."""
    direct: bool
    """Whether with O_DIRECT."""
    chunk: int = 4 << 20
    """Bytes per system call."""

    def __str__(self) -> str:
        how = "O_DIRECT" if self.direct else "buffered"
        return f"{how}, {self.threads} {'thread' if self.threads == 1 else 'threads'} per rank, {self.chunk >> 20} MiB a call"


class RawDisk:
    """Writes and reads one file per rank in ``folder``."""

    def __init__(self, folder: str, nbytes: int) -> None:
        """``nbytes`` is how much this rank writes; the file is padded to whole blocks."""
        self._folder = folder
        self._nbytes = nbytes
        chunk = bytearray(random.Random(dist.get_rank()).randbytes(Way(1, False).chunk))
        self._buffers = [mmap.mmap(-1, len(chunk)) for _ in range(MAX_THREADS)]
        for buffer in self._buffers:
            buffer[:] = bytes(chunk)

    def write(self, number: int, way: Way, nbytes: int | None = None) -> None:
        """Write this rank's file of checkpoint ``number``, durably; ``nbytes`` of it."""
        folder = os.path.join(self._folder, str(number))
        os.makedirs(folder, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (O_DIRECT if way.direct else 0)
        fd = os.open(os.path.join(folder, f"rank-{dist.get_rank():05d}"), flags, 0o600)
        try:
            _in_chunks(way, 0, _padded(nbytes or self._nbytes), lambda buffer, at: os.pwrite(fd, buffer, at), self._buffers)
            os.fsync(fd)
        finally:
            os.close(fd)
        _sync_folder(folder)

    def read(self, number: int, way: Way, nbytes: int | None = None) -> None:
        """Read this rank's share of checkpoint ``number``, whatever number of ranks wrote it; at most ``nbytes`` of it."""
        sizes = [(path, os.stat(path).st_size) for path in files_under(os.path.join(self._folder, str(number)))]
        total, ranks = sum(size for _, size in sizes), dist.get_world_size()
        share = _padded(-(-total // ranks))
        low, begin = dist.get_rank() * share, 0
        high = low + min(share, _padded(nbytes or share))
        for path, size in sizes:
            start, stop = max(low, begin) - begin, min(high, begin + size) - begin
            if start < stop:
                self._read_file(path, start, stop, way)
            begin += size

    def close(self) -> None:
        """Give the buffers back."""
        for buffer in self._buffers:
            buffer.close()

    def _read_file(self, path: str, start: int, stop: int, way: Way) -> None:
        fd = os.open(path, os.O_RDONLY | (O_DIRECT if way.direct else 0))
        try:
            _in_chunks(way, start, stop, lambda buffer, at: os.preadv(fd, [buffer], at), self._buffers)
        finally:
            os.close(fd)


def _in_chunks(way: Way, start: int, stop: int, move: Callable[[memoryview, int], int], buffers: list[mmap.mmap]) -> None:
    """Move bytes ``[start, stop)`` with as many threads as ``way`` says, each with a buffer of its own."""

    def lane(number: int) -> None:
        buffer = memoryview(buffers[number])
        for at in range(start + number * way.chunk, stop, way.threads * way.chunk):
            wanted = min(way.chunk, stop - at)
            done = 0
            while done < wanted:
                moved = move(buffer[done:wanted], at + done)
                if moved <= 0:
                    raise EOFError(f"a file ended at byte {at + done}, {wanted - done} bytes too early")
                done += moved

    with ThreadPoolExecutor(way.threads) as pool:
        for finished in pool.map(lane, range(way.threads)):
            del finished


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
