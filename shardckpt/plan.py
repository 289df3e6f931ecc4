# SPDX-License-Identifier: Apache-2.0
"""The plan of a checkpoint: which rank writes which elements of which tensor, and where they lie in its file.

Every rank computes the same plan from the same tables, and a loader computes it again from the manifest: two small integers
per tensor (`PlannedTensor.writers`) say how replicas share out the writing, and everything else is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from .layout import (
    ITEMSIZE,
    Cell,
    GlobalLayout,
    Ints,
    Mesh,
    MeshLayout,
    PerRankShapes,
    Piece,
    Replicate,
    cells_over,
    intersect,
)
from .tables import GlobalTensor

SMALL = 1 << 20
"""Bytes; a replicated piece below this is written whole by one replica, a larger one is cut among all of them."""
MIN_SLICE = 64 << 10
"""Bytes; no slice of a large replicated piece is smaller."""
MIN_BLOCK, MAX_BLOCK = 64 << 10, 16 << 20
"""Bytes; bounds of the digest block size."""
MAX_DIGESTS = 1 << 17
"""Digests per checkpoint that the block size aims at (8 bytes each)."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A stored tensor and who writes it."""

    name: str
    """Full name in the state tree."""
    dtype: str
    """Name of the element type."""
    layout: GlobalLayout
    """How it was spread over the ranks that saved it."""
    writers: tuple[int, int] = (0, 1)
    """(first, count): replicas first, first + 1, ... (modulo their number) each write one of ``count`` equal slices."""
    is_value: bool = False
    """Whether the bytes are the JSON text of a per-rank value."""

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return ITEMSIZE[self.dtype]

    @property
    def shape(self) -> Ints:
        """Global shape; of a per-rank tensor that of the first rank that has one."""
        if isinstance(self.layout, PerRankShapes):
            return next((shape for shape in self.layout.shapes if shape is not None), ())
        return self.layout.shape

    @property
    def is_replicated(self) -> bool:
        """Whether several ranks hold each element."""
        return isinstance(self.layout, MeshLayout) and self.layout.replicas > 1

    def local_window(self, rank: int) -> tuple[int, int]:
        """The elements ``[start, stop)`` of its own piece that ``rank`` writes."""
        return _local_window(self.layout, self.writers, rank)

    def stored(self, rank: int) -> Piece | None:
        """What the file of ``rank`` holds of this tensor; None when nothing."""
        start, stop = self.local_window(rank)
        piece = self.layout.piece(rank) if start < stop else None
        return None if piece is None else piece.window(start, stop)

    def stored_over(self, wanted: Piece) -> Iterator[tuple[int, Piece]]:
        """(rank, piece) for each stored piece that shares elements with ``wanted``."""
        assert not isinstance(self.layout, PerRankShapes)
        first, count = self.writers
        for cell in cells_over(self.layout, wanted):
            if count == 1:
                yield cell.ranks[first], cell.piece
            else:
                yield from _slices_over(cell, first, count, wanted)


