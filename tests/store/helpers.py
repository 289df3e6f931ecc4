# SPDX-License-Identifier: Apache-2.0
"""What the tests of all stores share: data in page-aligned memory, and writing and reading a whole file."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shardckpt.store import ALIGNMENT, FileReader, FileWriter, Store

_T = TypeVar("_T")


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def aligned(data: bytes) -> memoryview:
    """``data`` in page-aligned memory, filled up to a multiple of the alignment with bytes that must not be stored."""
    length = max(ALIGNMENT, -(-len(data) // ALIGNMENT) * ALIGNMENT)
    page = mmap.mmap(-1, length)
    page[:] = data + b"\xee" * (length - len(data))
    return memoryview(page)[: -(-len(data) // ALIGNMENT) * ALIGNMENT]


def write(writer: FileWriter, data: bytes, chunk: int = ALIGNMENT) -> None:
    """Write ``data`` in chunks, last one first."""
    view = aligned(data)
    for offset in reversed(range(0, view.nbytes, chunk)):
        writer.write_at(offset, view[offset : offset + chunk])


def store_file(store: Store, name: str, data: bytes) -> None:
    with store.create(name, len(data)) as writer:
        write(writer, data)
        writer.finish()


def replace_file(store: Store, name: str, data: bytes) -> None:
    with store.replace(name, len(data)) as writer:
        write(writer, data)
        writer.finish()


def load_file(store: Store, name: str) -> bytes:
    with store.open(name) as reader:
        return read_all(reader)


def read_all(reader: FileReader) -> bytes:
    data = bytearray(reader.size)
    reader.read_at(0, [memoryview(data)])
    return bytes(data)


def names(store: Store, prefix: str = "") -> list[str]:
    return [entry.name for entry in store.list(prefix)]


def in_threads(count: int, task: Callable[[int], _T]) -> list[_T]:
    """``task(0)`` ... ``task(count - 1)``, each in a thread of its own."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(task, range(count)))
