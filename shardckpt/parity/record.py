# SPDX-License-Identifier: Apache-2.0
"""The document that makes parity files count, beside the manifest that it belongs to, and its one validator.

Like a manifest it is canonical JSON and appears whole or not at all. A checkpoint is complete without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec

from shardckpt.checksum import DIGEST_BYTES, decode_digests, encode_digests
from shardckpt.errors import InvalidManifest, InvalidParity, MissingFile
from shardckpt.manifest import MANIFEST_LIMIT, Count, FileRecord, encode_canonical, is_sealed, seal
from shardckpt.records import quoted
from shardckpt.store import Store
from shardckpt.validate import Checkpoint

from .layout import cut_parity, parity_file_name, parity_record_name
from .xor import Body

PARITY_FORMAT = "shardckpt-parity"
PARITY_VERSION = 1
PARITY_LIMIT = MANIFEST_LIMIT
"""Bytes; a larger record is refused before it is read."""


class ParityFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One slice of a parity. ``digests`` are as in the manifest, one per block."""

    name: str
    size: Count
    digests: str


class ParityGroup(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Ranks whose files share a parity, and its slices in order, of which there may be fewer when there is little data."""

    ranks: tuple[Count, ...]
    files: tuple[ParityFile, ...]


class ParityRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole document."""

    format: str
    version: Count
    method: str
    """``xor``."""
    attempt: str
    """That of the manifest."""
    manifest: str
    """SHA-256 of the manifest, in hex."""
    groups: tuple[ParityGroup, ...]
    checksum: str
    """xxh3-128 of all bytes before it, as in a manifest."""


@dataclass(frozen=True)
class Parity:
    """A parity record that fits its checkpoint."""

    record: ParityRecord
    """The document."""
    prefix: str
    """What the names of the checkpoint's files start with."""
    checkpoint: Checkpoint
    """What it protects."""

    @cached_property
    def group_of(self) -> dict[int, int]:
        """The number of each rank's group."""
        return {rank: number for number, group in enumerate(self.record.groups) for rank in group.ranks}

    @property
    def files(self) -> list[ParityFile]:
        """All slices of all groups."""
        return [file for group in self.record.groups for file in group.files]

    def bodies(self, group: int) -> list[Body]:
        """Rank files of a group, by rank, and then the slices of its parity: together their XOR is zero."""
        members = [self.checkpoint.manifest.files[rank] for rank in self.record.groups[group].ranks]
        return [member_body(self.prefix, file) for file in members] + self._slices(group)

    def slices(self) -> list[Body]:
        """The slices of all groups."""
        return [body for group in range(len(self.record.groups)) for body in self._slices(group)]

    def _slices(self, group: int) -> list[Body]:
        found = self.record.groups[group]
        members = [self.checkpoint.manifest.files[rank] for rank in found.ranks]
        cuts = cut_parity([file.size - file.data for file in members], self.checkpoint.manifest.block_size)
        return [
            Body(f"{self.prefix}{file.name}", file.size, 0, start, decode_digests(file.digests, file.name))
            for file, (start, _) in zip(found.files, cuts, strict=True)
        ]


def member_body(prefix: str, file: FileRecord) -> Body:
    """The part that a rank file has in the parity of its group."""
    return Body(f"{prefix}{file.name}", file.size, file.data, 0, decode_digests(file.digests, file.name))


def build_parity(
    checkpoint: Checkpoint, groups: Sequence[Sequence[int]], files: Sequence[Sequence[tuple[int, bytes]]]
) -> bytes:
    """The record of slices with (size, digests), by group; raises `InvalidParity` if they do not fit the checkpoint."""
    attempt = checkpoint.manifest.attempt
    record = ParityRecord(
        PARITY_FORMAT,
        PARITY_VERSION,
        "xor",
        attempt,
        checkpoint.digest,
        tuple(
            ParityGroup(
                tuple(ranks),
                tuple(
                    ParityFile(parity_file_name(group, number, attempt), size, encode_digests(digests))
                    for number, (size, digests) in enumerate(slices)
                ),
            )
            for group, (ranks, slices) in enumerate(zip(groups, files, strict=True))
        ),
        "",
    )
    data = seal(encode_canonical(record))
    parse_parity(data, "", checkpoint)
    return data


def find_parity(store: Store, prefix: str, checkpoint: Checkpoint) -> Parity | None:
    """The parity of a checkpoint, None when it has none; raises `InvalidParity`, and `StoreError` when it cannot be read."""
    try:
        data = store.get(f"{prefix}{parity_record_name(checkpoint.manifest.attempt)}", PARITY_LIMIT)
    except MissingFile:
        return None
    return parse_parity(data, prefix, checkpoint)


def parse_parity(data: bytes, prefix: str, checkpoint: Checkpoint) -> Parity:
    """Decode and check a parity record. Raises `InvalidParity` for all that does not fit the checkpoint."""
    _require(is_sealed(data), "its bytes do not match the checksum at its end: it was cut, or changed after it was written")
    try:
        record = msgspec.json.decode(data, type=ParityRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidParity(f"invalid parity record: {quoted(str(error))}") from None
    _require(encode_canonical(record) == data, "it is not canonical JSON")
    known = (PARITY_FORMAT, PARITY_VERSION, "xor")
    _require((record.format, record.version, record.method) == known, "it is of a format, version or method that is not known")
    manifest = checkpoint.manifest
    _require(record.attempt == manifest.attempt, f"it is of attempt {record.attempt!r}, the manifest of {manifest.attempt!r}")
    _require(record.manifest == checkpoint.digest, "it belongs to a manifest with another SHA-256")
    ranks = sorted(rank for group in record.groups for rank in group.ranks)
    _require(ranks == list(range(manifest.world_size)), f"its groups are not of {manifest.world_size} ranks, each in one")
    for number, group in enumerate(record.groups):
        _check_group(number, group, checkpoint)
    return Parity(record, prefix, checkpoint)


def _check_group(number: int, group: ParityGroup, checkpoint: Checkpoint) -> None:
    where, manifest = f"group {number}", checkpoint.manifest
    _require(list(group.ranks) == sorted(group.ranks) and bool(group.ranks), f"{where}: no ranks, or not in order")
    cuts = cut_parity([manifest.files[rank].size - manifest.files[rank].data for rank in group.ranks], manifest.block_size)
    _require(len(group.files) == len(cuts), f"{where}: {len(group.files)} slices, where its files need {len(cuts)}")
    for at, (file, (start, stop)) in enumerate(zip(group.files, cuts, strict=True)):
        _require(file.name == parity_file_name(number, at, manifest.attempt), f"{where}: file name {file.name!r}")
        _require(file.size == stop - start, f"{file.name}: {file.size} bytes, where {stop - start} are needed")
        try:
            found = len(decode_digests(file.digests, file.name)) // DIGEST_BYTES
        except InvalidManifest as error:
            raise InvalidParity(f"invalid parity record: {error.message}") from None
        blocks = -(-file.size // manifest.block_size)
        _require(found == blocks, f"{file.name}: {found} digests for {blocks} blocks")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise InvalidParity(f"invalid parity record: {problem}")
