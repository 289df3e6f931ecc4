# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save``: where their records lie, without reading more than the directory at the end and the pickle.

Such a file is a ZIP archive (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT) with ZIP64 fields, whose records are
stored uncompressed: ``<name>/data.pkl`` has the objects, ``<name>/data/<key>`` the memory of each storage.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ...errors import InvalidForeignCheckpoint, MissingFile, TruncatedFile, UnsupportedForeignCheckpoint
from ...store import Store

PICKLE_LIMIT = 64 << 20
"""Bytes; a larger pickle is refused before it is read."""
_DIRECTORY_LIMIT = 64 << 20
_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_IN_EXTRA = 0xFFFFFFFF
_ENCRYPTED = 1


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of a file that are the memory of one storage."""

    file: str
    """Name in the store."""
    offset: int
    """First byte in the file."""
    nbytes: int
    """Length in bytes."""


class Archive:
    """One file of ``torch.save``, as its directory says.

    Raises `MissingFile`, `TruncatedFile`, `InvalidForeignCheckpoint` for what is no whole archive, and
    `UnsupportedForeignCheckpoint` for files of before torch 1.6 and for compressed records.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._where = f"{store.url}/{name}"
        self._reader = store.open(name)
        self.size = self._reader.size
        """Bytes of the whole file."""
        try:
            self._records = self._read_directory()
        except BaseException:
            self._reader.close()
            raise

    def pickle(self) -> bytes:
        """The pickle of the objects, which matches its checksum."""
        record, checksum = self._find("data.pkl")
        if record.nbytes > PICKLE_LIMIT:
            raise UnsupportedForeignCheckpoint(
                f"{self._where}: its pickle has {record.nbytes} bytes, more than the {PICKLE_LIMIT} that are read at most: "
                "large values other than tensors are in it. Load it with torch.load, make tensors of them, and save it again",
                name=self.name,
            )
        data = self._read(record.offset, record.nbytes)
        if zlib.crc32(data) != checksum:
            raise self.invalid("its pickle does not match its checksum: it was changed after it was written")
        return data

    def storage(self, key: str) -> Record:
        """The memory of the storage ``key``."""
        return self._find(f"data/{key}")[0]

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def invalid(self, problem: str) -> InvalidForeignCheckpoint:
        """The error for a file that is not what torch.save writes."""
        return InvalidForeignCheckpoint(f"{self._where}: {problem}. Copy it anew, or import another tag", name=self.name)

    def _find(self, leaf: str) -> tuple[Record, int]:
        found = self._records.get(leaf)
        if found is None:
            raise self.invalid(f"it has no record {leaf!r}")
        start, nbytes, checksum = found
        local = _LOCAL.unpack(self._read(start, _LOCAL.size))
        if local[0] != b"PK\x03\x04":
            raise self.invalid(f"its record {leaf!r} does not begin where the directory says")
        offset = start + _LOCAL.size + local[-2] + local[-1]
        if offset + nbytes > self.size:
            raise self._truncated(offset + nbytes)
        return Record(self.name, offset, nbytes), checksum

    def _read(self, offset: int, nbytes: int) -> bytes:
        if offset + nbytes > self.size:
            raise self._truncated(offset + nbytes)
        data = bytearray(nbytes)
        self._reader.read_at(offset, [memoryview(data)])
        return bytes(data)

    def _truncated(self, wanted: int) -> TruncatedFile:
        return TruncatedFile(
            f"{self._where} has {self.size} bytes, and its directory speaks of {wanted}: it was cut. Copy it anew",
            name=self.name,
            wanted=wanted,
            got=self.size,
        )

    def _read_directory(self) -> dict[str, tuple[int, int, int]]:
        """(start of the local header, length, checksum) of each record, by name without the common first part."""
        if self.size < 4 or self._read(0, 4)[:2] != b"PK":
            raise self._not_an_archive()
        start = max(0, self.size - _LONGEST_COMMENT - _END.size)
        tail = self._read(start, self.size - start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise TruncatedFile(
                f"{self._where}: the directory that ends such a file is not there: it was cut, or is still being written",
                name=self.name,
                got=self.size,
            )
        *_, count, nbytes, offset, _ = _END.unpack_from(tail, at)
        if at >= _LOCATOR.size:
            signature, _, end64, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
            if signature == b"PK\x06\x07":
                *_, count, nbytes, offset = _END64.unpack(self._read(end64, _END64.size))
        if nbytes > _DIRECTORY_LIMIT or count > nbytes // _ENTRY.size:
            raise self.invalid(f"its directory has {count} records in {nbytes} bytes")
        return self._parse_directory(self._read(offset, nbytes), count)

    def _parse_directory(self, data: bytes, count: int) -> dict[str, tuple[int, int, int]]:
        records: dict[str, tuple[int, int, int]] = {}
        at, first = 0, None
        for _ in range(count):
            if at + _ENTRY.size > len(data):
                raise self.invalid("its directory is cut")
            entry = _ENTRY.unpack_from(data, at)
            signature, flags, method, checksum = entry[0], entry[3], entry[4], entry[7]
            name_size, extra_size, comment_size = entry[10:13]
            at += _ENTRY.size
            name = data[at : at + name_size].decode("utf-8", "replace")
            extra = data[at + name_size : at + name_size + extra_size]
            at += name_size + extra_size + comment_size
            packed, nbytes, start = self._widen(entry[8], entry[9], entry[16], extra)
            if signature != b"PK\x01\x02" or flags & _ENCRYPTED:
                raise self.invalid("its directory is not one of torch.save")
            if method != 0 or packed != nbytes:
                raise UnsupportedForeignCheckpoint(
                    f"{self._where}: record {name!r} is compressed, which torch.save never does. Unpack it, or load it with "
                    "torch.load and save it again",
                    name=self.name,
                )
            top, _, leaf = name.partition("/")
            first = first if first is not None else top
            if top != first or not leaf or leaf in records:
                raise self.invalid(f"record {name!r} is not below {first!r}, or comes twice")
            records[leaf] = (start, nbytes, checksum)
        return records

    def _widen(self, packed: int, nbytes: int, start: int, extra: bytes) -> tuple[int, int, int]:
        """Sizes and the start of a record, which the field ZIP64 has where 32 bits are not enough."""
        values = [nbytes, packed, start]
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, at)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{min(size, len(extra) - at - 4) // 8}Q", extra, at + 4))
                values = [next(wide, value) if value == _IN_EXTRA else value for value in values]
            at += 4 + size
        return values[1], values[0], values[2]

    def _not_an_archive(self) -> MissingFile | UnsupportedForeignCheckpoint | TruncatedFile:
        if not self.size:
            return TruncatedFile(f"{self._where} is empty: it was cut", name=self.name, got=0)
        return UnsupportedForeignCheckpoint(
            f"{self._where} is no archive: it was written by torch.save of before 1.6 (or with "
            "_use_new_zipfile_serialization=False), or is no file of torch. Load it with torch.load and save it again",
            name=self.name,
        )
