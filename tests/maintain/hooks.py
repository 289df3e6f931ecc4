# SPDX-License-Identifier: Apache-2.0
"""Stores on which somebody else acts in between, just before a call of one's choice."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import shardckpt
from shardckpt.store import Entry, FileReader, FileWriter, MemoryStore, Store


class Interrupted(MemoryStore):
    """A store of which every call is counted; before one of them, ``act`` is called once."""

    def __init__(self, name: str, at: int = -1, act: Callable[[], object] = lambda: None) -> None:
        super().__init__(name)
        self.calls = 0
        self._at = at
        self._act = act

    def create(self, name: str, size: int) -> FileWriter:
        self._count()
        return super().create(name, size)

    def open(self, name: str) -> FileReader:
        self._count()
        return super().open(name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._count()
        super().put_if_absent(name, data)

    def list(self, prefix: str = "") -> Sequence[Entry]:
        self._count()
        return super().list(prefix)

    def delete(self, name: str) -> None:
        self._count()
        super().delete(name)

    def _count(self) -> None:
        self.calls += 1
        if self.calls - 1 == self._at:
            self._act()


def checkpointer_on(store: Store, **options: Any) -> shardckpt.Checkpointer:
    """A checkpointer of one process whose root is ``store``."""

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> Store:
            return store

    return Injected(store.url, **options)
