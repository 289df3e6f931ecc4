# SPDX-License-Identifier: Apache-2.0
"""A file system that knows in which phase a save is."""

from __future__ import annotations

import os

from tests.store.faults import FaultyFileSystem


class Phased(FaultyFileSystem):
    """Tells before each phase of a save to ``root``: ``writing``, ``receipt`` or ``commit``."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root = root
        self._has_written = False

    def _reach(self, phase: str) -> None:
        """Called before a phase, and before each write of ``writing``."""

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        self._reach("writing")
        written = super().pwrite(fd, buffer, offset)
        self._has_written = True
        return written

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if self._has_written and path == self._root and flags & os.O_DIRECTORY:
            # the file is flushed, and so is its directory: only the receipt is missing
            self._has_written = False
            self._reach("receipt")
        return super().open(path, flags, mode)

    def link(self, source: str, target: str) -> None:
        if target.endswith("manifest.json"):
            self._reach("commit")
        super().link(source, target)
