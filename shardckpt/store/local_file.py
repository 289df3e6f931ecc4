# SPDX-License-Identifier: Apache-2.0
"""One file of a local store while it is written, and one while it is read."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shardckpt.errors import CheckpointError
from shardckpt.store.base import ALIGNMENT, FileReader, FileWriter
from shardckpt.store.buffers import scatter, skip
from shardckpt.store.filesystem import IOV_MAX, FileSystem, closing
from shardckpt.store.oserror import explained

_CLOSED: Final = -1
_PIECE: Final = 1 << 20

logger = logging.getLogger("shardckpt")


def write_all(fs: FileSystem, fd: int, buffer: memoryview, offset: int, granularity: int = 1) -> None:
    """Write all of ``buffer``, going on after short writes at the last multiple of ``granularity`` bytes."""
    done = 0
    while done < buffer.nbytes:
        written = fs.pwrite(fd, buffer[done:], offset + done)
        progress = written - written % granularity
        if progress <= 0:
            raise OSError(errno.EIO, f"a write of {buffer.nbytes - done} bytes stopped after {written}")
        done += progress


class LocalWriter(FileWriter):
    """Writes an open descriptor; ``on_durable`` flushes the directories, ``remove`` deletes the file."""

    def __init__(
        self,
        fs: FileSystem,
        name: str,
        size: int,
        path: str,
        fd: int,
        *,
        direct: bool,
        on_durable: Callable[[], None],
        remove: Callable[[], None],
    ) -> None:
        super().__init__(name, size)
        self._fs = fs
        self._path = path
        self._fd = fd
        # With O_DIRECT a write goes on only at a block boundary; some bytes are then written twice.
        self._granularity = ALIGNMENT if direct else 1
        self._on_durable = on_durable
        self._remove = remove

    def _write(self, offset: int, buffer: memoryview) -> None:
        with explained("write", self._path):
            write_all(self._fs, self._fd, buffer, offset, self._granularity)

    def _finish(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        with explained("flush", self._path), closing(self._fs, fd):
            if self.size % ALIGNMENT:
                self._fs.ftruncate(fd, self.size)
            self._fs.fsync(fd)
        self._on_durable()

    def _abort(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            with suppress(OSError):
                self._fs.close(fd)
        try:
            self._remove()
        except CheckpointError as error:
            logger.warning("the unfinished file %r may be left behind: %s", self._path, error)


class LocalReader(FileReader):
    """Reads an open descriptor."""

    def __init__(self, fs: FileSystem, name: str, path: str, fd: int, size: int) -> None:
        super().__init__(name, size)
        self._fs = fs
        self._path = path
        self._fd = fd

    def expect_ascending(self) -> None:
        with suppress(OSError):
            self._fs.expect_ascending(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            with explained("close", self._path):
                self._fs.close(fd)

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        position = offset
        first = 0
        with explained("read", self._path):
            while first < len(buffers):
                got = self._fs.preadv(self._fd, buffers[first : first + IOV_MAX], position)
                if got == 0:
                    wanted = position - offset + sum(buffer.nbytes for buffer in buffers[first:])
                    raise self._truncated(offset, wanted, got=position - offset)
                position += got
                first = skip(buffers, first, got)


class DirectReader(LocalReader):
    """Reads a descriptor that was opened with O_DIRECT: whole blocks, into page-aligned memory of its own where need be."""

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        if len(buffers) == 1 and not (offset % ALIGNMENT or wanted % ALIGNMENT or _address(buffers[0]) % ALIGNMENT):
            self._fill_blocks(offset, buffers[0])
            return
        first, position, end = 0, offset, offset + wanted
        blocks = memoryview(mmap.mmap(-1, min(_round_up(wanted) + ALIGNMENT, _PIECE)))
        while position < end:
            skipped = position % ALIGNMENT
            length = min(blocks.nbytes, _round_up(end - position + skipped))
            got = self._read_blocks(blocks[:length], position - skipped) - skipped
            if got <= 0:
                raise self._truncated(offset, wanted, got=position - offset)
            got = min(got, end - position)
            first = scatter(blocks[skipped : skipped + got], buffers, first)
            position += got

    def _fill_blocks(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < buffer.nbytes:
            got = self._read_blocks(buffer[done:], offset + done)
            if got < ALIGNMENT:
                raise self._truncated(offset, buffer.nbytes, got=done + got)
            # the next read begins with a block, too
            done += got - got % ALIGNMENT

    def _read_blocks(self, blocks: memoryview, offset: int) -> int:
        with explained("read", self._path):
            return self._fs.preadv(self._fd, [blocks], offset)


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _round_up(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
