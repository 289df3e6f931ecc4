# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a tree of Python values, with a `Content` in place of each tensor: as `shardckpt.load` returns it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from shardckpt.errors import InvalidManifest
from shardckpt.layout import PerRankShapes
from shardckpt.maintain.contents import matches, require_matches
from shardckpt.maintain.parts import Leaf
from shardckpt.maintain.stored import StoredCheckpoint
from shardckpt.plan import Plan, PlannedTensor
from shardckpt.tree import decode_containers, unflatten
from shardckpt.values import decode_value

from .content import ContentReader, whole

_VALUE_LIMIT = 64 << 20


def read_state(stored: StoredCheckpoint, reader: ContentReader, keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The state, or what of it matches one of the shell patterns ``keys``; what each rank saved for itself is a dict by rank.

    Raises `MissingNames` when a pattern matches nothing, `InvalidManifest`, and what reading raises.
    """
    require_matches(keys, stored)
    plan, manifest = stored.checkpoint.plan, stored.checkpoint.manifest
    leaves: dict[str, Any] = {name: decode_value(v, name) for name, v in manifest.objects.items() if matches(name, keys)}
    for tensor, names in named_tensors(plan):
        wanted = [name for name in names if matches(name, keys)]
        if wanted:
            leaves |= dict.fromkeys(wanted, _leaf(tensor, plan.world_size, reader))
    return unflatten(leaves, decode_containers(manifest.containers))


def named_tensors(plan: Plan) -> Iterator[tuple[PlannedTensor, list[str]]]:
    """All tensors with all their names: the one that each is stored under, and then the others in order."""
    others: dict[str, list[str]] = {}
    for alias, canonical in sorted(plan.aliases.items()):
        others.setdefault(canonical, []).append(alias)
    for tensor in plan.tensors:
        yield tensor, [tensor.name, *others.get(tensor.name, ())]


def _leaf(tensor: PlannedTensor, world_size: int, reader: ContentReader) -> Any:
    layout = tensor.layout
    if not isinstance(layout, PerRankShapes):
        return whole(Leaf(tensor))
    ranks = [rank for rank in range(world_size) if layout.shape_of(rank) is not None]
    if not tensor.is_value:
        return {rank: whole(Leaf(tensor, rank)) for rank in ranks}
    return {rank: _read_value(Leaf(tensor, rank), reader) for rank in ranks}


def _read_value(leaf: Leaf, reader: ContentReader) -> Any:
    if leaf.nbytes > _VALUE_LIMIT:
        raise InvalidManifest(f"invalid manifest: value {leaf.tensor.name!r} has {leaf.nbytes} bytes", name=leaf.tensor.name)
    (text,) = reader.small([leaf])
    try:
        return decode_value(msgspec.json.decode(text), leaf.tensor.name)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidManifest(
            f"value {leaf.tensor.name!r} of rank {leaf.rank} is not JSON: {error}", name=leaf.tensor.name
        ) from None
