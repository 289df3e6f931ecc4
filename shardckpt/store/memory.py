# SPDX-License-Identifier: Apache-2.0
"""A store in the memory of this process, for tests and examples. It is as durable as the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shardckpt.errors import AlreadyExists, MissingFile
from shardckpt.store.base import Entry, FileReader, FileWriter, Store, check_name
from shardckpt.store.buffers import scatter


@dataclass(slots=True)
class _File:
    data: bytearray
    modified: float


@dataclass(slots=True)
class _Space:
    files: dict[str, _File] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


class MemoryStore(Store):
    """The files of a space, which all stores of that name in this process share.

    ``name`` is that of the space, or of a directory in it: ``run42/step-00000001``.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.time) -> None:
        self.url = f"memory://{name}"
        self._clock = clock
        space, _, directory = name.strip("/").partition("/")
        self._directory = f"{directory}/" if directory else ""
        with _spaces_lock:
            self._space = _spaces.setdefault(space, _Space())

    def create(self, name: str, size: int) -> FileWriter:
        file = self._add(name, bytearray(size))
        return _MemoryWriter(name, size, file, self)

    def replace(self, name: str, size: int) -> FileWriter:
        check_name(name)
        return _MemoryReplacement(name, size, _File(bytearray(size), self._clock()), self)

    def open(self, name: str) -> FileReader:
        path = self._directory + check_name(name)
        with self._space.lock:
            file = self._space.files.get(path)
        if file is None:
            raise MissingFile(f"cannot open {name!r} in {self.url}: it was deleted or never written", name=name)
        return _MemoryReader(name, file)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._add(name, bytearray(data))

    def list(self, prefix: str = "") -> Sequence[Entry]:
        start = self._directory + (f"{check_name(prefix)}/" if prefix else "")
        with self._space.lock:
            files = sorted(self._space.files.items())
        skipped = len(self._directory)
        return [Entry(path[skipped:], len(file.data), file.modified) for path, file in files if path.startswith(start)]

    def delete(self, name: str) -> None:
        path = self._directory + check_name(name)
        with self._space.lock:
            self._space.files.pop(path, None)

    def _put(self, name: str, file: _File) -> None:
        with self._space.lock:
            self._space.files[self._directory + name] = file

    def _add(self, name: str, data: bytearray) -> _File:
        file = _File(data, self._clock())
        path = self._directory + check_name(name)
        with self._space.lock:
            if self._space.files.setdefault(path, file) is not file:
                raise AlreadyExists(
                    f"cannot create {name!r} in {self.url}: it exists, and is never overwritten: use another step "
                    "or root, or delete it first",
                    name=name,
                )
        return file


class _MemoryWriter(FileWriter):
    def __init__(self, name: str, size: int, file: _File, store: MemoryStore) -> None:
        super().__init__(name, size)
        self._file = file
        self._store = store

    def _write(self, offset: int, buffer: memoryview) -> None:
        end = min(offset + buffer.nbytes, self.size)
        memoryview(self._file.data)[offset:end] = buffer[: end - offset]

    def _finish(self) -> None:
        self._file.modified = self._store._clock()

    def _abort(self) -> None:
        self._store.delete(self.name)


class _MemoryReplacement(_MemoryWriter):
    def _finish(self) -> None:
        super()._finish()
        self._store._put(self.name, self._file)

    def _abort(self) -> None:
        """Nobody has seen it."""


class _MemoryReader(FileReader):
    def __init__(self, name: str, file: _File) -> None:
        super().__init__(name, len(file.data))
        self._data = memoryview(file.data)

    def close(self) -> None:
        self._data = memoryview(b"")

    def _fill(self, offset: int, buffers: list[memoryview]) -> None:
        wanted = sum(buffer.nbytes for buffer in buffers)
        scatter(self._data[offset : offset + wanted], buffers, 0)
