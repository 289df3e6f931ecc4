# SPDX-License-Identifier: Apache-2.0
"""Files that are made for other programs: written from start to end, and there whole and durable or not at all.

They are written under a temporary name beside their place, flushed, and renamed. What a killed process leaves has a name
that `is_temporary` knows, nothing refers to it, and it may be deleted.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from shardckpt.errors import AlreadyExists, ConfigError
from shardckpt.store.base import TEMPORARY_SUFFIX, check_name
from shardckpt.store.directories import Directories
from shardckpt.store.filesystem import OPERATING_SYSTEM, FileSystem, closing
from shardckpt.store.local_file import write_all
from shardckpt.store.oserror import explained
from shardckpt.store.publish import NEW_FILE_FLAGS, Publisher

_BUFFER: Final = 4 << 20
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]+:/", re.ASCII | re.IGNORECASE)


class OutFile:
    """A new file that is written from its start to its end. As much of Python's file interface as `zipfile` needs."""

    def __init__(self, fs: FileSystem, path: str, fd: int) -> None:
        self._fs = fs
        self._path = path
        self._fd = fd
        self._flushed = 0
        self._buffer = bytearray()

    def write(self, data: Any) -> int:
        """Append anything with the buffer interface; returns its length in bytes. Raises `StoreError`."""
        view = memoryview(data).cast("B")
        if len(self._buffer) + view.nbytes > _BUFFER:
            self._flush()
        if view.nbytes > _BUFFER:
            self._append(view)
        else:
            self._buffer += view
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._flushed + len(self._buffer)

    def flush(self) -> None:
        """Nothing: what is written is flushed once, at the end."""

    def make_durable(self) -> None:
        """Write what is left, and flush it to the device."""
        self._flush()
        with explained("flush", self._path):
            self._fs.fsync(self._fd)

    def _flush(self) -> None:
        self._append(memoryview(bytes(self._buffer)))
        self._buffer.clear()

    def _append(self, view: memoryview) -> None:
        with explained("write", self._path):
            write_all(self._fs, self._fd, view, self._flushed)
        self._flushed += view.nbytes


class OutDirectory:
    """A new directory whose files appear together."""

    def __init__(self, fs: FileSystem, path: str) -> None:
        self._fs = fs
        self._path = path
        self._directories = Directories(fs, path)

    @contextmanager
    def file(self, name: str) -> Iterator[OutFile]:
        """A new file in it, open for the block."""
        path = os.path.join(self._path, check_name(name))
        self._directories.make(os.path.dirname(path))
        with _written(self._fs, path) as file:
            yield file


@contextmanager
def new_file(path: str, *, replace: bool = False, fs: FileSystem = OPERATING_SYSTEM) -> Iterator[OutFile]:
    """The file ``path``, written in the block; it appears, durable, when the block ends without an error.

    Raises `AlreadyExists` when something is there, unless it is a file and ``replace`` says to put the new one in its place,
    and `StoreError`.
    """
    path = os.path.abspath(path)
    require_free(path, replace=replace, fs=fs)
    directories = Directories(fs, os.path.dirname(path))
    directories.make(os.path.dirname(path))
    temporary = _temporary_beside(path)
    try:
        with _written(fs, temporary) as file:
            yield file
        if replace:
            with explained("replace", path):
                fs.rename(temporary, path)
        else:
            Publisher(fs).publish(temporary, path)
    finally:
        _remove(fs, temporary)
    directories.sync_path(os.path.dirname(path))


@contextmanager
def new_directory(path: str, *, replace: bool = False, fs: FileSystem = OPERATING_SYSTEM) -> Iterator[OutDirectory]:
    """The directory ``path``, filled in the block; it appears, durable, when the block ends without an error.

    Raises `AlreadyExists` when something is there that is not an empty directory, unless ``replace`` says to put the new one
    in its place, and `StoreError`. The old one is moved aside, and removed when the new one is durable in its place.
    """
    path = os.path.abspath(path)
    require_free(path, replace=replace, fs=fs)
    directories = Directories(fs, os.path.dirname(path))
    temporary = _temporary_beside(path)
    directories.make(temporary)
    try:
        yield OutDirectory(fs, temporary)
        with explained("flush", temporary):
            _sync_all(fs, Directories(fs, temporary), temporary)
        old = _put_in_place(fs, temporary, path)
    finally:
        _remove(fs, temporary)
    directories.sync_path(os.path.dirname(path))
    if old is not None:
        _remove(fs, old)


