# SPDX-License-Identifier: Apache-2.0
"""What each rank says of its tensors, and how that becomes one description for all.

A rank's table has no values and no per-rank shapes, so ranks that hold the same kind of state have equal tables, and only
the distinct ones travel. Merging costs grow with the distinct tables, not with the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from .errors import InvalidManifest, TableMismatch
from .layout import (
    BoxLayout,
    FlatLayout,
    GlobalLayout,
    Ints,
    Layout,
    Mesh,
    MeshLayout,
    PerRankLayout,
    PerRankShapes,
    Replicate,
    Replicated,
)
from .manifest import LayoutRecord, MeshRecord, TensorRecord, encode_canonical
from .records import LayoutDecoder, LayoutEncoder, check_cover

L = TypeVar("L")
Spread = MeshLayout | FlatLayout | BoxLayout
"""What all ranks together say of a tensor that they share."""


class Described(msgspec.Struct, frozen=True):
    """One tensor as one rank sees it, without its data. Each save makes them anew, and compares them with those of the last."""

    name: str
    """Full name in the state tree."""
    dtype: str
    """Name of the element type."""
    layout: Layout
    """How it is spread over ranks, as far as this rank knows."""
    alias_of: str | None = None
    """The canonical name, when this is a second name of one tensor."""
    is_value: bool = False
    """Whether the bytes are the JSON text of a per-rank value."""


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """One tensor as all ranks together hold it."""

    name: str
    """Full name in the state tree."""
    dtype: str
    """Name of the element type; of an alias, empty."""
    layout: GlobalLayout | None
    """How it is spread over ranks; None for an alias."""
    alias_of: str | None = None
    """The canonical name, when this is a second name of one tensor."""
    is_value: bool = False
    """Whether the bytes are the JSON text of a per-rank value."""


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """A rank's tensors, as it is sent to the others."""

    top: tuple[str, ...]
    """Keys of the outermost mapping of the state."""
    meshes: tuple[MeshRecord, ...]
    layouts: tuple[LayoutRecord, ...]
    tensors: dict[str, TensorRecord]


def encode_table(top: Iterable[str], described: Iterable[Described]) -> bytes:
    """The table of one rank, canonical: equal for ranks that hold the same kind of state."""
    encoder = LayoutEncoder()
    tensors = {
        d.name: TensorRecord(alias=d.alias_of)
        if d.alias_of is not None
        else encoder.encode(d.dtype, d.layout, value=d.is_value)
        for d in sorted(described, key=lambda d: d.name)
    }
    return encode_canonical(Table(tuple(top), encoder.meshes, encoder.layouts, tensors))


@dataclass(frozen=True, slots=True)
class _Group:
    """Ranks with one and the same table."""

    ranks: tuple[int, ...]
    table: Table
    decoder: LayoutDecoder


def merge_tables(
    tables: Sequence[bytes], table_of: Sequence[int], per_rank_shapes: Sequence[dict[str, Ints]]
) -> list[GlobalTensor]:
    """What all ranks together hold, sorted by name.

    ``tables`` are the distinct tables, ``table_of`` the number of the table of each rank, and ``per_rank_shapes`` what each
    rank has under its per-rank names. Raises `TableMismatch` when what they say does not fit together.
    """
    groups = _group(tables, table_of)
    _check_top(groups)
    listed: dict[str, list[tuple[_Group, TensorRecord]]] = {}
    for group in groups:
        for name, record in group.table.tensors.items():
            listed.setdefault(name, []).append((group, record))
    merger = _Merger(per_rank_shapes)
    return [merger.merge(name, listed[name]) for name in sorted(listed)]


def _group(tables: Sequence[bytes], table_of: Sequence[int]) -> list[_Group]:
    ranks: list[list[int]] = [[] for _ in tables]
    for rank, number in enumerate(table_of):
        ranks[number].append(rank)
    groups = []
    for data, members in zip(tables, ranks, strict=True):
        table = msgspec.json.decode(data, type=Table)
        decoder = LayoutDecoder(table.meshes, table.layouts, len(table_of))
        groups.append(_Group(tuple(members), table, decoder))
    return groups


def _check_top(groups: list[_Group]) -> None:
    first = groups[0]
    for group in groups[1:]:
        differing = sorted(set(first.table.top) ^ set(group.table.top))
        if differing:
            raise TableMismatch(
                f"ranks were given states with different keys: {differing} are not on both rank {first.ranks[0]} and "
                f"rank {group.ranks[0]}. Give every rank the same top-level keys (an empty mapping is fine)",
                keys=differing,
                ranks=[first.ranks[0], group.ranks[0]],
            )


