# SPDX-License-Identifier: Apache-2.0
"""The one validator that every manifest passes before anything else looks at it.

After `parse_manifest` the document is canonical, every layout describes a tensor that can exist, the pieces cover every
tensor exactly, and the files have just the sizes that follow from them. The work grows with tensors + ranks + blocks.

Whoever wrote the document may mean harm, so nothing that it says is believed before it is checked. What it makes a loader
compute or hold is bounded by its own length: a rank takes a record of its file, and 16 MiB of data take a digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import msgspec

from .checksum import DIGEST_BYTES, decode_digests
from .errors import InvalidManifest, UnsupportedVersion
from .layout import GlobalLayout, MeshLayout, PerRankShapes, Replicated, StridedShard
from .manifest import (
    DEPTH_LIMIT,
    FILE_PATTERN,
    FORMAT,
    HEADER_ALIGNMENT,
    MANIFEST_LIMIT,
    VERSION,
    FileRecord,
    Manifest,
    TensorRecord,
    encode_canonical,
    is_name,
    is_sealed,
    manifest_digest,
    rank_file_name,
)
from .metrics import decode_columns
from .plan import MAX_BLOCK, Plan, PlannedTensor
from .records import QUOTED, LayoutDecoder, check_cover, quoted, require

KNOWN_FEATURES: frozenset[str] = frozenset()
MAX_WORLD_SIZE = 1 << 20
MAX_NESTING = 4 * DEPTH_LIMIT
"""Levels of JSON that a value may have: up to three for each of its own, and some for where it stands."""
MAX_WORK = 1 << 30
"""Numbers that planning may compute, over all distinct layouts, in about ten seconds. Large jobs need a hundredth of it."""
MAX_BYTES = 1 << 62
"""Of all tensors together, so that no sum of sizes overflows."""
MAX_HEADER = 100_000_000
"""Bytes; readers of safetensors refuse longer ones."""


@dataclass(frozen=True)
class Checkpoint:
    """A manifest that holds together."""

    manifest: Manifest
    """The document."""
    plan: Plan
    """Where everything lies, computed from it."""
    digest: str
    """SHA-256 of the manifest, in hex."""

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Block digests of each rank's file, one after the other."""
        return tuple(decode_digests(file.digests, f"files[{rank}]") for rank, file in enumerate(self.manifest.files))


_BOM = b"\xef\xbb\xbf"
_INT64 = range(-(1 << 63), 1 << 63)
_LAYOUT_WORK = 1024
"""What a layout costs beside what it costs for each rank, in numbers."""


class _Envelope(msgspec.Struct):
    """The fields that say whether the rest can be understood."""

    format: str
    version: int
    features: tuple[str, ...] = ()


def parse_manifest(data: bytes) -> Checkpoint:
    """Decode and check a manifest.

    Raises `InvalidManifest` for anything that is not a canonical, self-consistent manifest, and `UnsupportedVersion` for
    one that a newer shardckpt has written.
    """
    require(len(data) <= MANIFEST_LIMIT, "size", f"{len(data)} bytes, more than the {MANIFEST_LIMIT} that are read at most")
    if not is_sealed(data):
        raise InvalidManifest(
            "invalid manifest: its bytes do not match the checksum at its end: it was cut, or changed after it was written"
        )
    _check_version(_decode(data, _Envelope))
    manifest = _decode(data, Manifest)
    if encode_canonical(manifest) != data:
        raise InvalidManifest(
            "invalid manifest: not canonical JSON (a duplicate key, other spacing or order, a rounded number, or bytes "
            "after the end); it was changed after it was written"
        )
    require(0 < manifest.world_size <= MAX_WORLD_SIZE, "world_size", f"{manifest.world_size}")
    # before all that takes memory for each rank
    require(len(manifest.files) == manifest.world_size, "files", f"{len(manifest.files)} for {manifest.world_size} ranks")
    require(_is_block_size(manifest.block_size), "block_size", f"{manifest.block_size} is no power of two up to {MAX_BLOCK}")
    _check_values(manifest)
    plan = _check_tensors(manifest)
    _check_files(manifest, plan)
    if manifest.metrics is not None:
        decode_columns(manifest.metrics, manifest.world_size)
    return Checkpoint(manifest, plan, manifest_digest(data))


def _decode(data: bytes, kind: type[msgspec.Struct]) -> Any:
    require(not data.startswith(_BOM), "text", "it starts with a byte order mark")
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError:
        raise InvalidManifest("invalid manifest: nested too deep to be decoded") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # of a field that is not known the message has the name, which may be long and may steer a terminal
        raise InvalidManifest(f"invalid manifest: {quoted(str(error))}") from None


def _check_version(envelope: _Envelope) -> None:
    require(envelope.format == FORMAT, "format", f"{envelope.format[:QUOTED]!r} is not {FORMAT!r}")
    if envelope.version != VERSION:
        raise UnsupportedVersion(
            f"the checkpoint has format version {envelope.version}, this shardckpt reads version {VERSION}. "
            "Install the shardckpt that wrote it, or a newer one",
            version=envelope.version,
        )
    unknown = sorted(set(envelope.features) - KNOWN_FEATURES)
    if unknown:
        raise UnsupportedVersion(
            f"the checkpoint needs features that this shardckpt does not know: {quoted(str(unknown))}. "
            "Install a newer shardckpt",
            features=unknown,
        )


def _is_block_size(size: int) -> bool:
    return HEADER_ALIGNMENT <= size <= MAX_BLOCK and size & (size - 1) == 0