def require_local(path: str) -> None:
    """Raise `ConfigError` for what is no path of a local file or directory."""
    if not path or "\0" in path:
        raise ConfigError(f"{path!r} does not name a file or directory to write to")
    if _URL.match(path):
        raise ConfigError(f"{path!r} is a URL, and files for other programs go to local directories: name one, and copy it")


def require_only(path: str, expected: re.Pattern[str], *, fs: FileSystem = OPERATING_SYSTEM) -> None:
    """Raise `AlreadyExists` when at ``path`` there is something else than a directory of files with ``expected`` names.

    That is what may be replaced by a directory of such files: nobody who asks for it wants to lose more.
    """
    with explained("look at", path):
        try:
            mode = fs.lstat(path).st_mode
        except FileNotFoundError:
            return
        is_directory = stat.S_ISDIR(mode)
        strangers = [name for name in fs.listdir(path) if not expected.fullmatch(name)] if is_directory else []
    if not is_directory:
        raise AlreadyExists(f"{path!r} is no directory, and is not replaced by one: choose another place", path=path)
    if strangers:
        raise AlreadyExists(
            f"{path!r} also holds {min(strangers)!r}, which would be lost, as no export has written it: the directory is not "
            "replaced. Choose another place, or move that away",
            path=path,
            found=min(strangers),
        )


def require_free(path: str, *, replace: bool, fs: FileSystem = OPERATING_SYSTEM) -> None:
    """Raise `AlreadyExists` unless ``path`` is free or an empty directory, or what is there may be replaced."""
    with explained("look at", path):
        try:
            mode = fs.lstat(path).st_mode
        except FileNotFoundError:
            return
        if replace or (stat.S_ISDIR(mode) and not fs.listdir(path)):
            return
    raise AlreadyExists(
        f"{path!r} is there already: choose another place, or have it replaced (--overwrite, or replace=True)", path=path
    )


@contextmanager
def _written(fs: FileSystem, path: str) -> Iterator[OutFile]:
    with explained("create", path):
        fd = fs.open(path, NEW_FILE_FLAGS)
    with explained("close", path), closing(fs, fd):
        file = OutFile(fs, path, fd)
        yield file
        file.make_durable()


def _put_in_place(fs: FileSystem, temporary: str, path: str) -> str | None:
    """Give a directory its name; returns where the one that had it is now, if one had."""
    with explained("rename", path):
        try:
            fs.lstat(path)
        except FileNotFoundError:
            fs.rename(temporary, path)
            return None
        old = _temporary_beside(path)
        fs.rename(path, old)
        try:
            fs.rename(temporary, path)
        except OSError:
            fs.rename(old, path)
            raise
    return old


def _sync_all(fs: FileSystem, directories: Directories, path: str) -> None:
    """Make the entries of a directory and of those below it durable."""
    for leaf in fs.listdir(path):
        below = os.path.join(path, leaf)
        if stat.S_ISDIR(fs.lstat(below).st_mode):
            _sync_all(fs, directories, below)
    directories.sync(path)


def _remove(fs: FileSystem, path: str) -> None:
    """Remove what is left at ``path``, if anything; what cannot be removed stays, and its name says that it is temporary."""
    with suppress(OSError):
        if stat.S_ISDIR(fs.lstat(path).st_mode):
            for leaf in fs.listdir(path):
                _remove(fs, os.path.join(path, leaf))
            fs.rmdir(path)
        else:
            fs.unlink(path)


def _temporary_beside(path: str) -> str:
    return f"{path}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
