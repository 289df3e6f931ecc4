# SPDX-License-Identifier: Apache-2.0
"""How far an export is."""

from __future__ import annotations

from collections.abc import Iterable

from shardckpt.maintain.stored import Progress

from .content import Content


class Counted:
    """Adds up what is written, and tells of it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = self._total = 0

    def expect(self, contents: Iterable[Content]) -> int:
        """Learn of contents that will be written; returns their bytes."""
        nbytes = sum(content.nbytes for content in contents)
        self._total += nbytes
        return nbytes

    def add(self, nbytes: int) -> None:
        """Learn that ``nbytes`` more are written."""
        self._done += nbytes
        self._progress(self._done, self._total)
