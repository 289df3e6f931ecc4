# SPDX-License-Identifier: Apache-2.0
"""A file system in memory that knows, of each block, size and directory entry, what would outlive a power cut.

It promises no more than POSIX does. ``fsync`` of a file makes its data and its size durable, and not its name; ``fsync`` of a
directory makes its entries durable, and not what is in the files. Nothing else does, O_DIRECT included. Until then each change
may be kept or lost without regard to any other, so that of a rename the new name may be kept without the loss of the old
one, or neither name may be there.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from shardckpt.store.filesystem import FileSystem
from tests.power.flushes import Flush, calling_flush

BLOCK: Final = 4096
"""Bytes that a device writes whole or not at all."""
ROOT: Final = 0
"""Number of the directory "/", which is the mount point of the device."""
ABSENT: Final = -1
"""Stands in the history of a directory entry for none."""
REPORTED: Final = "success was reported"
"""Stands for a system call, where what has been done so far is promised to last."""


class FileState(NamedTuple):
    """What is, and may be, in one file."""

    durable: tuple[bytes, ...] = ()
    """Its blocks as of the last flush."""
    blocks: tuple[bytes, ...] = ()
    """Its blocks now."""
    sizes: tuple[int, ...] = (0,)
    """The size as of the last flush, and each one since."""

    @property
    def is_durable(self) -> bool:
        return self.durable == self.blocks and len(self.sizes) == 1


Entries = Mapping[str, tuple[int, ...]]
"""Of one directory, by name: the number of the node as of the last flush, and each one since."""


@dataclass(frozen=True)
class Moment:
    """Everything that a power cut right after one system call can leave something of."""

    call: str
    """The system call."""
    directories: Mapping[int, Entries]
    """By number."""
    files: Mapping[int, FileState]
    """By number."""
    promises: tuple[frozenset[int], ...]
    """Of each set, one step at least has to be there."""


@dataclass
class _Descriptor:
    number: int
    direct: bool


@dataclass(eq=False)
class Disk(FileSystem):
    """What is mounted at "/". Remembers each moment since it was made; `moments` can be replayed in any order."""

    links: bool = True
    """Whether it has hard links."""
    ignored: Flush | None = None
    """A flush that does nothing, although it says that it did."""
    before: Callable[[str], None] = lambda call: None
    """Called before each system call, with no lock held."""
    moments: list[Moment] = field(default_factory=list)
    flushes: dict[Flush, int] = field(default_factory=dict)
    """The places in the engine that flush, and how often they did."""
    promises: tuple[frozenset[int], ...] = ()
    """What the next moments have to keep; see `Moment`."""

    def __post_init__(self) -> None:
        self._directories: dict[int, dict[str, tuple[int, ...]]] = {ROOT: {}}
        self._files: dict[int, FileState] = {}
        self._written: dict[int, float] = {}
        self._open: dict[int, _Descriptor] = {}
        self._numbers = itertools.count(ROOT + 1)
        self._descriptors = itertools.count(1000)
        self._lock = threading.RLock()

    def promise(self, *promises: set[int]) -> None:
        """From now on these have to be kept."""
        self.promises = tuple(map(frozenset, promises))

    def report(self, *promises: set[int]) -> None:
        """Something has reported success: from now on these have to be kept, and nothing of what was done may be undone."""
        self.promise(*promises)
        with self._lock:
            self._remember(REPORTED)

    def put(self, path: str, content: bytes | None = None) -> None:
        """Set up a file or, without content, a directory, that is durable with its name; what is above it has to be there."""
        parent, name = self._parent(path)
        number = next(self._numbers)
        parent[name] = (number,)
        self._written[number] = time.time()
        if content is None:
            self._directories[number] = {}
        else:
            blocks = tuple(content[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(content), BLOCK))
            self._files[number] = FileState(blocks, blocks, (len(content),))

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self.before("open")
        with self._lock:
            number = self._find(path)
            if number is None:
                if not flags & os.O_CREAT:
                    raise _error(errno.ENOENT)
                parent, name = self._parent(path)
                number = next(self._numbers)
                self._files[number] = FileState()
                self._written[number] = time.time()
                parent[name] = _changed(parent.get(name), number)
                self._remember("open")
            elif flags & os.O_CREAT and flags & os.O_EXCL:
                raise _error(errno.EEXIST)
            if flags & os.O_DIRECTORY and number in self._files:
                raise _error(errno.ENOTDIR)
            descriptor = next(self._descriptors)
            self._open[descriptor] = _Descriptor(number, bool(flags & os.O_DIRECT))
            return descriptor

    def close(self, fd: int) -> None:
        self.before("close")
        with self._lock:
            del self._open[fd]

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        self.before("pwrite")
        with self._lock:
            number, direct = self._open[fd].number, self._open[fd].direct
            if direct and (offset % BLOCK or buffer.nbytes % BLOCK):
                raise _error(errno.EINVAL)
            file = self._files[number]
            content = bytearray(b"".join(file.blocks).ljust(offset + buffer.nbytes, b"\0"))
            content[offset : offset + buffer.nbytes] = buffer
            self._set(number, bytes(content), max(file.sizes[-1], offset + buffer.nbytes))
            self._remember("pwrite")
            return buffer.nbytes

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.before("preadv")
        with self._lock:
            file = self._files[self._open[fd].number]
            content = memoryview(b"".join(file.blocks).ljust(file.sizes[-1], b"\0"))[: file.sizes[-1]]
            done = 0
            for buffer in buffers:
                part = content[offset + done : offset + done + buffer.nbytes]
                buffer[: part.nbytes] = part
                done += part.nbytes
            return done

    def fsync(self, fd: int) -> None:
        self.before("fsync")
        flush = calling_flush()
        with self._lock:
            self.flushes[flush] = self.flushes.get(flush, 0) + 1
            if flush == self.ignored:
                return
            number = self._open[fd].number
            if number in self._files:
                file = self._files[number]
                self._files[number] = FileState(file.blocks, file.blocks, file.sizes[-1:])
            else:
                entries = self._directories[number]
                self._directories[number] = {name: past[-1:] for name, past in entries.items() if past[-1] != ABSENT}
            self._remember("fsync")

    def ftruncate(self, fd: int, size: int) -> None:
        self.before("ftruncate")
        with self._lock:
            number = self._open[fd].number
            self._set(number, b"".join(self._files[number].blocks)[:size], size)
            self._remember("ftruncate")

    def fstat(self, fd: int) -> os.stat_result:
        self.before("fstat")
        with self._lock:
            return self._status(self._open[fd].number)

    def lstat(self, path: str) -> os.stat_result:
        self.before("lstat")
        with self._lock:
            return self._status(self._require(path))

    def stat(self, path: str) -> os.stat_result:
        return self.lstat(path)

    def statvfs(self, path: str) -> os.statvfs_result:
        self._require(path)
        return os.statvfs_result((BLOCK, BLOCK, *([1 << 40] * 6), 0, 255))

    def expect_ascending(self, fd: int) -> None:
        """A hint, which changes nothing."""

    def forget(self, fd: int) -> None:
        """There are no caches to read past."""

    def link(self, source: str, target: str) -> None:
        self.before("link")
        with self._lock:
            if not self.links:
                raise _error(errno.EOPNOTSUPP)
            if self._find(target) is not None:
                raise _error(errno.EEXIST)
            self._enter(target, self._require(source))
            self._remember("link")

    def rename(self, source: str, target: str) -> None:
        self.before("rename")
        with self._lock:
            number = self._require(source)
            if self._find(target) in self._directories:
                raise _error(errno.EISDIR)
            self._enter(target, number)
            self._enter(source, ABSENT)
            self._remember("rename")

    def unlink(self, path: str) -> None:
        self.before("unlink")
        with self._lock:
            if self._require(path) in self._directories:
                raise _error(errno.EISDIR)
            self._enter(path, ABSENT)
            self._remember("unlink")

    def mkdir(self, path: str) -> None:
        self.before("mkdir")
        with self._lock:
            if self._find(path) is not None:
                raise _error(errno.EEXIST)
            number = next(self._numbers)
            self._enter(path, number)
            self._directories[number] = {}
            self._written[number] = time.time()
            self._remember("mkdir")

    def rmdir(self, path: str) -> None:
        self.before("rmdir")
        with self._lock:
            number = self._require(path)
            if number not in self._directories:
                raise _error(errno.ENOTDIR)
            if self._names(number):
                raise _error(errno.ENOTEMPTY)
            self._enter(path, ABSENT)
            self._remember("rmdir")

    def listdir(self, path: str) -> list[str]:
        self.before("listdir")
        with self._lock:
            number = self._require(path)
            if number not in self._directories:
                raise _error(errno.ENOTDIR)
            return self._names(number)

    def _names(self, number: int) -> list[str]:
        return [name for name, past in self._directories[number].items() if past[-1] != ABSENT]

    def _find(self, path: str) -> int | None:
        """The number of what is at ``path`` now."""
        number = ROOT
        for name in filter(None, path.split("/")):
            if number not in self._directories:
                raise _error(errno.ENOTDIR)
            number = self._directories[number].get(name, (ABSENT,))[-1]
            if number == ABSENT:
                return None
        return number

    def _require(self, path: str) -> int:
        number = self._find(path)
        if number is None:
            raise _error(errno.ENOENT)
        return number

    def _parent(self, path: str) -> tuple[dict[str, tuple[int, ...]], str]:
        parent = self._require(os.path.dirname(path))
        if parent not in self._directories:
            raise _error(errno.ENOTDIR)
        return self._directories[parent], os.path.basename(path)

    def _enter(self, path: str, number: int) -> None:
        parent, name = self._parent(path)
        parent[name] = _changed(parent.get(name), number)

    def _set(self, number: int, content: bytes, size: int) -> None:
        file = self._files[number]
        blocks = tuple(content[at : at + BLOCK].ljust(BLOCK, b"\0") for at in range(0, len(content), BLOCK))
        sizes = file.sizes if size == file.sizes[-1] else (*file.sizes, size)
        self._files[number] = file._replace(blocks=blocks, sizes=sizes)
        self._written[number] = time.time()

    def _status(self, number: int) -> os.stat_result:
        is_file = number in self._files
        size = self._files[number].sizes[-1] if is_file else 0
        mode = (stat.S_IFREG if is_file else stat.S_IFDIR) | 0o755
        modified = self._written.get(number, 0.0)
        return os.stat_result((mode, number, 1, 1, 0, 0, size, modified, modified, modified))

    def _remember(self, call: str) -> None:
        directories = {number: dict(entries) for number, entries in self._directories.items()}
        self.moments.append(Moment(call, directories, dict(self._files), self.promises))


def _changed(past: tuple[int, ...] | None, number: int) -> tuple[int, ...]:
    return (*(past or (ABSENT,)), number)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