def _check_values(manifest: Manifest) -> None:
    """Refuse what no value is encoded as; what its tags mean is checked where it is decoded."""
    for where, names in (("objects", manifest.objects), ("containers", manifest.containers), ("tensors", manifest.tensors)):
        for name in names:
            require(is_name(name), where, f"{name[:QUOTED]!r} is no name")
    pending: list[tuple[Any, int]] = [(manifest.objects, 0), (manifest.containers, 0), (manifest.metadata, 0)]
    while pending:
        value, depth = pending.pop()
        require(depth <= MAX_NESTING, "values", f"nested deeper than {MAX_NESTING} levels")
        if isinstance(value, dict | list):
            pending += [(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value)]
        elif isinstance(value, int):
            require(value in _INT64, "values", "an integer beyond 64 bits")


def _check_tensors(manifest: Manifest) -> Plan:
    decoder = LayoutDecoder(manifest.meshes, manifest.layouts, manifest.world_size)
    planned, aliases = [], {}
    for name, record in manifest.tensors.items():
        require(name not in manifest.objects, f"tensor {name!r}", "a value has the same name")
        if record.alias is not None:
            aliases[name] = _check_alias(name, record, manifest)
        else:
            planned.append(_check_tensor(name, record, decoder, manifest.world_size))
    _check_costs(planned, manifest.world_size)
    return Plan(manifest.world_size, planned, aliases, manifest.block_size)


def _check_costs(planned: Sequence[PlannedTensor], world_size: int) -> None:
    """Refuse tensors whose sizes cannot be added up, or only in a very long time, before anybody tries."""
    total = sum(_nbytes(tensor, world_size) for tensor in planned)
    require(total < MAX_BYTES, "tensors", f"{total} bytes in all overflow")
    # the decoder makes one object of equal layouts
    distinct = {(id(tensor.layout), tensor.writers): tensor.layout for tensor in planned}
    work = 0
    for layout in distinct.values():
        if isinstance(layout, MeshLayout):
            parts = sum(p.split_factor for p in layout.placements if isinstance(p, StridedShard))
            work += (_LAYOUT_WORK + len(layout.mesh.ranks)) * (1 + parts)
    require(work <= MAX_WORK, "tensors", f"{len(distinct)} distinct layouts are too much to plan with")


def _nbytes(tensor: PlannedTensor, world_size: int) -> int:
    layout = tensor.layout
    if not isinstance(layout, PerRankShapes):
        return prod(layout.shape) * tensor.itemsize
    numel = sum(prod(shape) for shape in layout.shapes if shape is not None)
    return numel * tensor.itemsize * (world_size if len(layout.shapes) == 1 else 1)


def _check_alias(name: str, record: TensorRecord, manifest: Manifest) -> str:
    where = f"tensor {name!r}"
    canonical = manifest.tensors.get(record.alias or "")
    require(canonical is not None and canonical.alias is None, where, f"an alias of {record.alias!r}, which is no tensor")
    require(record == TensorRecord(alias=record.alias), where, "an alias with fields of its own")
    return record.alias or ""


def _check_tensor(name: str, record: TensorRecord, decoder: LayoutDecoder, world_size: int) -> PlannedTensor:
    where = f"tensor {name!r}"
    layout = decoder.decode(name, record)
    require(not isinstance(layout, Replicated), where, "a layout that is only for the exchange between ranks")
    global_layout: GlobalLayout = layout  # type: ignore[assignment]  # what a record decodes to, less Replicated
    check_cover(where, global_layout)
    if record.per_rank is not None:
        require(len(record.per_rank) in (1, world_size), where, "shapes for some ranks only")
    writers = record.writers or (0, 1)
    if record.writers is not None:
        first, count = writers
        replicas = layout.replicas if isinstance(layout, MeshLayout) else 1
        require(first < replicas and 1 <= count <= replicas, where, f"writers {writers} of {replicas} replicas")
        require(writers != (0, 1), where, "default writers are written out")
    return PlannedTensor(name, record.dtype, global_layout, writers, record.value)


def _check_files(manifest: Manifest, plan: Plan) -> None:
    for rank, (file, data_bytes) in enumerate(zip(manifest.files, plan.bytes_by_rank.tolist(), strict=True)):
        where = f"files[{rank}]"
        require(file.rank == rank, where, f"rank {file.rank} in the place of rank {rank}")
        _check_file(where, file, manifest.attempt, data_bytes, plan.block_size)


def _check_file(where: str, file: FileRecord, attempt: str, data_bytes: int, block_size: int) -> None:
    require(FILE_PATTERN.match(file.name) is not None, where, f"file name {file.name!r}")
    require(file.name == rank_file_name(file.rank, attempt), where, f"{file.name!r} is not of attempt {attempt!r}")
    aligned = 0 < file.data <= MAX_HEADER and file.data % HEADER_ALIGNMENT == 0
    require(aligned, where, f"data at byte {file.data}")
    require(file.size == file.data + data_bytes, where, f"{file.size} bytes where the tensors need {file.data + data_bytes}")
    require(_is_hex_digest(file.header), where, "header digest is not 16 hex digits")
    blocks = -(-data_bytes // block_size)
    found = len(decode_digests(file.digests, where)) // DIGEST_BYTES
    require(found == blocks, where, f"{found} digests for {blocks} blocks")


def _is_hex_digest(text: str) -> bool:
    return len(text) == 2 * DIGEST_BYTES and all(c in "0123456789abcdef" for c in text)
