# SPDX-License-Identifier: Apache-2.0
"""Write one rank's file: pieces back to back behind a safetensors header, hashed while they are in cache.

The data region is cut into chunks that a few threads stage, hash and write independently of each other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import msgspec
import torch

from .checksum import block_digests, digest
from .header import safetensors_header
from .plan import FilePiece, Plan
from .stage import CHUNK, Buffer, BufferPool, gather
from .store import FileWriter, Store


class Receipt(msgspec.Struct, frozen=True):
    """What a rank says of the file it has made durable."""

    name: str
    """Path in the store."""
    size: int
    """Bytes of the whole file."""
    data: int
    """Bytes before the data region."""
    header: str
    """Digest of those bytes, in hex."""
    digests: bytes
    """Digests of the blocks of the data region, one after the other."""
    seconds: float
    """Wall time of writing, fsync included."""


def write_rank_file(
    store: Store, name: str, plan: Plan, rank: int, tensors: Mapping[str, torch.Tensor], *, workers: int
) -> Receipt:
    """Write what ``plan`` gives to ``rank``, make it durable, and return the receipt.

    ``tensors`` are the rank's local tensors by name. Uses ``workers`` threads with one buffer each, and no other memory of
    the size of data. Raises `StoreError`; the file is removed then.
    """
    begun = perf_counter()
    pieces = plan.file_pieces(rank)
    header = safetensors_header(pieces)
    data_bytes = int(plan.bytes_by_rank[rank])
    chunk = max(CHUNK, plan.block_size)
    pool = BufferPool(workers, chunk)
    with store.create(name, len(header) + data_bytes) as writer:
        _write_header(writer, header, pool)
        job = _RankFile(writer, len(header), data_bytes, pieces, tensors, plan.block_size, pool)
        starts = range(0, data_bytes, chunk)
        with ThreadPoolExecutor(workers, thread_name_prefix="shardckpt-write") as threads:
            digests = list(threads.map(job.write_chunk, starts))
        writer.finish()
    return Receipt(name, len(header) + data_bytes, len(header), digest(header).hex(), b"".join(digests), perf_counter() - begun)


class _RankFile:
    """The data region of a file, chunk by chunk."""

    def __init__(
        self,
        writer: FileWriter,
        start: int,
        data_bytes: int,
        pieces: Sequence[FilePiece],
        tensors: Mapping[str, torch.Tensor],
        block_size: int,
        pool: BufferPool,
    ) -> None:
        self._writer = writer
        self._start = start
        self._data_bytes = data_bytes
        self._pieces = pieces
        self._offsets = [piece.offset for piece in pieces]
        self._tensors = tensors
        self._block_size = block_size
        self._pool = pool

    def write_chunk(self, start: int) -> bytes:
        """Stage, hash and write the chunk at byte ``start`` of the data region; returns its digests."""
        stop = min(start + self._pool.size, self._data_bytes)
        with self._pool.borrow() as buffer:
            self._fill(buffer, start, stop)
            digests = block_digests(buffer.bytes[: stop - start], self._block_size)
            padded = -(-(stop - start) // self._writer.alignment) * self._writer.alignment
            self._writer.write_at(self._start + start, buffer.bytes[:padded])
        return digests

    def _fill(self, buffer: Buffer, start: int, stop: int) -> None:
        at = bisect_right(self._offsets, start) - 1
        while at < len(self._pieces) and self._pieces[at].offset < stop:
            piece = self._pieces[at]
            low, high = max(start, piece.offset), min(stop, piece.offset + piece.nbytes)
            if low < high:
                size = piece.tensor.itemsize
                first = piece.local[0] + (low - piece.offset) // size
                data = self._tensors[piece.tensor.name]
                gather(data, first, first + (high - low) // size, buffer, low - start)
            at += 1


def _write_header(writer: FileWriter, header: bytes, pool: BufferPool) -> None:
    with pool.borrow() as buffer:
        for at in range(0, len(header), pool.size):
            part = header[at : at + pool.size]
            buffer.bytes[: len(part)] = part
            writer.write_at(at, buffer.bytes[: len(part)])
