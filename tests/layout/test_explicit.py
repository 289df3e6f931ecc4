# SPDX-License-Identifier: Apache-2.0
"""Flat and boxed layouts, per-rank tensors, and the one rule that all kinds of layouts keep when data moves between them."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.layout import (
    BoxLayout,
    Cell,
    FlatLayout,
    Ints,
    MeshLayout,
    PerRankLayout,
    PerRankShapes,
    Piece,
    Replicated,
    intersect,
)
from tests.layout import brute
from tests.layout.strategies import box_layouts, flat_layouts, layouts, shapes


@given(flat_layouts())
def test_flat_pieces_are_ranges_of_the_ravel(layout: FlatLayout) -> None:
    for rank, start, stop in layout.ranges:
        piece = layout.piece(rank)
        assert piece is not None
        assert brute.held(piece, layout.shape).tolist() == list(range(start, stop))
    assert layout.ranks == {rank for rank, _, _ in layout.ranges}
    assert layout.piece(max(layout.ranks) + 1) is None


@given(box_layouts())
def test_boxes_are_boxes(layout: BoxLayout) -> None:
    for rank, offsets, sizes in layout.boxes:
        piece = layout.piece(rank)
        box = brute.numbered(layout.shape)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert piece is not None
        assert piece.shape == sizes
        assert brute.held(piece, layout.shape).tolist() == box.ravel().tolist()
    assert layout.ranks == {rank for rank, _, _ in layout.boxes}
    assert layout.piece(max(layout.ranks) + 1) is None


@given(st.data(), shapes())
def test_all_of_a_box_is_found_in_the_cells_over_it(data: st.DataObject, shape: Ints) -> None:
    layout = data.draw(layouts(shape))
    offsets = tuple(data.draw(st.integers(0, max(0, size - 1))) for size in shape)
    sizes = tuple(data.draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))
    wanted = brute.numbered(shape)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].ravel().tolist()
    found: list[int] = []
    for cell in layout.cells(offsets, sizes) if prod(sizes) else ():
        assert all(layout.piece(rank) == cell.piece for rank in cell.ranks)
        found += brute.held(cell.piece, shape).tolist()
    assert set(wanted) <= set(found)
    assert len(found) == len(set(found)), "a cell comes twice"


@pytest.mark.slow
@settings(max_examples=400)
@given(st.data(), shapes())
def test_any_layout_is_filled_from_any_other(data: st.DataObject, shape: Ints) -> None:
    """Resharding, as a load does it: for each fragment of a wanted piece the cells over it, for each cell the copies."""
    source, target = data.draw(layouts(shape)), data.draw(layouts(shape))
    for rank in sorted(target.ranks):
        wanted = target.piece(rank)
        assert wanted is not None
        memory = np.full(wanted.numel, -1)
        cells: dict[Cell, None] = {}
        for fragment in wanted.fragments:
            cells |= dict.fromkeys(source.cells(fragment.offsets, fragment.sizes))
        for cell in cells:
            for at, element in brute.carry_out(intersect(cell.piece, wanted), cell.piece, wanted, shape).items():
                assert memory[at] == -1
                memory[at] = element
        assert memory.tolist() == brute.held(wanted, shape).tolist()


@given(shapes(), st.integers(0, 5))
def test_replicated_and_per_rank_tensors_are_whole_on_each_rank(shape: Ints, rank: int) -> None:
    whole = Piece.box((0,) * len(shape), shape)
    assert Replicated(shape).piece(rank) == PerRankLayout(shape).piece(rank) == whole


def test_per_rank_shapes() -> None:
    layout = PerRankShapes(((2, 3), None, ()))
    assert [layout.shape_of(rank) for rank in range(3)] == [(2, 3), None, ()]
    assert [piece and piece.shape for piece in map(layout.piece, range(3))] == [(2, 3), None, ()]
    assert PerRankShapes(((4,),)).shape_of(7) == (4,)


def test_layouts_are_keys() -> None:
    flat = FlatLayout((4,), ((0, 0, 4),))
    assert len({flat, FlatLayout((4,), ((0, 0, 4),)), BoxLayout((4,), ((0, (0,), (4,)),)), PerRankShapes(((4,),))}) == 3
    assert MeshLayout.__eq__ is not object.__eq__
