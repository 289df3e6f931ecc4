# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies of shapes, meshes, layouts and pieces; uneven and empty ones are common."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from hypothesis import strategies as st

from shardckpt.layout import (
    BoxLayout,
    FlatLayout,
    Ints,
    Mesh,
    MeshLayout,
    Piece,
    Placement,
    Replicate,
    Shard,
    StridedShard,
)

MOST_RANKS = 16
Spread = MeshLayout | FlatLayout | BoxLayout
"""Layouts in which all ranks together hold one tensor."""


def shapes(max_dims: int = 3, max_size: int = 9) -> st.SearchStrategy[Ints]:
    return st.lists(st.integers(0, max_size), max_size=max_dims).map(tuple)


@st.composite
def meshes(draw: st.DrawFn, world_size: int | None = None) -> Mesh:
    """Up to 16 ranks in up to three dimensions, in any order, not always all of the world's."""
    shape: list[int] = []
    most = world_size or MOST_RANKS
    for _ in range(draw(st.integers(1, 3))):
        shape.append(draw(st.integers(1, max(1, min(4 if shape else 16, most // prod(shape))))))
    size = prod(shape)
    world = draw(st.permutations(range(world_size or size + draw(st.integers(0, 2)))))
    ranks = sorted(world[:size]) if draw(st.booleans()) else world[:size]
    return Mesh(tuple(ranks), tuple(shape))


def placements(dims: int) -> st.SearchStrategy[Placement]:
    kinds: list[st.SearchStrategy[Placement]] = [st.just(Replicate())]
    if dims:
        kinds.append(st.builds(Shard, st.integers(0, dims - 1)))
        kinds.append(st.builds(StridedShard, st.integers(0, dims - 1), st.integers(2, 5)))
    return st.one_of(kinds)


@st.composite
def mesh_layouts(draw: st.DrawFn, shape: Ints | None = None, world_size: int | None = None) -> MeshLayout:
    shape = draw(shapes()) if shape is None else shape
    mesh = draw(meshes(world_size))
    return MeshLayout(shape, mesh, tuple(draw(placements(len(shape))) for _ in mesh.shape))


@st.composite
def flat_layouts(draw: st.DrawFn, shape: Ints | None = None, world_size: int | None = None) -> FlatLayout:
    """The ravel in ranges of any length, some empty, each of another rank."""
    shape = draw(shapes()) if shape is None else shape
    numel = prod(shape)
    most = (world_size or 8) - 1
    cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=most)))
    ranks = draw(st.permutations(range(world_size or len(cuts) + 1)))[: len(cuts) + 1]
    borders = [0, *cuts, numel]
    return FlatLayout(shape, tuple(zip(ranks, borders[:-1], borders[1:], strict=True)))


@st.composite
def box_layouts(draw: st.DrawFn, shape: Ints | None = None, world_size: int | None = None) -> BoxLayout:
    """A grid of boxes with borders anywhere, each of another rank."""
    shape = draw(shapes()) if shape is None else shape
    budget = world_size or 8
    dims: list[list[tuple[int, int]]] = []
    for size in shape:
        cuts = sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=max(0, min(2, budget - 1)))))
        borders = [0, *(cut for cut in cuts if cut < size), size]
        dims.append(list(pairwise(borders)))
        budget //= len(dims[-1])
    boxes: list[tuple[Ints, Ints]] = [((), ())]
    for dim in dims:
        boxes = [((*o, low), (*n, high - low)) for o, n in boxes for low, high in dim]
    ranks = draw(st.permutations(range(world_size or len(boxes))))[: len(boxes)]
    return BoxLayout(shape, tuple((rank, o, n) for rank, (o, n) in zip(ranks, boxes, strict=True)))


@st.composite
def layouts(draw: st.DrawFn, shape: Ints | None = None, world_size: int | None = None) -> Spread:
    """A layout of any kind that covers its tensor."""
    shape = draw(shapes()) if shape is None else shape
    kinds: list[st.SearchStrategy[Spread]] = [
        mesh_layouts(shape, world_size),
        flat_layouts(shape, world_size),
        box_layouts(shape, world_size),
    ]
    return draw(st.one_of(kinds))


@st.composite
def pieces(draw: st.DrawFn, shape: Ints) -> Piece:
    """A piece of a tensor of ``shape``: what some rank holds under some layout, or a window of it."""
    layout = draw(mesh_layouts(shape))
    piece = layout.piece(draw(st.sampled_from(layout.mesh.ranks)))
    assert piece is not None
    if draw(st.booleans()):
        start = draw(st.integers(0, piece.numel))
        piece = piece.window(start, draw(st.integers(start, piece.numel)))
    return piece
