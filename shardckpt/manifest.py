# SPDX-License-Identifier: Apache-2.0
"""The manifest: the one JSON document that makes a set of rank files a checkpoint.

A manifest is canonical JSON: structs in field order, mappings sorted by key, no white space, defaults left out. One state of
a checkpoint therefore has one encoding, and its SHA-256 names it. It ends with a checksum of all bytes before, in this and
every later version, so that a flipped bit is told from a newer format. Reading is in `shardckpt.validate`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any

import msgspec

from .checksum import WIDE_DIGEST_DIGITS, wide_digest
from .events import Phase

FORMAT = "shardckpt"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT = 256 << 20
"""Bytes; a larger manifest is refused before it is read."""
HEADER_ALIGNMENT = 4096
"""Data in a rank file starts at a multiple of this many bytes."""

DEPTH_LIMIT = 64
"""Most containers inside each other, of a value and of a whole state."""

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class MeshRecord(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True):
    """A mesh; its ranks are ``start + coordinate . strides``, or listed when that does not describe them."""

    shape: tuple[Count, ...]
    start: Count = 0
    strides: tuple[Count, ...] | None = None
    ranks: tuple[Count, ...] | None = None


class LayoutRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Placements on a mesh: ``R``, ``S<dim>``, or ``S<dim>/<split factor>`` for a strided shard."""

    mesh: Count
    placements: tuple[str, ...]


class TensorRecord(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True):
    """One tensor. Exactly one of ``layout``, ``flat``, ``boxes``, ``per_rank``, ``alias`` and ``replicated`` is set."""

    dtype: str = ""
    shape: tuple[Count, ...] = ()
    layout: Count | None = None
    writers: tuple[Count, Count] | None = None
    """(first replica that writes, how many share the writing); (0, 1) when left out."""
    flat: tuple[tuple[Count, Count, Count], ...] | None = None
    boxes: tuple[tuple[Count, tuple[Count, ...], tuple[Count, ...]], ...] | None = None
    per_rank: tuple[tuple[Count, ...] | None, ...] | None = None
    """Shape by rank, null where a rank has none; a single one stands for all ranks."""
    value: bool = False
    """The tensor is the JSON text of a value (per-rank values live in the rank files)."""
    alias: str | None = None
    """This name is a second one for the tensor of that name."""
    replicated: bool = False
    """Only between ranks: equal on whichever ranks list it. Never in a manifest."""


class FileRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One rank file. ``digests`` is base64 of 8-byte big-endian xxh3-64, one per block of the data region."""

    rank: Count
    name: str
    size: Count
    data: Count
    """Where the data region starts, which is the length of the header with its padding, in bytes."""
    header: str
    """xxh3-64 of those first bytes, 16 hex digits."""
    digests: str


class MetricsRecord(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the save spent its time on, for people: no load depends on it. See `shardckpt.metrics`."""

    microseconds: dict[Phase, str]
    """By phase: base64 of a 4-byte big-endian number for each rank; of ``receipts`` for rank 0 only."""


class Manifest(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """The whole document; see DESIGN, "On disk"."""

    format: str
    version: Count
    features: tuple[str, ...] = ()
    attempt: str
    step: Count
    created: str
    world_size: Count
    block_size: Count
    meshes: tuple[MeshRecord, ...]
    layouts: tuple[LayoutRecord, ...]
    tensors: dict[str, TensorRecord]
    objects: dict[str, Any]
    """Replicated values by full name, in the encoding of `shardckpt.values`."""
    containers: dict[str, Any]
    """Kinds of containers that the names below them do not tell."""
    files: tuple[FileRecord, ...]
    torch: str
    shardckpt: str
    metadata: dict[str, Any] = {}
    metrics: MetricsRecord | None = None
    checksum: str
    """xxh3-128 of all bytes before these 32 hex digits. Always the last field."""


_END = b'"}'
_SEAL_BYTES = WIDE_DIGEST_DIGITS + len(_END)
_ENCODER = msgspec.json.Encoder(order="deterministic")


def encode_canonical(value: Any) -> bytes:
    """The canonical JSON of a struct or JSON value."""
    return _ENCODER.encode(value)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest, with the checksum that belongs to it, whatever stood there."""
    return seal(encode_canonical(msgspec.structs.replace(manifest, checksum="")))


def seal(data: bytes) -> bytes:
    """Fill in the checksum of JSON that ends with an empty one."""
    covered = data[: -len(_END)]
    return covered + wide_digest(covered).encode() + _END


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` ends with the checksum of what stands before it."""
    covered, found = memoryview(data)[:-_SEAL_BYTES], data[-_SEAL_BYTES : -len(_END)]
    return found == wide_digest(covered).encode()


def manifest_digest(data: bytes) -> str:
    """SHA-256 of a manifest's bytes, in hex: what `shardckpt.save` returns and ``expect_digest`` takes."""
    return hashlib.sha256(data).hexdigest()


# ---- names in a state

_NAME_PART = r"(?:[^/~\x00-\x1f\x7f-\x9f\u2028\u2029]|~[01])+"
_NAME = re.compile(f"{_NAME_PART}(?:/{_NAME_PART})*")


def is_name(text: str) -> bool:
    """Whether ``text`` can be the name of a leaf or a container: escaped keys, none empty or with a control character."""
    return _NAME.fullmatch(text) is not None and text.count("/") < DEPTH_LIMIT


# ---- names in a root

STEP_PATTERN = re.compile(r"step-(\d{8,18})\Z", re.ASCII)
FILE_PATTERN = re.compile(r"rank-(\d{5,9})-([0-9a-f]{8,32})\.safetensors\Z", re.ASCII)


def step_directory(step: int) -> str:
    """Directory name of a step."""
    return f"step-{step:08d}"


def rank_file_name(rank: int, attempt: str) -> str:
    """File name of one rank in one attempt at a save; attempts never share names, so nothing is ever overwritten."""
    return f"rank-{rank:05d}-{attempt}.safetensors"