def _slices_over(cell: Cell, first: int, count: int, wanted: Piece) -> Iterator[tuple[int, Piece]]:
    step = -(-cell.piece.numel // count)
    strides = cell.piece.grid_strides
    needed: set[int] = set()
    for copy in intersect(cell.piece, wanted):
        last = copy.source_position + sum((n - 1) * s for n, s in zip(copy.sizes, strides, strict=True))
        needed.update(range(copy.source_position // step, last // step + 1))
    for index in sorted(needed):
        start, stop = index * step, min((index + 1) * step, cell.piece.numel)
        yield cell.ranks[(first + index) % len(cell.ranks)], cell.piece.window(start, stop)


@lru_cache(maxsize=1 << 16)
def _local_window(layout: GlobalLayout, writers: tuple[int, int], rank: int) -> tuple[int, int]:
    piece = layout.piece(rank)
    if piece is None:
        return 0, 0
    if not isinstance(layout, MeshLayout):
        return 0, piece.numel
    first, count = writers
    index = (layout.replica_index(rank) - first) % layout.replicas
    if index >= count:
        return 0, 0
    step = -(-piece.numel // count)
    return min(index * step, piece.numel), min((index + 1) * step, piece.numel)


@dataclass(frozen=True, slots=True)
class FilePiece:
    """A piece in a rank file."""

    tensor: PlannedTensor
    """What it is a piece of."""
    piece: Piece
    """Which elements."""
    local: tuple[int, int]
    """Which elements ``[start, stop)`` of the rank's own piece."""
    offset: int
    """First byte in the data region of the file."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.piece.numel * self.tensor.itemsize


class Plan:
    """Tensors in file order, and the arithmetic of where their pieces lie."""

    def __init__(
        self,
        world_size: int,
        tensors: Iterable[PlannedTensor],
        aliases: dict[str, str],
        block_size: int | None = None,
    ) -> None:
        self.world_size = world_size
        """Ranks that write."""
        self.tensors = tuple(sorted(tensors, key=lambda t: (-t.itemsize, t.is_replicated, t.name)))
        """In the order in which each rank file has them: item size descending, replicated ones last, then name.

        Item sizes descend so that everything is aligned without holes. Replicated tensors are together because every rank
        reads them: a scalar between two large shards would cost each rank a digest block of its own.
        """
        self.by_name = {tensor.name: tensor for tensor in self.tensors}
        """The same by name."""
        self.aliases = aliases
        """Second names of tensors, each with the canonical one."""
        self.block_size = block_size or choose_block_size(self.total_bytes)
        """Bytes per digest block."""
        self._pieces: dict[int, tuple[FilePiece, ...]] = {}
        self._offsets: dict[int, dict[str, int]] = {}

    def file_pieces(self, rank: int) -> tuple[FilePiece, ...]:
        """All pieces in the file of ``rank``, in file order."""
        known = self._pieces.get(rank)
        if known is None:
            known = self._pieces[rank] = tuple(self.lay_out(rank))
        return known

    def lay_out(self, rank: int) -> Iterator[FilePiece]:
        """The same as `file_pieces`, for one who looks at many ranks once: nothing is kept."""
        offset = 0
        for tensor in self.tensors:
            start, stop = tensor.local_window(rank)
            if start == stop:
                continue
            piece = tensor.layout.piece(rank)
            if piece is not None:
                found = FilePiece(tensor, piece.window(start, stop), (start, stop), offset)
                offset += found.nbytes
                yield found

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return int(self.bytes_by_rank.sum())

    def offsets(self, rank: int) -> dict[str, int]:
        """Where each tensor starts in the data region of the file of ``rank``, in bytes."""
        known = self._offsets.get(rank)
        if known is None:
            known = self._offsets[rank] = {found.tensor.name: found.offset for found in self.lay_out(rank)}
        return known

    @cached_property
    def bytes_by_rank(self) -> npt.NDArray[np.int64]:
        """Size of the data region of each rank's file. Costs one vector operation per distinct layout, not per tensor."""
        total = np.zeros(self.world_size, dtype=np.int64)
        weights: dict[tuple[GlobalLayout, tuple[int, int]], int] = {}
        for tensor in self.tensors:
            key = (tensor.layout, tensor.writers)
            weights[key] = weights.get(key, 0) + tensor.itemsize
        for (layout, writers), itemsize in weights.items():
            if isinstance(layout, MeshLayout):
                total[list(layout.mesh.ranks)] += itemsize * _written_by_position(layout, writers)
            elif isinstance(layout, PerRankShapes) and len(layout.shapes) == 1:
                piece = layout.piece(0)
                total += itemsize * (piece.numel if piece else 0)
            else:
                ranks = range(self.world_size) if isinstance(layout, PerRankShapes) else sorted(layout.ranks)
                for rank in ranks:
                    piece = layout.piece(rank)
                    total[rank] += itemsize * (piece.numel if piece else 0)
        return total


def _written_by_position(layout: MeshLayout, writers: tuple[int, int]) -> npt.NDArray[np.int64]:
    numel = layout.numel_by_position
    first, count = writers
    index = (layout.replica_by_position - first) % layout.replicas
    step = -(-numel // count)
    return np.where(index < count, np.clip(numel - index * step, 0, step), 0)


def choose_block_size(total: int) -> int:
    """Bytes per digest block: fine enough for cheap partial reads, coarse enough for a small manifest."""
    block = MIN_BLOCK
    while block < MAX_BLOCK and total > block * MAX_DIGESTS:
        block *= 2
    return block


# ---- sharing out the writing


def make_plan(world_size: int, tensors: Sequence[GlobalTensor]) -> Plan:
    """Decide who writes what: each element once, and about the same number of bytes on each replica."""
    aliases = {tensor.name: tensor.alias_of for tensor in tensors if tensor.alias_of is not None}
    kept = [t for t in tensors if t.layout is not None]
    dealers: dict[tuple[Mesh, tuple[bool, ...]], _Dealer] = {}
    replicated: list[tuple[_Dealer, GlobalTensor, int]] = []
    planned = []
    for tensor in kept:
        layout = tensor.layout
        if isinstance(layout, MeshLayout) and layout.replicas > 1:
            axes = tuple(isinstance(placement, Replicate) for placement in layout.placements)
            dealer = dealers.setdefault((layout.mesh, axes), _Dealer(layout.replicas))
            nbytes = int(layout.numel_by_position.max()) * ITEMSIZE[tensor.dtype]
            dealer.expect(nbytes)
            replicated.append((dealer, tensor, nbytes))
        elif layout is not None:
            planned.append(PlannedTensor(tensor.name, tensor.dtype, layout, is_value=tensor.is_value))
    for dealer, tensor, nbytes in replicated:
        if tensor.layout is not None:
            planned.append(PlannedTensor(tensor.name, tensor.dtype, tensor.layout, dealer.deal(nbytes)))
    return Plan(world_size, planned, aliases)


class _Dealer:
    """Shares out the writing of replicated pieces among the replicas of one mesh.

    Small pieces go to one replica until it has its share, then to the next: neighbours in name order stay in one file, so
    that a load does not open a file per scalar. Large ones are cut into equal slices.
    """

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._small_total = 0
        self._small_dealt = 0
        self._next_slice = 0

    def expect(self, nbytes: int) -> None:
        """Learn of a piece before any is dealt."""
        if nbytes < SMALL:
            self._small_total += nbytes

    def deal(self, nbytes: int) -> tuple[int, int]:
        """(first, count) of the replicas that write a piece of ``nbytes`` bytes."""
        if nbytes < SMALL:
            share = max(SMALL, -(-self._small_total // self._replicas))
            writer = min(self._small_dealt // share, self._replicas - 1)
            self._small_dealt += nbytes
            return writer, 1
        count = min(self._replicas, nbytes // MIN_SLICE)
        first = self._next_slice if count < self._replicas else 0
        self._next_slice = (first + count) % self._replicas
        return first, count
