# SPDX-License-Identifier: Apache-2.0
"""The XOR of files of a group, of which no byte counts that does not match its digest.

The rank files of a group and the slices of its parity are alike here: each is a *body* that lies somewhere beside the others,
and at each place the XOR of all of them is zero. So any one of them, parity too, is the XOR of the others.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardckpt.buffer import CHUNK, BufferPool
from shardckpt.checksum import block_digests, damaged_blocks, digests_between
from shardckpt.crew import share_out
from shardckpt.errors import ChecksumMismatch, TruncatedFile
from shardckpt.store import FileReader, FileWriter, Store

_MEMORY = 32 << 20
"""Bytes for buffers; two of the largest blocks fit."""


@dataclass(frozen=True, slots=True)
class Body:
    """The part that one file has in the parity of its group."""

    name: str
    """Of the file, in the store."""
    size: int
    """Bytes of the file."""
    offset: int
    """Byte of the file where the part begins; it goes on to the end."""
    start: int
    """Where it lies beside the others, in bytes; at a block border."""
    digests: bytes
    """Of its blocks."""

    @property
    def stop(self) -> int:
        """Where it ends beside the others."""
        return self.start + self.size - self.offset


class Image(Protocol):
    """Memory that still holds what a body has in storage."""

    def read(self, start: int, stop: int, into: memoryview) -> bool:
        """Fill ``into`` with the body's bytes ``[start, stop)``; False when they are not to be had."""


class Others:
    """The bodies that make up the XOR, opened when they are first needed. Any thread may use it, each with its own memory."""

    def __init__(
        self, store: Store, bodies: Sequence[Body], block_size: int, images: Mapping[str, Image] | None = None
    ) -> None:
        """Bodies of which there are ``images``, by name, are only read from storage when these do not give what was written."""
        self._images = images or {}
        self._store = store
        self._bodies = bodies
        self._block_size = block_size
        self._readers: dict[str, FileReader] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        """Bytes that were read from storage so far."""

    def combine(self, start: int, stop: int, into: memoryview, scratch: memoryview) -> None:
        """Fill ``into`` with the XOR of all bodies' bytes ``[start, stop)``; ``start`` is at a block border.

        Whole blocks are read, so both buffers have room for the last one. Raises `ChecksumMismatch`, `TruncatedFile`,
        `MissingFile` or `StoreError` when a body cannot be trusted there.
        """
        stop = -(-stop // self._block_size) * self._block_size
        result = np.frombuffer(into, dtype=np.uint8, count=stop - start)
        result.fill(0)
        for body in self._bodies:
            low, high = max(start, body.start), min(stop, body.stop)
            if low < high:
                part = scratch[: high - low]
                self._read(body, low, high, part)
                target = result[low - start : high - start]
                np.bitwise_xor(target, np.frombuffer(part, dtype=np.uint8), out=target)

    def _read(self, body: Body, low: int, high: int, part: memoryview) -> None:
        low, high = low - body.start, high - body.start
        wanted = digests_between(body.digests, low, high, self._block_size)
        image = self._images.get(body.name)
        if image is not None and image.read(low, high, part) and not damaged_blocks(part, self._block_size, wanted):
            return
        at = body.offset + low
        self._open(body).read_at(at, [part])
        damaged = damaged_blocks(part, self._block_size, wanted)
        if damaged:
            start = at + damaged[0] * self._block_size
            stop = min(start + self._block_size, at + len(part))
            raise ChecksumMismatch(
                f"{body.name} in {self._store.url}: bytes [{start}, {stop}) do not match their digest",
                name=body.name,
                start=start,
                stop=stop,
            )
        with self._lock:
            self.bytes_read += len(part)

    def _open(self, body: Body) -> FileReader:
        with self._lock:
            reader = self._readers.get(body.name)
            if reader is None:
                reader = self._store.open(body.name)
                if reader.size != body.size:
                    reader.close()
                    raise TruncatedFile(
                        f"{body.name} in {self._store.url} has {reader.size} bytes where {body.size} were written",
                        name=body.name,
                        wanted=body.size,
                        got=reader.size,
                    )
                reader.expect_ascending()
                self._readers[body.name] = reader
            return reader

    def close(self) -> None:
        """Close what is open."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Others:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_slice(writer: FileWriter, start: int, others: Others, block_size: int, workers: int) -> bytes:
    """Write the XOR of ``others`` from byte ``start`` on, as far as the file goes, make it durable; digests of its blocks.

    Takes at most 32 MiB for buffers. Raises what `Others.combine` and the writer raise; then the file is not finished.
    """
    chunk = max(CHUNK, block_size)
    threads = max(1, min(workers, _MEMORY // (2 * chunk)))
    pool = BufferPool(2 * threads, chunk)

    def write_chunk(at: int) -> bytes:
        nbytes = min(chunk, writer.size - at)
        padded = -(-nbytes // writer.alignment) * writer.alignment
        with pool.borrow() as into, pool.borrow() as scratch:
            others.combine(start + at, start + at + nbytes, into.bytes, scratch.bytes)
            writer.write_at(at, into.bytes[:padded])
            return block_digests(into.bytes[:nbytes], block_size)

    digests = share_out(write_chunk, range(0, writer.size, chunk), threads, "shardckpt-parity")
    writer.finish()
    return b"".join(digests)
