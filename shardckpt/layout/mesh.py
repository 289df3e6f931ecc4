# SPDX-License-Identifier: Apache-2.0
"""Layouts that a device mesh and placements describe: the arithmetic of DTensor, without torch.

``Shard`` follows ``torch.chunk``: ceil-sized chunks from the left, so the last ones can be short or empty. Placements apply
from the left mesh dimension to the right one, and several may shard one tensor dimension. ``StridedShard`` cuts what is
there into ``split_factor`` chunks first, shards each of them, and holds the same-numbered shards of all, one after the
other; that is what FSDP2 makes of a parameter that tensor parallelism has sharded on the same dimension already
(``torch/distributed/tensor/placement_types.py``, ``_StridedShard``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from .box import Ints, row_major_strides
from .piece import Interval, Piece


@dataclass(frozen=True, slots=True)
class Replicate:
    """The whole of what the other placements leave, on each rank along this mesh dimension."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One chunk of tensor dimension ``dim`` on each rank along this mesh dimension."""

    dim: int
    """Tensor dimension, not negative."""


@dataclass(frozen=True, slots=True)
class StridedShard:
    """The same-numbered chunks of ``split_factor`` parts of tensor dimension ``dim``."""

    dim: int
    """Tensor dimension, not negative."""
    split_factor: int
    """Number of parts that are sharded separately."""


Placement = Replicate | Shard | StridedShard
Link = tuple[int, int]
"""One sharding of a tensor dimension: (ranks along the mesh dimension, split factor); plain shards have factor 1."""
Chain = tuple[Link, ...]
"""All shardings of one tensor dimension, left to right."""


@dataclass(frozen=True)
class Mesh:
    """An array of distinct ranks."""

    ranks: Ints
    """Global ranks, row-major."""
    shape: Ints
    """Extent per mesh dimension."""

    @cached_property
    def index(self) -> dict[int, int]:
        """Row-major position of each rank."""
        return {rank: at for at, rank in enumerate(self.ranks)}

    def coordinate(self, rank: int) -> Ints | None:
        """Where ``rank`` stands in the mesh, or None when it does not."""
        known = self._coordinates.get(rank)
        if known is None and (at := self.index.get(rank)) is not None:
            strides = row_major_strides(self.shape)
            known = tuple(at // stride % size for stride, size in zip(strides, self.shape, strict=True))
            self._coordinates[rank] = known
        return known

    @cached_property
    def _coordinates(self) -> dict[int, Ints]:
        # each rank asks for its own, once per tensor
        return {}

    def select(self, fixed: tuple[int | None, ...]) -> Ints:
        """Ranks at the coordinates that match ``fixed``; None stands for all along that dimension."""
        return _select(self, fixed)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.ranks, self.shape))


@lru_cache(maxsize=65536)
def _select(mesh: Mesh, fixed: tuple[int | None, ...]) -> Ints:
    axes = [range(size) if at is None else (at,) for at, size in zip(fixed, mesh.shape, strict=True)]
    strides = row_major_strides(mesh.shape)
    return tuple(mesh.ranks[sum(a * s for a, s in zip(at, strides, strict=True))] for at in product(*axes))


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a tensor that is held, whole and equal, by each of some ranks."""

    piece: Piece
    """What is held."""
    ranks: Ints
    """The replicas, in the order in which they share out writing."""


@dataclass(frozen=True)
class MeshLayout:
    """A tensor that is spread over a mesh by one placement per mesh dimension."""

    shape: Ints
    """Global shape."""
    mesh: Mesh
    """The ranks that hold it."""
    placements: tuple[Placement, ...]
    """One per mesh dimension."""

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that hold a piece, empty ones included."""
        return frozenset(self.mesh.ranks)

    @cached_property
    def chains(self) -> tuple[tuple[Chain, Ints], ...]:
        """Per tensor dimension: its shardings, and the mesh dimensions they belong to."""
        links: list[list[Link]] = [[] for _ in self.shape]
        axes: list[list[int]] = [[] for _ in self.shape]
        for axis, (size, placement) in enumerate(zip(self.mesh.shape, self.placements, strict=True)):
            if isinstance(placement, Replicate):
                continue
            factor = placement.split_factor if isinstance(placement, StridedShard) else 1
            links[placement.dim].append((size, factor))
            axes[placement.dim].append(axis)
        return tuple((tuple(link), tuple(axis)) for link, axis in zip(links, axes, strict=True))

    def piece(self, rank: int) -> Piece | None:
        """What ``rank`` holds; None when it is not in the mesh."""
        at = self.mesh.coordinate(rank)
        if at is None:
            return None
        return self._piece_at(at)

    def _piece_at(self, at: Ints) -> Piece:
        # tensors of one shape share their layout, and pieces remember their fragments
        known = self._pieces.get(at)
        if known is None:
            known = self._pieces[at] = Piece.whole(
                tuple(
                    shard_intervals(size, chain, tuple(at[axis] for axis in axes))
                    for size, (chain, axes) in zip(self.shape, self.chains, strict=True)
                )
            )
        return known

    @cached_property
    def _pieces(self) -> dict[Ints, Piece]:
        return {}

    def cells(self, offsets: Ints, sizes: Ints) -> Iterator[Cell]:
        """The cells that share elements with a box, found by arithmetic, not by looking at all of them."""
        per_dim = [
            list(shards_over(size, chain, offset, offset + extent))
            for size, (chain, _), offset, extent in zip(self.shape, self.chains, offsets, sizes, strict=True)
        ]
        for choice in product(*per_dim):
            fixed: list[int | None] = [0 if not isinstance(placement, Replicate) else None for placement in self.placements]
            for (_, axes), at in zip(self.chains, choice, strict=True):
                for axis, index in zip(axes, at, strict=True):
                    fixed[axis] = index
            piece = self._piece_at(tuple(index or 0 for index in fixed))
            yield Cell(piece, self.mesh.select(tuple(fixed)))

    @cached_property
    def replicas(self) -> int:
        """How many ranks hold each cell."""
        return prod(size for size, p in zip(self.mesh.shape, self.placements, strict=True) if isinstance(p, Replicate))

    def replica_index(self, rank: int) -> int:
        """Position of ``rank`` among the replicas of its cell."""
        at = self.mesh.coordinate(rank) or ()
        index = 0
        for axis, (size, placement) in enumerate(zip(self.mesh.shape, self.placements, strict=True)):
            if isinstance(placement, Replicate):
                index = index * size + at[axis]
        return index

    @cached_property
    def numel_by_position(self) -> npt.NDArray[np.int64]:
        """Elements that each rank holds, in the order of ``mesh.ranks``, without a loop over ranks."""
        coordinates = np.indices(self.mesh.shape, dtype=np.int64).reshape(len(self.mesh.shape), -1)
        numel = np.ones(len(self.mesh.ranks), dtype=np.int64)
        for size, (chain, axes) in zip(self.shape, self.chains, strict=True):
            numel *= shard_lengths(size, chain, coordinates[list(axes)])
        return numel

    @cached_property
    def replica_by_position(self) -> npt.NDArray[np.int64]:
        """`replica_index` of each rank, in the order of ``mesh.ranks``."""
        coordinates = np.indices(self.mesh.shape, dtype=np.int64).reshape(len(self.mesh.shape), -1)
        index = np.zeros(len(self.mesh.ranks), dtype=np.int64)
        for axis, (size, placement) in enumerate(zip(self.mesh.shape, self.placements, strict=True)):
            if isinstance(placement, Replicate):
                index = index * size + coordinates[axis]
        return index


