# SPDX-License-Identifier: Apache-2.0
"""Files that `torch.load` reads, written in one pass: a zip archive as ``torch.save`` makes it, uncompressed.

``archive/data.pkl`` is the pickle, ``archive/data/<n>`` are the storages, each at a multiple of 64 bytes so that they can be
mapped (``torch/serialization.py``, ``caffe2/serialize/inline_container.h``). As in torch's own files, checksums and lengths
follow the data and stand in the directory at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from shardckpt.store.outside import OutFile

from .content import ContentReader
from .pickling import Pickled

_ALIGNMENT = 64
LARGE = 1 << 31
"""Bytes from which on a record's length is written with 64 bits."""


def write_torch_file(file: OutFile, pickled: Pickled, reader: ContentReader, *, large: int = LARGE) -> None:
    """Write a pickle and the tensors that it refers to; lengths from ``large`` bytes on have 64 bits.

    Raises what reading and writing raise.
    """
    # OutFile has what ZipFile calls of a stream that cannot go back
    with ZipFile(cast(IO[bytes], file), "w", ZIP_STORED) as archive:
        _put(archive, file, "data.pkl", pickled.data)
        _put(archive, file, ".format_version", b"1")
        _put(archive, file, ".storage_alignment", str(_ALIGNMENT).encode())
        _put(archive, file, "byteorder", sys.byteorder.encode())
        chunks = reader.stream(pickled.contents)
        at, chunk = next(chunks, (-1, b""))
        for number, content in enumerate(pickled.contents):
            with _record(archive, file, f"data/{number}", content.nbytes, large) as record:
                while at == number:
                    record.write(chunk)
                    at, chunk = next(chunks, (-1, b""))
        _put(archive, file, "version", b"3\n")


def _put(archive: ZipFile, file: OutFile, name: str, data: bytes) -> None:
    with _record(archive, file, name, len(data)) as record:
        record.write(data)


@contextmanager
def _record(archive: ZipFile, file: OutFile, name: str, size: int, large: int = LARGE) -> Iterator[Any]:
    """A record whose data starts at a multiple of `_ALIGNMENT`."""
    entry = ZipInfo(f"archive/{name}")
    is_large = size >= large
    before = file.tell() + 30 + len(entry.filename) + 4 + (20 if is_large else 0)
    padding = -before % _ALIGNMENT
    # a field of the header that readers skip; torch pads with the same one
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(entry, "w", force_zip64=is_large) as record:
        yield record
