# SPDX-License-Identifier: Apache-2.0
"""What is wrong with one file that takes part in a parity, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardckpt.buffer import CHUNK, BufferPool
from shardckpt.checksum import damaged_blocks, digests_between
from shardckpt.crew import share_out
from shardckpt.errors import CheckpointError
from shardckpt.parity.xor import Body
from shardckpt.store import FileReader, Store


@dataclass(frozen=True, slots=True)
class Damage:
    """How a file differs from what was written."""

    kind: str
    """Name of the error of `shardckpt.errors` that describes it."""
    message: str
    """What is wrong, for people."""
    blocks: frozenset[int]
    """Numbers of blocks of the body that are not as they were written; none when only what surrounds them is not."""


def find_damage(
    store: Store, body: Body, header: bytes, block_size: int, *, workers: int, read_data: bool = True
) -> Damage | None:
    """What is wrong with a file that begins with ``header``; None when all is well.

    Without ``read_data`` the blocks are not read.
    """
    blocks = -(-(body.size - body.offset) // block_size)
    try:
        with store.open(body.name) as reader:
            if reader.size != body.size:
                kind = "TruncatedFile" if reader.size < body.size else "IntegrityError"
                message = f"the file has {reader.size} bytes instead of {body.size}"
            else:
                kind, message = "", ""
            damaged = _compare(reader, body, block_size, workers) if read_data else set()
            is_header_good = reader.size < body.offset or _read(reader, body.offset) == header
    except CheckpointError as error:
        return Damage(type(error).__name__, error.message, frozenset(range(blocks)))
    if not kind and damaged:
        kind, message = "ChecksumMismatch", f"{len(damaged)} of {blocks} blocks do not match their digest, or cannot be read"
    if not kind and not is_header_good:
        kind, message = "ChecksumMismatch", "the header is not the one that follows from the manifest"
    return Damage(kind, message, frozenset(damaged)) if kind else None


def _read(reader: FileReader, length: int) -> bytes:
    data = bytearray(length)
    reader.read_at(0, [memoryview(data)])
    return bytes(data)


def _compare(reader: FileReader, body: Body, block_size: int, workers: int) -> set[int]:
    """Numbers of blocks that are not there, cannot be read, or do not match their digest."""
    length = body.size - body.offset
    chunk = max(CHUNK, block_size)
    pool = BufferPool(workers, chunk)

    def compare_chunk(start: int) -> Iterator[int]:
        stop = min(start + chunk, length)
        wanted = digests_between(body.digests, start, stop, block_size)
        with pool.borrow() as buffer:
            data = buffer.bytes[: stop - start]
            try:
                reader.read_at(body.offset + start, [data])
                return iter([start // block_size + number for number in damaged_blocks(data, block_size, wanted)])
            except CheckpointError:
                # one block that cannot be read does not take its neighbours with it
                return iter([at // block_size for at in range(start, stop, block_size) if not _is_good(at, data)])

    def _is_good(start: int, scratch: memoryview) -> bool:
        stop = min(start + block_size, length)
        try:
            reader.read_at(body.offset + start, [scratch[: stop - start]])
        except CheckpointError:
            return False
        return not damaged_blocks(scratch[: stop - start], block_size, digests_between(body.digests, start, stop, block_size))

    found = share_out(compare_chunk, range(0, length, chunk), workers, "shardckpt-verify")
    return {number for numbers in found for number in numbers}
