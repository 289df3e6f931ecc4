# SPDX-License-Identifier: Apache-2.0
"""Layouts that are a list of pieces: flat ranges (ZeRO), boxes (ShardedTensor), and one tensor per rank.

Their size grows with the number of pieces, as the data does; a mesh is preferred wherever one describes the same.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from .box import Ints, intersect_boxes, row_major_strides
from .mesh import Cell, MeshLayout
from .piece import Piece


@dataclass(frozen=True, slots=True)
class Replicated:
    """A plain tensor, equal on each rank that lists it. Planning resolves it to a mesh of just those ranks."""

    shape: Ints
    """Global shape, which is also the local one."""

    def piece(self, rank: int) -> Piece:
        """All of it."""
        return Piece.box((0,) * len(self.shape), self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """A tensor cut into ranges of its ravel, as flat parameter buffers are. Padding is not part of it."""

    shape: Ints
    """Global shape."""
    ranges: tuple[tuple[int, int, int], ...]
    """(rank, start, stop), sorted by start; disjoint; together they cover the ravel."""

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that hold a range."""
        return frozenset(rank for rank, _, _ in self.ranges)

    @cached_property
    def _by_rank(self) -> dict[int, tuple[int, int]]:
        return {rank: (start, stop) for rank, start, stop in self.ranges}

    @cached_property
    def _starts(self) -> list[int]:
        return [start for _, start, _ in self.ranges]

    def piece(self, rank: int) -> Piece | None:
        """What ``rank`` holds; None when it holds nothing."""
        held = self._by_rank.get(rank)
        return None if held is None else Piece.flat(self.shape, *held)

    def cells(self, offsets: Ints, sizes: Ints) -> Iterator[Cell]:
        """The ranges that can share elements with a box: those between its first and its last element."""
        strides = row_major_strides(self.shape)
        first = sum(o * s for o, s in zip(offsets, strides, strict=True))
        last = sum((o + n - 1) * s for o, n, s in zip(offsets, sizes, strides, strict=True))
        low = max(bisect_right(self._starts, first) - 1, 0)
        for rank, start, stop in self.ranges[low : bisect_left(self._starts, last + 1)]:
            if start < stop:
                yield Cell(Piece.flat(self.shape, start, stop), (rank,))


@dataclass(frozen=True)
class BoxLayout:
    """A tensor cut into boxes, at most one per rank."""

    shape: Ints
    """Global shape."""
    boxes: tuple[tuple[int, Ints, Ints], ...]
    """(rank, offsets, sizes), sorted by offsets; disjoint; together they cover the tensor."""

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that hold a box."""
        return frozenset(rank for rank, _, _ in self.boxes)

    @cached_property
    def _by_rank(self) -> dict[int, tuple[Ints, Ints]]:
        return {rank: (offsets, sizes) for rank, offsets, sizes in self.boxes}

    @cached_property
    def _starts(self) -> list[int]:
        return [offsets[0] if offsets else 0 for _, offsets, _ in self.boxes]

    @cached_property
    def _longest(self) -> int:
        return max((sizes[0] for _, _, sizes in self.boxes if sizes), default=1)

    def piece(self, rank: int) -> Piece | None:
        """What ``rank`` holds; None when it holds nothing."""
        held = self._by_rank.get(rank)
        return None if held is None else Piece.box(*held)

    def cells(self, offsets: Ints, sizes: Ints) -> Iterator[Cell]:
        """The boxes that share elements with a box, looked for only where the first dimension allows it."""
        start, stop = (offsets[0], offsets[0] + sizes[0]) if offsets else (0, 1)
        low = bisect_right(self._starts, start - self._longest)
        for rank, at, extent in self.boxes[low : bisect_left(self._starts, stop)]:
            if intersect_boxes(at, extent, offsets, sizes) is not None:
                yield Cell(Piece.box(at, extent), (rank,))


def cells_over(layout: MeshLayout | FlatLayout | BoxLayout, wanted: Piece) -> Iterable[Cell]:
    """The cells of ``layout`` that may share elements with ``wanted``, each once, in a fixed order."""
    return dict.fromkeys(cell for part in wanted.fragments for cell in layout.cells(part.offsets, part.sizes))


@dataclass(frozen=True, slots=True)
class PerRankLayout:
    """A name under which each rank has a tensor of its own, of its own shape."""

    shape: Ints
    """This rank's shape."""

    def piece(self, rank: int) -> Piece:
        """All of this rank's tensor."""
        return Piece.box((0,) * len(self.shape), self.shape)


@dataclass(frozen=True)
class PerRankShapes:
    """What all ranks together have under a per-rank name."""

    shapes: tuple[Ints | None, ...]
    """Shape by rank, None where the rank lists no such name; a single shape stands for all ranks."""

    def shape_of(self, rank: int) -> Ints | None:
        """Shape of the tensor of ``rank``."""
        return self.shapes[0] if len(self.shapes) == 1 else self.shapes[rank]

    def piece(self, rank: int) -> Piece | None:
        """All of the tensor of ``rank``; None when it has none."""
        shape = self.shape_of(rank)
        return None if shape is None else Piece.box((0,) * len(shape), shape)
