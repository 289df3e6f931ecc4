# SPDX-License-Identifier: Apache-2.0
"""Makes, flushes and removes the directories between a local root and its files.

A file is durable only when the entry of its name in its directory is, and so is the entry of that directory
in the next one up. Who made a directory does not matter for that: another process may have made it a moment
ago and not flushed it yet. So directories are flushed with the files in them, and not when they are made; those
above the root once, and again if they had to be made again.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Final

from shardckpt.errors import MissingFile, StoreError
from shardckpt.store.filesystem import FileSystem, closing
from shardckpt.store.oserror import explained

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# How often a directory may disappear between being made and being used, while others prune beside it.
_ATTEMPTS: Final = 100


class Directories:
    """The directories of one root. ``root`` is an absolute path."""

    def __init__(self, fs: FileSystem, root: str) -> None:
        self._fs = fs
        self._root = root
        self._is_above_durable = False
        self._made_above: set[str] = set()

    def make(self, directory: str) -> None:
        """Make ``directory`` and what is missing above it; `sync_path` makes them durable.

        A concurrent `remove_empty` may have removed it again when this returns.
        """
        with explained("make directory", directory):
            for attempt in range(_ATTEMPTS):
                try:
                    self._fs.mkdir(directory)
                    if not directory.startswith(os.path.join(self._root, "")):
                        self._made_above.add(directory)
                    return
                except FileNotFoundError:
                    # some file systems, such as /proc, say so although what is above is there
                    if attempt == _ATTEMPTS - 1:
                        raise
                    self.make(os.path.dirname(directory))
                except FileExistsError:
                    return self._require_directory(directory)

    def sync(self, directory: str) -> None:
        """Make the entries of one directory durable."""
        with explained("flush directory", directory):
            fd = self._fs.open(directory, _DIRECTORY_FLAGS)
            with closing(self._fs, fd):
                try:
                    self._fs.fsync(fd)
                except OSError as error:
                    # Says that this file system has no such operation for directories: nothing to wait for.
                    if error.errno != errno.EINVAL:
                        raise

    def sync_path(self, directory: str) -> None:
        """Make every entry on the way from the mount point down to the files in ``directory`` durable."""
        while directory != self._root:
            self.sync(directory)
            directory = os.path.dirname(directory)
        self.sync(self._root)
        if self._made_above or not self._is_above_durable:
            self._sync_above()

    def remove_empty(self, directory: str) -> None:
        """Remove ``directory`` and those above it, below the root, for as long as they are empty; durably."""
        while directory != self._root:
            parent = os.path.dirname(directory)
            with explained("remove directory", directory):
                try:
                    self._fs.rmdir(directory)
                except FileNotFoundError:
                    pass
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                        return
                    raise
            # Also when another process removed it: that one may not have flushed it yet.
            self.sync_if_there(parent)
            directory = parent

    def sync_if_there(self, directory: str) -> None:
        """Like `sync`; a directory that is gone is no error."""
        with suppress(MissingFile):
            self.sync(directory)

    def _require_directory(self, path: str) -> None:
        try:
            mode = self._fs.stat(path).st_mode
        except FileNotFoundError:
            try:
                mode = self._fs.lstat(path).st_mode
            except FileNotFoundError:
                return
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def _sync_above(self) -> None:
        """Make the entry of the root durable, and those of all directories above it."""
        made = frozenset(self._made_above)
        directory = self._root
        while (parent := os.path.dirname(directory)) != directory and self._is_same_device(directory, parent):
            try:
                self.sync(parent)
            except StoreError as error:
                # Who may not list a directory has most likely not made what is in it, and cannot flush it.
                if directory in made or error.details.get("errno") not in ("EACCES", "EPERM"):
                    raise
            directory = parent
        self._is_above_durable = True
        self._made_above -= made

    def _is_same_device(self, directory: str, parent: str) -> bool:
        # The entry that something is mounted on was there before.
        with explained("flush directory", parent):
            return self._fs.stat(directory).st_dev == self._fs.stat(parent).st_dev
