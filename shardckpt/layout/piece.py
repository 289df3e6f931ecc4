# SPDX-License-Identifier: Apache-2.0
"""`Piece`: which elements of a global tensor some memory holds, and in what order.

Every layout of the engine, sharded by a mesh, flat or boxed, comes down to this one form, so the rules that move data
between layouts are written once (`intersect`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from .box import Ints, intersect_boxes, row_major_strides, window_boxes

Interval = tuple[int, int]
"""Global indices ``[start, stop)`` along one dimension."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A box of the global tensor that lies regularly strided in a piece's memory."""

    offsets: Ints
    """First global index per dimension."""
    sizes: Ints
    """Extent per dimension, in elements."""
    local: Ints
    """First index per dimension in the piece's own array (before its window is cut out)."""
    position: int
    """Where the first element lies in the piece's memory, in elements."""


@dataclass(frozen=True)
class Piece:
    """A window of the ravel of a grid of global indices.

    The grid holds, per dimension, an ordered list of intervals; the array it stands for is their product, in that order. A
    plain shard has one interval per dimension; strided shards have several. ``start`` and ``stop`` cut out a range of the
    row-major ravel of that array: flat (ZeRO) slices, and the slices that replicas share out among each other.
    """

    grid: tuple[tuple[Interval, ...], ...]
    """Per dimension, disjoint intervals in memory order."""
    start: int
    """First element of the ravel that the piece holds."""
    stop: int
    """One past the last."""

    @classmethod
    def whole(cls, grid: tuple[tuple[Interval, ...], ...]) -> Piece:
        """The piece that holds all of ``grid``."""
        return cls(grid, 0, prod(sum(stop - start for start, stop in dim) for dim in grid))

    @classmethod
    def box(cls, offsets: Ints, sizes: Ints) -> Piece:
        """The piece that holds one box."""
        return cls.whole(tuple(((o, o + s),) for o, s in zip(offsets, sizes, strict=True)))

    @classmethod
    def flat(cls, shape: Ints, start: int, stop: int) -> Piece:
        """Elements ``[start, stop)`` of the raveled tensor of ``shape``."""
        return cls(tuple(((0, size),) for size in shape), start, stop)

    @cached_property
    def grid_shape(self) -> Ints:
        """Shape of the array that the grid stands for."""
        return tuple(sum(stop - start for start, stop in dim) for dim in self.grid)

    @cached_property
    def grid_strides(self) -> Ints:
        """Strides of that array in elements; also those of each fragment in the piece's memory."""
        return row_major_strides(self.grid_shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def is_window(self) -> bool:
        """Whether only a part of the grid is held, as a 1-d array."""
        return self.numel != prod(self.grid_shape)

    @cached_property
    def shape(self) -> Ints:
        """Shape of the piece as an array: the grid's, or ``(numel,)`` for a window."""
        return (self.numel,) if self.is_window else self.grid_shape

    def window(self, start: int, stop: int) -> Piece:
        """The part ``[start, stop)`` of this piece's own memory, in elements."""
        return Piece(self.grid, self.start + start, self.start + stop)

    @cached_property
    def fragments(self) -> tuple[Fragment, ...]:
        """The boxes that make up the piece, in memory order of their first elements."""
        return tuple(self._cut())

    def _cut(self) -> Iterator[Fragment]:
        strides = self.grid_strides
        dims = [_placed(dim) for dim in self.grid]
        for offsets, sizes in window_boxes(self.grid_shape, self.start, self.stop):
            cuts = [_overlaps(dim, o, s) for dim, o, s in zip(dims, offsets, sizes, strict=True)]
            for cell in product(*cuts):
                local = tuple(at for at, _, _ in cell)
                position = sum(a * b for a, b in zip(local, strides, strict=True)) - self.start
                yield Fragment(tuple(g for _, g, _ in cell), tuple(n for _, _, n in cell), local, position)


@dataclass(frozen=True, slots=True)
class Copy:
    """One box of elements that two pieces have in common, as strided views of both memories."""

    sizes: Ints
    """Extent per dimension, in elements."""
    source_position: int
    """First element in the source piece's memory."""
    target_position: int
    """First element in the target piece's memory."""
    target_local: Ints
    """First index per dimension in the target piece's grid array."""


def intersect(source: Piece, target: Piece) -> list[Copy]:
    """All elements that both pieces hold, as strided copies from ``source`` to ``target``.

    In the source memory a copy has the strides ``source.grid_strides``, in the target's ``target.grid_strides``.
    """
    copies = []
    for a in source.fragments:
        for b in target.fragments:
            common = intersect_boxes(a.offsets, a.sizes, b.offsets, b.sizes)
            if common is None:
                continue
            offsets, sizes = common
            copies.append(
                Copy(
                    sizes,
                    a.position + _distance(offsets, a.offsets, source.grid_strides),
                    b.position + _distance(offsets, b.offsets, target.grid_strides),
                    tuple(at + o - p for at, o, p in zip(b.local, offsets, b.offsets, strict=True)),
                )
            )
    return copies


def _distance(offsets: Ints, origin: Ints, strides: Ints) -> int:
    return sum((o - p) * s for o, p, s in zip(offsets, origin, strides, strict=True))


def _placed(dim: tuple[Interval, ...]) -> list[tuple[int, int, int]]:
    """(first local index, first global index, length) of each interval of one dimension."""
    placed, at = [], 0
    for start, stop in dim:
        placed.append((at, start, stop - start))
        at += stop - start
    return placed


def _overlaps(dim: list[tuple[int, int, int]], offset: int, size: int) -> list[tuple[int, int, int]]:
    """The parts of one dimension's intervals that local indices ``[offset, offset + size)`` cover."""
    found = []
    for at, begin, length in dim:
        low, high = max(at, offset), min(at + length, offset + size)
        if low < high:
            found.append((low, begin + low - at, high - low))
    return found
