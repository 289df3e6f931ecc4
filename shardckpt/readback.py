# SPDX-License-Identifier: Apache-2.0
"""Read a rank's file back when it is durable, past this host's caches, and compare it with the digests of what was staged."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from .buffer import Buffer, BufferPool
from .checksum import damaged_blocks, digest, digests_between
from .crew import share_out
from .errors import ChecksumMismatch, TruncatedFile
from .events import Timings
from .feed import chunk_size, num_chunks
from .store import FileReader, Store
from .write import Receipt

Verify: TypeAlias = Literal["readback"]
"""What a save may look at before it commits."""


def read_back(store: Store, receipt: Receipt, header: bytes, block_size: int, *, workers: int, timings: Timings) -> None:
    """Raise `ChecksumMismatch`, with file, byte range and entries of the header, unless the storage holds what was written.

    Takes ``workers`` buffers of a chunk. Raises `TruncatedFile` and `StoreError` too.
    """
    chunk, nbytes = chunk_size(block_size), receipt.size - receipt.data
    pool = BufferPool(workers, chunk)

    def check(index: int) -> None:
        start = index * chunk
        stop = min(start + chunk, nbytes)
        with pool.borrow() as buffer:
            data = buffer.bytes[: stop - start]
            reader.read_at(receipt.data + start, [data])
            damaged = damaged_blocks(data, block_size, digests_between(receipt.digests, start, stop, block_size))
        if damaged:
            low = start + damaged[0] * block_size
            high = min(low + block_size, stop)
            raise _mismatch(store, receipt, low, high, _entries(header, low, high))

    with timings.measure("readback", receipt.size), store.open_uncached(receipt.name) as reader:
        _check_header(store, receipt, reader)
        share_out(check, range(num_chunks(nbytes, chunk)), workers, "shardckpt-readback")


def _check_header(store: Store, receipt: Receipt, reader: FileReader) -> None:
    if reader.size != receipt.size:
        raise TruncatedFile(
            f"{receipt.name} in {store.url} has {reader.size} bytes right after {receipt.size} were written and made durable: "
            "nothing is committed; do not trust this storage",
            name=receipt.name,
            wanted=receipt.size,
            got=reader.size,
        )
    buffer = Buffer(receipt.data)
    reader.read_at(0, [buffer.bytes])
    if digest(buffer.bytes).hex() != receipt.header:
        raise _mismatch(store, receipt, -receipt.data, 0, [])


def _mismatch(store: Store, receipt: Receipt, start: int, stop: int, names: list[str]) -> ChecksumMismatch:
    """``start`` and ``stop`` count from the data region."""
    holds = ", ".join(map(repr, names[:4])) + (" and more" if len(names) > 4 else "") or "the header"
    return ChecksumMismatch(
        f"{receipt.name} in {store.url}: bytes [{receipt.data + start}, {receipt.data + stop}) were read back otherwise than "
        f"they were staged. They hold {holds}. Nothing is committed; if it happens again, suspect memory or disk of this host",
        name=receipt.name,
        start=receipt.data + start,
        stop=receipt.data + stop,
        tensors=names,
    )


def _entries(header: bytes, start: int, stop: int) -> list[str]:
    """The entries of a safetensors header, tensors or parts of them, that have bytes in a range of the data region."""
    found: dict[str, Any] = msgspec.json.decode(header[8:])
    found.pop("__metadata__")
    ranges = {name: entry["data_offsets"] for name, entry in found.items()}
    return [name for name, (low, high) in ranges.items() if low < stop and high > start]
