# SPDX-License-Identifier: Apache-2.0
"""Block digests: 8-byte xxh3-64 of each fixed-size block of a file's data region.

They find accidents (a flipped bit, a lost write), not attackers; against those there is the manifest's SHA-256.
"""

from __future__ import annotations

import base64
import binascii

import xxhash

from .errors import InvalidManifest

DIGEST_BYTES = 8
WIDE_DIGEST_DIGITS = 32


def digest(data: bytes | memoryview) -> bytes:
    """xxh3-64 of ``data``, big-endian."""
    return xxhash.xxh3_64_digest(data)


def wide_digest(data: bytes | memoryview) -> str:
    """xxh3-128 of ``data``, in hex."""
    return xxhash.xxh3_128_hexdigest(data)


def block_digests(data: memoryview, block_size: int) -> bytes:
    """Digests of the blocks of ``data``, one after the other; the last block may be shorter."""
    return b"".join([xxhash.xxh3_64_digest(data[at : at + block_size]) for at in range(0, len(data), block_size)])


def damaged_blocks(data: memoryview, block_size: int, wanted: bytes) -> list[int]:
    """Numbers of the blocks of ``data`` whose digests are not those of ``wanted``, which has one for each block."""
    found = block_digests(data, block_size)
    if found == wanted:
        return []
    starts = range(0, max(len(found), len(wanted)), DIGEST_BYTES)
    return [n for n, at in enumerate(starts) if found[at : at + DIGEST_BYTES] != wanted[at : at + DIGEST_BYTES]]


def digests_between(digests: bytes, start: int, stop: int, block_size: int) -> bytes:
    """The part of a file's ``digests`` for bytes ``[start, stop)`` of its data region; ``start`` is on a block border."""
    return digests[start // block_size * DIGEST_BYTES : -(-stop // block_size) * DIGEST_BYTES]


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