class _Merger:
    """Merges names one by one; what depends only on the ranks that list a name is worked out once per set of ranks."""

    def __init__(self, per_rank_shapes: Sequence[dict[str, Ints]]) -> None:
        self._per_rank_shapes = per_rank_shapes
        self._listing: dict[tuple[int, ...], Mesh] = {}
        self._complete: set[tuple[Mesh | FlatLayout | BoxLayout, Mesh]] = set()
        self._known: dict[Spread, Spread] = {}

    def merge(self, name: str, entries: list[tuple[_Group, TensorRecord]]) -> GlobalTensor:
        first = entries[0][1]
        for group, record in entries[1:]:
            _check_same(name, entries[0], (group, record))
        if first.alias is not None:
            return GlobalTensor(name, "", None, alias_of=first.alias)
        layouts = [group.decoder.decode(name, record) for group, record in entries]
        if isinstance(layouts[0], PerRankShapes):
            shapes = tuple(shapes.get(name) for shapes in self._per_rank_shapes)
            per_rank = PerRankShapes(shapes[:1] if len(set(shapes)) == 1 else shapes)
            return GlobalTensor(name, first.dtype, per_rank, is_value=first.value)
        listing = self._ranks_listing([group for group, _ in entries])
        try:
            layout = _unite(layouts, listing)
            check_cover(f"tensor {name!r}", layout)
        except (_CannotUnite, InvalidManifest) as problem:
            ranks = _some(listing.ranks)
            raise TableMismatch(f"tensor {name!r} as ranks {ranks} describe it: {problem}", name=name) from None
        holders = layout.mesh if isinstance(layout, MeshLayout) else layout
        if (holders, listing) not in self._complete:
            if layout.ranks != frozenset(listing.ranks):
                _refuse_ranks(name, layout.ranks, frozenset(listing.ranks))
            self._complete.add((holders, listing))
        # equal layouts become one object, so that what is worked out for one is worked out once
        return GlobalTensor(name, first.dtype, self._known.setdefault(layout, layout))

    def _ranks_listing(self, groups: list[_Group]) -> Mesh:
        key = tuple(id(group) for group in groups)
        if key not in self._listing:
            ranks = tuple(sorted(rank for group in groups for rank in group.ranks))
            self._listing[key] = Mesh(ranks, (len(ranks),))
        return self._listing[key]


def _check_same(name: str, a: tuple[_Group, TensorRecord], b: tuple[_Group, TensorRecord]) -> None:
    (group, record), (other_group, other) = a, b
    kind = (record.dtype, record.alias, record.value, record.shape)
    if kind != (other.dtype, other.alias, other.value, other.shape):
        raise TableMismatch(
            f"tensor {name!r} is {_say(record)} on rank {group.ranks[0]} but {_say(other)} on rank {other_group.ranks[0]}. "
            "One name has to be the same tensor on all ranks; a tensor that differs by rank goes into PerRank(...)",
            name=name,
            ranks=[group.ranks[0], other_group.ranks[0]],
        )


class _CannotUnite(Exception):
    pass


def _unite(layouts: Sequence[GlobalLayout | Layout], listing: Mesh) -> Spread:
    replicated = _all(layouts, Replicated)
    if replicated:
        return MeshLayout(replicated[0].shape, listing, (Replicate(),))
    flat = _all(layouts, FlatLayout)
    if flat:
        ranges = sorted({item for layout in flat for item in layout.ranges}, key=lambda r: (r[1], r[2], r[0]))
        return FlatLayout(flat[0].shape, tuple(ranges))
    boxed = _all(layouts, BoxLayout)
    if boxed:
        boxes = sorted({item for layout in boxed for item in layout.boxes}, key=lambda box: (box[1], box[2]))
        return BoxLayout(boxed[0].shape, tuple(boxes))
    meshed = _all(layouts, MeshLayout)
    if meshed:
        return _stack(meshed)
    raise _CannotUnite("it is sharded on some ranks and plain on others")


def _all(layouts: Sequence[object], kind: type[L]) -> list[L]:
    found = [layout for layout in layouts if isinstance(layout, kind)]
    return found if len(found) == len(layouts) else []


def _stack(layouts: list[MeshLayout]) -> MeshLayout:
    """One layout for a tensor that lives on several submeshes: they are replicas of each other."""
    meshes = list(dict.fromkeys(layout.mesh for layout in layouts))
    first = layouts[0]
    if len(meshes) == 1 and all(layout.placements == first.placements for layout in layouts):
        return first
    meshes.sort(key=lambda mesh: mesh.ranks)
    together = tuple(rank for mesh in meshes for rank in mesh.ranks)
    alike = all(layout.placements == first.placements and layout.mesh.shape == first.mesh.shape for layout in layouts)
    if not alike or len(set(together)) != len(together):
        raise _CannotUnite("its meshes differ between ranks in more than their ranks (shape, placements, or they share ranks)")
    return MeshLayout(first.shape, Mesh(together, (len(meshes), *first.mesh.shape)), (Replicate(), *first.placements))


def _refuse_ranks(name: str, mesh: frozenset[int], listing: frozenset[int]) -> None:
    absent, extra = sorted(mesh - listing), sorted(listing - mesh)
    problem = f"ranks {_some(absent)} did not list it" if absent else f"ranks {_some(extra)} list it too"
    raise TableMismatch(
        f"tensor {name!r} is sharded over ranks {_some(sorted(mesh))}, but {problem}. "
        "Just the ranks that hold a part of it have to pass it",
        name=name,
        ranks=absent or extra,
    )


def _say(record: TensorRecord) -> str:
    if record.alias is not None:
        return f"tied to {record.alias!r}"
    return f"per rank {record.dtype}" if record.per_rank is not None else f"{record.dtype}{list(record.shape)}"


def _some(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"[{', '.join(map(str, ranks[:8]))}, ... {len(ranks)} in all]"


def per_rank_shapes(described: Iterable[Described]) -> dict[str, Ints]:
    """What a rank has under its per-rank names."""
    return {d.name: d.layout.shape for d in described if isinstance(d.layout, PerRankLayout)}
