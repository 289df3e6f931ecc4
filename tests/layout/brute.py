# SPDX-License-Identifier: Apache-2.0
"""The slow and obvious way: a tensor is an array of its own element numbers, and layouts cut that array up."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from shardckpt.layout import Copy, Ints, MeshLayout, Piece, Placement, Replicate, StridedShard

Array = npt.NDArray[np.int64]


def numbered(shape: Ints) -> Array:
    """An array of ``shape`` whose elements are their own positions in its ravel."""
    return np.arange(prod(shape), dtype=np.int64).reshape(shape)


def held(piece: Piece, shape: Ints) -> Array:
    """The elements of a piece of a tensor of ``shape``, raveled in memory order."""
    array = numbered(shape)
    for dim, intervals in enumerate(piece.grid):
        index = np.concatenate([np.arange(start, stop) for start, stop in intervals])
        array = array.take(index, axis=dim)
    return array.ravel()[piece.start : piece.stop]


def chunks(array: Array, parts: int, dim: int) -> list[Array]:
    """``torch.chunk`` filled up with empty chunks: ceil-sized from the left."""
    size = array.shape[dim]
    step = -(-size // parts)
    borders = [(min(at * step, size), min((at + 1) * step, size)) for at in range(parts)]
    return [array.take(np.arange(start, stop), axis=dim) for start, stop in borders]


def shard(array: Array, placement: Placement, ranks: int, index: int) -> Array:
    """What the rank at ``index`` of ``ranks`` gets of ``array``."""
    if isinstance(placement, Replicate):
        return array
    factor = placement.split_factor if isinstance(placement, StridedShard) else 1
    parts = [chunks(part, ranks, placement.dim)[index] for part in chunks(array, factor, placement.dim)]
    return np.concatenate(parts, axis=placement.dim)


def local(layout: MeshLayout, rank: int) -> Array:
    """This rank's array under a mesh layout, one placement after the other."""
    array = numbered(layout.shape)
    coordinate = np.argwhere(np.array(layout.mesh.ranks).reshape(layout.mesh.shape) == rank)[0]
    for placement, size, index in zip(layout.placements, layout.mesh.shape, coordinate.tolist(), strict=True):
        array = shard(array, placement, size, index)
    return array


def positions(copy_sizes: Ints, strides: Ints, first: int) -> list[int]:
    """Positions in memory of all elements of a strided box, row-major."""
    return [first + sum(i * s for i, s in zip(at, strides, strict=True)) for at in product(*map(range, copy_sizes))]


def carry_out(copies: Iterable[Copy], source: Piece, target: Piece, shape: Ints) -> dict[int, int]:
    """Element by position in the target's memory, after the copies from the source's; no position is written twice."""
    stored = held(source, shape)
    placed: dict[int, int] = {}
    for copy in copies:
        read = positions(copy.sizes, source.grid_strides, copy.source_position)
        written = positions(copy.sizes, target.grid_strides, copy.target_position)
        for at, to in zip(read, written, strict=True):
            assert to not in placed, "an element is copied twice"
            placed[to] = int(stored[at])
    return placed
