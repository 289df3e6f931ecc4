# SPDX-License-Identifier: Apache-2.0
"""A store in a directory of a mounted file system: local disks, and shared ones such as NFS, Lustre or GPFS.

New files are written with O_DIRECT where the file system takes it: the data is written once and is not needed
again soon, and the page cache would only copy it, push other data out, and put off write errors. Reads go
through the page cache, but for those of `LocalStore.open_uncached`: they use O_DIRECT too or, where the file system
does not take it, ask the kernel to forget the file first, which it need not do. What a drive or a file server has in
a cache of its own no program can go past.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from shardckpt.errors import StoreError
from shardckpt.store.base import (
    ALIGNMENT,
    TEMPORARY_SUFFIX,
    Entry,
    FileReader,
    FileWriter,
    Store,
    check_name,
    name_problem,
)
from shardckpt.store.directories import Directories
from shardckpt.store.filesystem import OPERATING_SYSTEM, FileSystem, closing
from shardckpt.store.local_file import DirectReader, LocalReader, LocalWriter, write_all
from shardckpt.store.oserror import explained
from shardckpt.store.publish import NEW_FILE_FLAGS, Publisher, claim_of

logger = logging.getLogger("shardckpt")

# O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
_READ_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_NO_DIRECT_IO: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_MOST_TRIES: Final = 20
_TEMPORARY_BYTES: Final = 4
_KINDS: Final = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}


class LocalStore(Store):
    """Files under the directory ``root``, which is made at the first write."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        fs: FileSystem = OPERATING_SYSTEM,
        publisher: Publisher | None = None,
    ) -> None:
        self.url = os.path.abspath(root)
        self._fs = fs
        self._directories = Directories(fs, self.url)
        self._publisher = publisher or Publisher(fs)
        self._probed_flag: int | None = None
        self._probe_lock = threading.Lock()

    def create(self, name: str, size: int) -> FileWriter:
        path = self._path(name)
        flag = self._direct_flag()
        return LocalWriter(
            self._fs,
            name,
            size,
            path,
            self._open_new(path, flag),
            direct=flag != 0,
            on_durable=partial(self._directories.sync_path, os.path.dirname(path)),
            remove=partial(self.delete, name),
        )

    def replace(self, name: str, size: int) -> FileWriter:
        path = self._path(name)
        temporary = _temporary_beside(path)
        flag = self._direct_flag()

        def put_in_place() -> None:
            with explained("replace", path):
                self._fs.rename(temporary, path)
            self._directories.sync_path(os.path.dirname(path))

        return LocalWriter(
            self._fs,
            name,
            size,
            temporary,
            self._open_new(temporary, flag),
            direct=flag != 0,
            on_durable=put_in_place,
            remove=partial(self._remove_temporary, temporary),
        )

    def open(self, name: str) -> FileReader:
        path = self._path(name)
        fd, size = self._open_existing(path)
        return LocalReader(self._fs, name, path, fd, size)

    def open_uncached(self, name: str) -> FileReader:
        path = self._path(name)
        if _O_DIRECT:
            try:
                fd, size = self._open_existing(path, _O_DIRECT)
            except StoreError as error:
                if not _is_without_direct_io(error):
                    raise
            else:
                return DirectReader(self._fs, name, path, fd, size)
        fd, size = self._open_existing(path)
        with suppress(OSError):
            self._fs.forget(fd)
        return LocalReader(self._fs, name, path, fd, size)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._put(name, data, lambda: None)

    def put_if_allowed(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        self._put(name, data, allow)

    def revoke(self, name: str) -> None:
        directory, leaf = os.path.split(self._path(name))
        temporary = re.compile(rf"{re.escape(leaf)}\.[0-9a-f]{{{2 * _TEMPORARY_BYTES}}}{re.escape(TEMPORARY_SUFFIX)}\Z")
        with explained("list", directory), suppress(FileNotFoundError):
            for found in filter(temporary.match, self._fs.listdir(directory)):
                with suppress(FileNotFoundError):
                    self._fs.unlink(os.path.join(directory, found))
            # last: who holds it, and is not dead, has nothing to give the name to by now
            self._fs.unlink(claim_of(self._path(name)))

    def list(self, prefix: str = "") -> Sequence[Entry]:
        directory = self._path(prefix) if prefix else self.url
        return sorted(self._walk(directory, prefix), key=lambda entry: entry.name)

    def delete(self, name: str) -> None:
        path = self._path(name)
        directory = os.path.dirname(path)
        with explained("delete", path), suppress(FileNotFoundError):
            self._fs.unlink(path)
        # Also when it was missing: whoever removed it may have been killed before it came to this.
        self._directories.sync_if_there(directory)
        self._directories.remove_empty(directory)

    def make_durable(self, name: str) -> None:
        path = self._path(name)
        with explained("flush", path):
            self._fs.lstat(path)
        # What is in it was flushed before it was given its name.
        self._directories.sync_path(os.path.dirname(path))

    def empty_directories(self) -> Sequence[Entry]:
        found = []
        with explained("list", self.url), suppress(FileNotFoundError):
            for leaf in sorted(self._fs.listdir(self.url)):
                path = os.path.join(self.url, leaf)
                if name_problem(leaf) is None:
                    with suppress(FileNotFoundError, NotADirectoryError):
                        status = self._fs.lstat(path)
                        if stat.S_ISDIR(status.st_mode) and not self._fs.listdir(path):
                            found.append(Entry(leaf, 0, status.st_mtime))
        return found

    def takes_direct(self) -> bool:
        """Whether new files are written with O_DIRECT. The first call tries it, in the root; raises `StoreError`."""
        return self._direct_flag() != 0

    def _put(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        path = self._path(name)
        temporary = _temporary_beside(path)
        try:
            fd = self._open_new(temporary)
            with explained("write", temporary), closing(self._fs, fd):
                write_all(self._fs, fd, memoryview(data), 0)
                self._fs.fsync(fd)
            allow()
            self._publisher.publish(temporary, path)
        finally:
            self._remove_temporary(temporary)
        self._directories.sync_path(os.path.dirname(path))

    def _path(self, name: str) -> str:
        return os.path.join(self.url, check_name(name))

    def _open_existing(self, path: str, flags: int = 0) -> tuple[int, int]:
        """A descriptor of a file, and its size. With O_DIRECT one read is tried: some file systems refuse only that."""
        with explained("open", path):
            fd = self._fs.open(path, _READ_FLAGS | flags)
            try:
                status = self._fs.fstat(fd)
                _require_regular(path, status.st_mode)
                if flags:
                    self._fs.preadv(fd, [memoryview(mmap.mmap(-1, ALIGNMENT))], 0)
            except BaseException:
                self._fs.close(fd)
                raise
        return fd, status.st_size

    def _open_new(self, path: str, flags: int = 0) -> int:
        for _ in range(_MOST_TRIES):
            self._directories.make(os.path.dirname(path))
            # Not found: a delete saw the directory empty and removed it in between.
            with explained("create", path), suppress(FileNotFoundError):
                return self._fs.open(path, NEW_FILE_FLAGS | flags)
        raise StoreError(
            f"cannot create {path!r}: its directory was removed {_MOST_TRIES} times while it was made; stop what removes it",
            path=path,
        )

    def _remove_temporary(self, path: str) -> None:
        try:
            self._fs.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning("the temporary file %r is left behind and may be removed: %s", path, error)

    def _walk(self, directory: str, prefix: str) -> Iterator[Entry]:
        with explained("list", directory):
            try:
                leaves = self._fs.listdir(directory)
            except FileNotFoundError:
                return
            except NotADirectoryError:
                if not stat.S_ISDIR(self._fs.stat(self.url).st_mode):
                    raise
                return
        for leaf in leaves:
            name = f"{prefix}/{leaf}" if prefix else leaf
            if name_problem(name) is None:
                yield from self._visit(os.path.join(directory, leaf), name)

    def _visit(self, path: str, name: str) -> Iterator[Entry]:
        with explained("list", path):
            try:
                status = self._fs.lstat(path)
            except FileNotFoundError:
                return
        if stat.S_ISDIR(status.st_mode):
            yield from self._walk(path, name)
        elif stat.S_ISREG(status.st_mode):
            yield Entry(name, status.st_size, status.st_mtime)

    def _direct_flag(self) -> int:
        with self._probe_lock:
            if self._probed_flag is None:
                self._probed_flag = self._probe_direct_flag()
            return self._probed_flag

    def _probe_direct_flag(self) -> int:
        """O_DIRECT if one aligned write with it works in the root, else 0."""
        if not _O_DIRECT:
            return 0
        probe = _temporary_beside(os.path.join(self.url, "probe"))
        try:
            fd = self._open_new(probe, _O_DIRECT)
            with explained("probe", probe), closing(self._fs, fd):
                # An anonymous map, because it is page aligned.
                write_all(self._fs, fd, memoryview(mmap.mmap(-1, ALIGNMENT)), 0, ALIGNMENT)
        except StoreError as error:
            if not _is_without_direct_io(error):
                raise
            logger.warning("%s does not take O_DIRECT: writing through the page cache, more slowly", self.url)
            return 0
        finally:
            self._remove_temporary(probe)
        return _O_DIRECT


def _is_without_direct_io(error: StoreError) -> bool:
    """Whether it says that the file system does not take O_DIRECT."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_DIRECT_IO


def _require_regular(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "special file")
        raise StoreError(f"{path!r} is a {kind}, and only regular files are taken: move it away", path=path, kind=kind)


def _temporary_beside(path: str) -> str:
    return f"{path}.{secrets.token_hex(_TEMPORARY_BYTES)}{TEMPORARY_SUFFIX}"
