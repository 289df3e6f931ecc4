# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, name by name, and how it was spread over ranks, in few words and numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

import numpy as np

from shardckpt.errors import MissingNames
from shardckpt.layout import BoxLayout, FlatLayout, Ints, MeshLayout, PerRankShapes, Placement, Replicate, Shard, StridedShard
from shardckpt.plan import Plan, PlannedTensor

from .stored import StoredCheckpoint

_MOST_RUNS = 8

Kind = Literal["tensor", "value", "per-rank tensor", "per-rank value"]


@dataclass(frozen=True, slots=True)
class Spread:
    """How a tensor was spread over the ranks that saved it."""

    placement: str
    """Placements as torch's ``str`` writes them (``S(0), R``), ``flat``, ``boxes`` or ``per rank``."""
    mesh: Ints | None
    """Extents of the device mesh, if there is one."""
    ranks: str
    """The ranks that held it, such as ``0-3``."""
    writers: str
    """The ranks in whose files it lies."""

    def __str__(self) -> str:
        mesh = f" on mesh {'x'.join(map(str, self.mesh))}" if self.mesh else ""
        return f"{self.placement}{mesh}, ranks {self.ranks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One name of a checkpoint."""

    name: str
    """Full name in the state tree."""
    kind: Kind
    """What stands there."""
    dtype: str | None = None
    """Name of the element type; None for values."""
    shape: Ints | None = None
    """Global shape; None for values, and for per-rank tensors that have different shapes."""
    bytes: int = 0
    """Size of its data, of all ranks together; 0 for aliases, and for values that stand in the manifest."""
    layout: Spread | None = None
    """How it was spread; None for values that stand in the manifest."""
    alias_of: str | None = None
    """The tensor that this is a second name of."""


def list_items(stored: StoredCheckpoint, patterns: Sequence[str] | None = None) -> list[Item]:
    """Everything that a checkpoint holds, or the names that match one of the shell ``patterns``, sorted by name."""
    plan = stored.checkpoint.plan
    spreads: dict[object, Spread] = {}
    items = [_item(plan, tensor, spreads) for tensor in plan.tensors if matches(tensor.name, patterns)]
    for name, canonical in plan.aliases.items():
        if matches(name, patterns):
            items.append(_item(plan, plan.by_name[canonical], spreads, alias=name))
    items += [Item(name=name, kind="value") for name in stored.checkpoint.manifest.objects if matches(name, patterns)]
    return sorted(items, key=lambda item: item.name)


def matches(name: str, patterns: Sequence[str] | None) -> bool:
    """Whether ``name`` matches one of the shell ``patterns``; None stands for all names."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


def require_matches(patterns: Sequence[str] | None, *checkpoints: StoredCheckpoint) -> None:
    """Raise `MissingNames` for shell patterns that match no name in any of these: nothing at all would be looked at."""
    names: set[str] = set()
    for stored in checkpoints if patterns else ():
        plan, manifest = stored.checkpoint.plan, stored.checkpoint.manifest
        names |= {*plan.by_name, *plan.aliases, *manifest.objects}
    idle = [pattern for pattern in patterns or () if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        places = " or ".join(dict.fromkeys(stored.url for stored in checkpoints))
        raise MissingNames(
            f"{idle}: no name in {places} matches; shardckpt show {checkpoints[0].url} lists them", missing=idle, unexpected=[]
        )


def _item(plan: Plan, tensor: PlannedTensor, spreads: dict[object, Spread], alias: str | None = None) -> Item:
    layout = tensor.layout
    # what depends only on the layout is worked out once per layout
    spread = spreads.get((layout, tensor.writers)) or describe_spread(tensor, plan.world_size)
    spreads[layout, tensor.writers] = spread
    kind: Kind = "tensor"
    shape: Ints | None = tensor.shape
    nbytes = prod(tensor.shape) * tensor.itemsize
    if isinstance(layout, PerRankShapes):
        kind = "per-rank value" if tensor.is_value else "per-rank tensor"
        by_rank = [s for rank in range(plan.world_size) if (s := layout.shape_of(rank)) is not None]
        shape = None if tensor.is_value or len(set(by_rank)) > 1 else shape
        nbytes = sum(map(prod, by_rank)) * tensor.itemsize
    return Item(
        name=alias or tensor.name,
        kind=kind,
        dtype=None if tensor.is_value else tensor.dtype,
        shape=shape,
        bytes=0 if alias else nbytes,
        layout=spread,
        alias_of=tensor.name if alias else None,
    )


def describe_spread(tensor: PlannedTensor, world_size: int) -> Spread:
    """How ``tensor`` was spread over ``world_size`` ranks. The work grows with the ranks."""
    layout = tensor.layout
    if isinstance(layout, MeshLayout):
        ranks = np.array(layout.mesh.ranks)
        placement = ", ".join(map(placement_text, layout.placements))
        return Spread(placement, layout.mesh.shape, ranks_text(ranks), ranks_text(ranks[_writes(layout, tensor.writers)]))
    if isinstance(layout, PerRankShapes):
        text = ranks_text([rank for rank in range(world_size) if layout.shape_of(rank) is not None])
        return Spread("per rank", None, text, text)
    held: Iterable[int] = [rank for rank in layout.ranks if (piece := layout.piece(rank)) is not None and piece.numel]
    kinds = {FlatLayout: "flat", BoxLayout: "boxes"}
    return Spread(kinds[type(layout)], None, ranks_text(layout.ranks), ranks_text(held))


def _writes(layout: MeshLayout, writers: tuple[int, int]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """By position in the mesh: whether that rank writes any element."""
    first, count = writers
    index = (layout.replica_by_position - first) % layout.replicas
    numel = layout.numel_by_position
    writes: np.ndarray[tuple[int], np.dtype[np.bool_]] = (index < count) & (index * -(-numel // count) < numel)
    return writes


def placement_text(placement: Placement) -> str:
    """A placement as torch's ``str`` writes it."""
    match placement:
        case Replicate():
            return "R"
        case Shard(dim):
            return f"S({dim})"
        case StridedShard(dim, factor):
            return f"_S({dim}, {factor})"


def ranks_text(ranks: Iterable[int]) -> str:
    """Ranks as runs, such as ``0-3,8``; where there are many runs, the first ones and the number of all ranks."""
    runs: list[list[int]] = []
    every = sorted(int(rank) for rank in ranks)
    for rank in every:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:_MOST_RUNS])
    if len(runs) > _MOST_RUNS:
        return f"{text},... ({len(every)} ranks)"
    return text or "none"
