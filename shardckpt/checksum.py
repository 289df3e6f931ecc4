# SPDX-License-Identifier: Apache-2.0
"""Block digests: 8-byte xxh3-64 of each fixed-size block of a file's data region.

They find accidents (a flipped bit, a lost write), not attackers; against those there is the manifest's SHA-256.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from .errors import InvalidManifest

DIGEST_BYTES = 8


class Block(NamedTuple):
    """One digest block of a data region: its number, and its bytes ``[start, stop)``."""

    number: int
    start: int
    stop: int


def blocks_of(start: int, stop: int, block_size: int) -> Iterator[Block]:
    """The blocks between two byte positions of a data region; ``start`` is on a block border."""
    for at in range(start, stop, block_size):
        yield Block(at // block_size, at, min(at + block_size, stop))


def digest(data: bytes | memoryview) -> bytes:
    """xxh3-64 of ``data``, big-endian."""
    return xxhash.xxh3_64_digest(data)


def encode_digests(digests: bytes) -> str:
    """Digests, one after the other, as the manifest has them."""
    return base64.b64encode(digests).decode("ascii")


def decode_digests(text: str, where: str) -> bytes:
    """The inverse of `encode_digests`; `InvalidManifest` when ``text`` is not base64 of whole digests."""
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidManifest(f"invalid manifest: {where}: digests are not base64: {error}", where=where) from None
    if len(found) % DIGEST_BYTES:
        raise InvalidManifest(f"invalid manifest: {where}: {len(found)} bytes of digests are not whole ones", where=where)
    return found
