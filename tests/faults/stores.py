# SPDX-License-Identifier: Apache-2.0
"""A store of which one call fails, whatever holds the bytes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from shardckpt.errors import StoreError
from shardckpt.store import Entry, FileReader, FileWriter, Store

_Result = TypeVar("_Result")


class FaultyStore(Store):
    """The calls of ``store``, its files' included; call number ``failing`` raises ``error``.

    With ``done`` it does so when all is done, as when the reply of a server is lost; else nothing is done.
    """

    def __init__(self, store: Store, failing: int = sys.maxsize, *, done: bool = False, error: type[StoreError] = StoreError):
        self.url = store.url
        self.calls: list[str] = []
        """What was called so far, with the name of the file."""
        self._store = store
        self._failing = failing
        self._done = done
        self._error = error
        self._lock = threading.Lock()

    def call(self, what: str, operation: Callable[[], _Result]) -> _Result:
        """Call ``operation``, or fail."""
        with self._lock:
            self.calls.append(what)
            fails = len(self.calls) == self._failing
        if fails and not self._done:
            raise self._error(f"injected before {what}")
        result = operation()
        if fails:
            raise self._error(f"injected after {what}")
        return result

    def create(self, name: str, size: int) -> FileWriter:
        return _Writer(self, self.call(f"create {name}", lambda: self._store.create(name, size)))

    def replace(self, name: str, size: int) -> FileWriter:
        return _Writer(self, self.call(f"replace {name}", lambda: self._store.replace(name, size)))

    def open(self, name: str) -> FileReader:
        return _Reader(self, self.call(f"open {name}", lambda: self._store.open(name)))

    def put_if_absent(self, name: str, data: bytes) -> None:
        self.call(f"put {name}", lambda: self._store.put_if_absent(name, data))

    def list(self, prefix: str = "") -> Sequence[Entry]:
        return self.call(f"list {prefix}", lambda: self._store.list(prefix))

    def delete(self, name: str) -> None:
        self.call(f"delete {name}", lambda: self._store.delete(name))


class _Writer(FileWriter):
    def __init__(self, store: FaultyStore, writer: FileWriter) -> None:
        super().__init__(writer.name, writer.size)
        self._store = store
        self._writer = writer

    def _write(self, offset: int, buffer: memoryview) -> None:
        self._store.call(f"write {self.name}", lambda: self._writer.write_at(offset, buffer))

    def _finish(self) -> None:
        self._store.call(f"finish {self.name}", self._writer.finish)

    def _abort(self) -> None:
        self._writer.abort()


class _Reader(FileReader):
    def __init__(self, store: FaultyStore, reader: FileReader) -> None:
        super().__init__(reader.name, reader.size)
        self._store = store
        self._reader = reader

    def close(self) -> None:
        self._reader.close()

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        self._store.call(f"read {self.name}", lambda: self._reader.read_at(offset, buffers))
