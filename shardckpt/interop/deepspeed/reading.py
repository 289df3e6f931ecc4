# SPDX-License-Identifier: Apache-2.0
"""The files of DeepSpeed in the place of rank files: each storage counts as the file of a rank, without digests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...buffer import Buffer
from ...errors import CheckpointError, MissingFile
from ...layout import ITEMSIZE, FlatLayout
from ...plan import Plan, PlannedTensor
from ...read import CheckpointFiles, Chunk
from ...stage import FileData, Part
from ...store import FileReader, Store
from ...validate import Checkpoint
from .arrays import Array

BLOCK = 64 << 10
"""Bytes; reads that are closer together become one."""
PartRow = tuple[int, int, int, int]
"""(number of the storage, first byte in it, first element of the raveled tensor, behind the last one)."""


class Sources(msgspec.Struct):
    """Where all tensors lie, in a form that is sent from rank 0 to the others."""

    storages: list[tuple[str, int, int]]
    """File, first byte and length of each."""
    tensors: dict[str, tuple[str, tuple[int, ...], list[PartRow]]]
    """Dtype, shape and parts by name."""


def number_sources(arrays: Mapping[str, Array]) -> Sources:
    """Number the storages. One that has several parts of one tensor counts several times: a rank has one part of each."""
    numbers: dict[Any, int] = {}
    tensors = {}
    for name, array in arrays.items():
        times: dict[Any, int] = {}
        rows = []
        for part in array.parts:
            times[part.record] = times.get(part.record, 0) + 1
            number = numbers.setdefault((part.record, times[part.record]), len(numbers))
            rows.append((number, part.offset, part.start, part.stop))
        tensors[name] = (array.dtype, array.shape, rows)
    return Sources([(record.file, record.offset, record.nbytes) for record, _ in numbers], tensors)


class SourcePlan(Plan):
    """A plan whose files are storages."""

    def __init__(self, sources: Sources, aliases: dict[str, str]) -> None:
        self._sizes = [nbytes for _, _, nbytes in sources.storages]
        self._rows: list[dict[str, int]] = [{} for _ in sources.storages]
        planned = []
        for name, (dtype, shape, rows) in sources.tensors.items():
            if name in aliases:
                continue
            for number, offset, _, _ in rows:
                self._rows[number][name] = offset
            planned.append(PlannedTensor(name, dtype, FlatLayout(shape, tuple((n, a, b) for n, _, a, b in rows))))
        super().__init__(len(self._sizes), planned, aliases, BLOCK)

    def offsets(self, rank: int) -> dict[str, int]:
        return self._rows[rank]

    @property
    def bytes_by_rank(self) -> npt.NDArray[np.int64]:
        return np.array(self._sizes, dtype=np.int64)


class Readers:
    """Open files, which several threads read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: dict[str, FileReader] = {}
        self._lock = threading.Lock()

    def read(self, file: str, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file from ``offset`` on."""
        with self._lock:
            reader = self._open.get(file)
            if reader is None:
                reader = self._open[file] = self._store.open(file)
        reader.read_at(offset, [into])

    def close(self) -> None:
        """Close all."""
        for reader in self._open.values():
            reader.close()
        self._open.clear()


class SourceFiles(CheckpointFiles):
    """Reads storages. There are no digests, so nothing is verified."""

    def __init__(self, store: Store, checkpoint: Checkpoint, sources: Sources, *args: Any) -> None:
        super().__init__(store, "", checkpoint, *args)
        self._sources = sources
        self._opened = Readers(store)
        self._read_bytes = 0

    @property
    def bytes_read(self) -> int:
        return self._read_bytes

    def read_verified(self, chunk: Chunk, into: memoryview) -> None:
        file, offset, _ = self._sources.storages[chunk.reads.file]
        with self.timings.measure("read", chunk.stop - chunk.start):
            self._opened.read(file, offset + chunk.start, into[: chunk.stop - chunk.start])
        with self._lock:
            self._read_bytes += chunk.stop - chunk.start

    def are_visible(self) -> bool:
        """Whether this rank sees the directory that rank 0 has read."""
        for file, _, _ in self._sources.storages[:1]:
            try:
                self._store.open(file).close()
            except MissingFile:
                return False
        return True

    def require_committed(self, error: CheckpointError) -> None:
        """There is no manifest that could have gone before the files."""

    def require_sizes(self) -> None:
        """The sizes of files were looked at when their directories were read."""

    def close(self) -> None:
        self._opened.close()


class SourceData(FileData):
    """The data region of a rank's file, from the parts of storages."""

    def __init__(
        self, data: FileData, store: Store, arrays: Mapping[str, Array], progress: Callable[[int, int], object]
    ) -> None:
        super().__init__(data.where, data.tensors)
        self._arrays = arrays
        self._readers = Readers(store)
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def copy(self, part: Part, buffer: Buffer, position: int) -> None:
        array = self._arrays[part.name]
        size = ITEMSIZE[array.dtype]
        for source in _over(array, part.start, part.stop):
            low, high = max(part.start, source.start), min(part.stop, source.stop)
            at = position + (low - part.start) * size
            into = memoryview(buffer.bytes)[at : at + (high - low) * size]
            self._readers.read(source.record.file, source.record.offset + source.offset + (low - source.start) * size, into)
        with self._lock:
            self._done += (part.stop - part.start) * size
            self._progress(self._done, self.nbytes)

    def close(self) -> None:
        """Close the files."""
        self._readers.close()


def _over(array: Array, start: int, stop: int) -> Sequence[Any]:
    return [part for part in array.parts if part.start < stop and part.stop > start]
