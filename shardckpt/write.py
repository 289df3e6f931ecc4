# SPDX-License-Identifier: Apache-2.0
"""Write one rank's file: a safetensors header, then the data region, chunk by chunk, by a few threads.

The digests of a receipt are those that the source has taken: of staged memory before any of it is written, of a ring when each
chunk is filled, of what comes straight from tensors right after the copy.
"""

from __future__ import annotations

import msgspec

from .buffer import Buffer
from .checksum import block_digests, digest
from .crew import share_out
from .events import Timings
from .feed import Source, num_chunks
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


def write_rank_file(
    store: Store, name: str, header: bytes, source: Source, block_size: int, *, workers: int, timings: Timings
) -> Receipt:
    """Write ``header`` and what ``source`` gives, make the file durable, and return the receipt.

    ``block_size`` is that of digests, in bytes; a chunk of the source is a multiple. Raises `StoreError`, or what the source
    raises; the file is removed then.
    """
    size, header_digest = len(header) + source.nbytes, digest(header).hex()

    def digest_blocks(chunk: memoryview) -> bytes:
        with timings.measure("hash", len(chunk)):
            return block_digests(chunk, block_size)

    def write_chunk(index: int) -> bytes:
        start = index * source.chunk
        nbytes = min(source.chunk, source.nbytes - start)
        padded = -(-nbytes // writer.alignment) * writer.alignment
        with source.take(index) as chunk:
            with timings.measure("write", nbytes):
                writer.write_at(len(header) + start, chunk.memory[:padded])
            return chunk.digests

    with store.create(name, size) as writer:
        _write_header(writer, header)
        source.begin(digest_blocks, workers)
        chunks = range(num_chunks(source.nbytes, source.chunk))
        digests = share_out(write_chunk, chunks, workers, "shardckpt-write")
        with timings.measure("fsync", size):
            writer.finish()
    return Receipt(name, size, len(header), header_digest, b"".join(digests))


def _write_header(writer: FileWriter, header: bytes) -> None:
    buffer = Buffer(len(header))
    buffer.bytes[:] = header
    writer.write_at(0, buffer.bytes)
