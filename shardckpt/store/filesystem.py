# SPDX-License-Identifier: Apache-2.0
"""The one door to the operating system: one method for each system call that the local store makes.

Tests subclass `FileSystem` to make the Nth call fail, come up short, or be the last before a power cut.
Methods raise `OSError` as the kernel reports it; `oserror.py` turns that into errors that users can act on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

if sys.platform == "darwin":
    import fcntl


class FileSystem:
    """System calls on the real file system. Stateless; safe to share between threads."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Return a file descriptor; ``mode`` is cut by the umask."""
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        """Close once; the descriptor is gone even when this fails."""
        os.close(fd)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Write at ``offset``; returns how many bytes were written, which may be fewer than given."""
        return os.pwrite(fd, buffer, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read into ``buffers`` (at most `IOV_MAX`); returns how many bytes were read, 0 at end of file."""
        return os.preadv(fd, buffers, offset)

    def fsync(self, fd: int) -> None:
        """Flush file or directory to the device itself."""
        if sys.platform == "darwin":
            # fsync there stops at the drive's volatile cache.
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def ftruncate(self, fd: int, size: int) -> None:
        """Set the file's size in bytes."""
        os.ftruncate(fd, size)

    def fstat(self, fd: int) -> os.stat_result:
        """Status of an open file."""
        return os.fstat(fd)

    def lstat(self, path: str) -> os.stat_result:
        """Status of a path, links not followed."""
        return os.lstat(path)

    def stat(self, path: str) -> os.stat_result:
        """Status of a path, links followed."""
        return os.stat(path)

    def statvfs(self, path: str) -> os.statvfs_result:
        """Room on the file system that a path lies on."""
        return os.statvfs(path)

    def expect_ascending(self, fd: int) -> None:
        """Ask the kernel to read further ahead than it does by itself, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def forget(self, fd: int) -> None:
        """Ask the kernel to drop what it remembers of a file that is durable, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def link(self, source: str, target: str) -> None:
        """Give a file a second name; fails when ``target`` exists."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: str, target: str) -> None:
        """Rename; replaces ``target``."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name that is not a directory."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make one directory."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove one empty directory."""
        os.rmdir(path)

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, in no order."""
        return os.listdir(path)


OPERATING_SYSTEM: Final = FileSystem()
"""The one that is used unless a test hands in its own."""

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""How many buffers one `FileSystem.preadv` takes."""


@contextmanager
def closing(fs: FileSystem, fd: int) -> Iterator[None]:
    """Close ``fd`` after the block; an error of the block goes before one of the close."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            fs.close(fd)
        raise
    fs.close(fd)