def _chunk(interval: Interval, parts: int, index: int) -> Interval:
    start, stop = interval
    step = -(-(stop - start) // parts)
    return min(start + index * step, stop), min(start + (index + 1) * step, stop)


def _slice_intervals(intervals: list[Interval], start: int, stop: int) -> list[Interval]:
    """Elements ``[start, stop)`` of the concatenation of ``intervals``."""
    cut, at = [], 0
    for low, high in intervals:
        begin, end = max(start - at, 0), min(stop - at, high - low)
        if begin < end:
            cut.append((low + begin, low + end))
        at += high - low
    return cut


@lru_cache(maxsize=1 << 18)
def shard_intervals(size: int, chain: Chain, at: Ints) -> tuple[Interval, ...]:
    """The global indices along a dimension of ``size`` that the shard at coordinates ``at`` of ``chain`` holds."""
    intervals = [(0, size)] if size else []
    for (ranks, factor), index in zip(chain, at, strict=True):
        length = sum(stop - start for start, stop in intervals)
        parts = [_chunk((0, length), factor, part) for part in range(factor)]
        picked: list[Interval] = []
        for part in parts:
            for low, high in _slice_intervals(intervals, *_chunk(part, ranks, index)):
                if picked and picked[-1][1] == low:
                    picked[-1] = (picked[-1][0], high)
                else:
                    picked.append((low, high))
        intervals = picked
    return tuple(intervals) or ((0, 0),)


def shard_lengths(size: int, chain: Chain, coordinates: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Lengths of the shards at many coordinates at once; ``coordinates`` has one row per link of ``chain``."""
    length = np.full(coordinates.shape[1:], size, dtype=np.int64)
    for (ranks, factor), index in zip(chain, coordinates, strict=True):
        step = -(-length // factor)
        held = np.zeros_like(length)
        for part in range(factor):
            extent = np.clip(length - part * step, 0, step)
            shard = -(-extent // ranks)
            held += np.clip(extent - index * shard, 0, shard)
        length = held
    return length


def shards_over(size: int, chain: Chain, start: int, stop: int) -> Iterator[Ints]:
    """Coordinates of the shards of one dimension that hold an index in ``[start, stop)``."""
    if start >= stop:
        return
    if all(factor == 1 for _, factor in chain):
        yield from _nested_over((0, size), chain, start, stop)
        return
    found = set()
    for low, _, at in _strided_table(size, chain)[_first_after(size, chain, start) :]:
        if low >= stop:
            break
        found.add(at)
    yield from sorted(found)


def _nested_over(held: Interval, chain: Chain, start: int, stop: int) -> Iterator[Ints]:
    start, stop = max(start, held[0]), min(stop, held[1])
    if start >= stop:
        return
    if not chain:
        yield ()
        return
    ranks = chain[0][0]
    step = -(-(held[1] - held[0]) // ranks)
    for index in range((start - held[0]) // step, (stop - 1 - held[0]) // step + 1):
        for rest in _nested_over(_chunk(held, ranks, index), chain[1:], start, stop):
            yield (index, *rest)


@lru_cache(maxsize=4096)
def _strided_table(size: int, chain: Chain) -> list[tuple[int, int, Ints]]:
    """All intervals of all shards of one dimension, by start, as (start, stop, coordinates)."""
    table = [
        (low, high, at)
        for at in product(*(range(ranks) for ranks, _ in chain))
        for low, high in shard_intervals(size, chain, at)
        if low < high
    ]
    return sorted(table)


def _first_after(size: int, chain: Chain, start: int) -> int:
    """Position in the table of the first interval that ends after ``start``."""
    table = _strided_table(size, chain)
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) // 2
        if table[middle][1] <= start:
            low = middle + 1
        else:
            high = middle
    return low
