# SPDX-License-Identifier: Apache-2.0
"""A small good manifest, ways to change it, and all that a loader makes of one before it reads data. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec

from shardckpt.checksum import encode_digests
from shardckpt.commit import Contents, draft_manifest
from shardckpt.layout import BoxLayout, FlatLayout, Mesh, MeshLayout, PerRankShapes, Replicate, Shard, StridedShard
from shardckpt.manifest import FileRecord, Manifest, MetricsRecord, encode_manifest, rank_file_name, seal
from shardckpt.metrics import decode_columns, encode_columns
from shardckpt.plan import Plan, PlannedTensor
from shardckpt.tree import read_tree
from shardckpt.validate import Checkpoint, parse_manifest

ATTEMPT = "0123456789abcdef"
BLOCK = 65536
HEADER = 4096
_CHECKSUM_DIGITS = 32

Document = dict[str, Any]
Edit = Callable[[Document], object]


def build(plan: Plan, objects: Document, containers: Document, metadata: Document, metrics: MetricsRecord | None) -> bytes:
    """The manifest of files that are nowhere, the same bytes at each call."""
    contents = Contents(step=7, attempt=ATTEMPT, objects=objects, containers=containers, metadata=metadata, torch="2.13.0")
    files = []
    for rank, size in enumerate(plan.bytes_by_rank.tolist()):
        digests = encode_digests(b"12345678" * -(-size // plan.block_size))
        files.append(FileRecord(rank, rank_file_name(rank, ATTEMPT), HEADER + size, HEADER, "0" * 16, digests))
    draft = draft_manifest(plan, contents)
    return encode_manifest(
        msgspec.structs.replace(
            draft, created="2026-01-01T00:00:00.000+00:00", shardckpt="0.1.0", files=tuple(files), metrics=metrics
        )
    )


def good_plan() -> Plan:
    """A tensor of each kind on two ranks."""
    pair = Mesh((0, 1), (2,))
    return Plan(
        2,
        [
            PlannedTensor("model/cut", "float32", MeshLayout((4, 3), pair, (Shard(0),))),
            PlannedTensor("model/same", "bfloat16", MeshLayout((6,), pair, (Replicate(),)), (0, 2)),
            PlannedTensor("model/woven", "int64", MeshLayout((8,), pair, (StridedShard(0, 2),))),
            PlannedTensor("flat", "float32", FlatLayout((5, 2), ((0, 0, 4), (1, 4, 10)))),
            PlannedTensor("boxes", "int64", BoxLayout((2, 4), ((0, (0, 0), (2, 2)), (1, (0, 2), (2, 2))))),
            PlannedTensor("list/0", "uint8", PerRankShapes(((2,), None))),
            PlannedTensor("value", "uint8", PerRankShapes(((9,),)), is_value=True),
        ],
        {"tied": "model/cut"},
        BLOCK,
    )


@cache
def good() -> bytes:
    """A manifest with something of everything."""
    objects = {"list/1": {"$": "tuple", "v": [1, 2.5, None]}, "type": {"$": "dtype", "v": "float16"}, "n": 1}
    containers = {"list": {"$": "container", "kind": "list", "v": 2}}
    metrics = encode_columns([{"write": 0.5}, {"write": 0.25}])
    return build(good_plan(), objects, containers, {"note": "x", "big": {"$": "int", "v": hex(1 << 64)}}, metrics)


def edited(*edits: Edit) -> bytes:
    """The good manifest after some edits: with the right checksum, and canonical where it still fits the schema."""
    document = json.loads(good())
    for edit in edits:
        edit(document)
    return encoded(document)


def encoded(document: Any) -> bytes:
    """A document with the right checksum, canonical where it fits the schema."""
    try:
        return encode_manifest(msgspec.convert(document, Manifest))
    except (msgspec.ValidationError, RecursionError):
        pass
    if isinstance(document, dict):
        # last of all, where it is looked for
        document = {key: value for key, value in document.items() if key != "checksum"} | {"checksum": "0" * _CHECKSUM_DIGITS}
    return resealed(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass"))


def resealed(text: bytes) -> bytes:
    """Text with the checksum that belongs to it, in place of the one that stands before its last two bytes."""
    return seal(text[: -_CHECKSUM_DIGITS - 2] + text[-2:])


def replaced(old: bytes, new: bytes) -> bytes:
    """The good manifest with one part of its text changed, and the right checksum."""
    text = good()
    assert text.count(old) == 1, old
    return resealed(text.replace(old, new))


def put(*path: Any) -> Edit:
    """Set the item at ``path[:-1]`` to ``path[-1]``."""

    def edit(document: Document) -> None:
        at: Any = document
        for key in path[:-2]:
            at = at[key]
        at[path[-2]] = path[-1]

    return edit


def drop(*path: Any) -> Edit:
    """Take the item at ``path`` out."""

    def edit(document: Document) -> None:
        at: Any = document
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]

    return edit


def add_tensor(name: str, **record: Any) -> Edit:
    """Add a tensor, or replace one."""
    return put("tensors", name, record)


def examine(data: bytes) -> Checkpoint:
    """All that a loader computes from a manifest before it opens a file; raises `InvalidManifest`."""
    checkpoint = parse_manifest(data)
    manifest, plan = checkpoint.manifest, checkpoint.plan
    read_tree(manifest)
    for rank in range(manifest.world_size):
        for piece in plan.lay_out(rank):
            assert 0 <= piece.offset <= piece.offset + piece.nbytes <= plan.bytes_by_rank[rank]
    assert len(checkpoint.digests) == manifest.world_size
    if manifest.metrics is not None:
        decode_columns(manifest.metrics, manifest.world_size)
    return checkpoint
