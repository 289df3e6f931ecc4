# SPDX-License-Identifier: Apache-2.0
"""Boxes, windows of grids, and intersections of pieces: every element that two pieces share is copied, once."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.layout import Ints, Piece, intersect, intersect_boxes, row_major_strides, window_boxes
from tests.layout import brute
from tests.layout.strategies import pieces, shapes


@st.composite
def boxes(draw: st.DrawFn, shape: Ints) -> tuple[Ints, Ints]:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True))


def members(box: tuple[Ints, Ints]) -> set[Ints]:
    return set(product(*(range(o, o + n) for o, n in zip(*box, strict=True))))


@given(shapes(4, 7))
def test_strides_are_those_of_a_dense_array(shape: Ints) -> None:
    array = brute.numbered(shape)
    strides = row_major_strides(shape)
    for at in product(*map(range, shape)):
        assert array[at] == sum(i * s for i, s in zip(at, strides, strict=True))


@given(st.data(), shapes())
def test_boxes_intersect_in_their_common_elements(data: st.DataObject, shape: Ints) -> None:
    a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
    common = intersect_boxes(*a, *b)
    assert (members(common) if common else set()) == members(a) & members(b)
    assert common is None or prod(common[1]) > 0


@given(st.data(), shapes(4, 6))
def test_windows_are_cut_into_few_boxes_in_ravel_order(data: st.DataObject, shape: Ints) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    array = brute.numbered(shape)
    found = list(window_boxes(shape, start, stop))
    cut = [array[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].ravel().tolist() for box in found]
    assert [element for box in cut for element in box] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.slow
@given(st.data(), shapes())
def test_fragments_say_where_each_element_lies(data: st.DataObject, shape: Ints) -> None:
    piece = data.draw(pieces(shape))
    memory = np.full(piece.numel, -1)
    array = brute.numbered(shape)
    grid = np.arange(prod(piece.grid_shape)).reshape(piece.grid_shape)
    for fragment in piece.fragments:
        at = brute.positions(fragment.sizes, piece.grid_strides, fragment.position)
        box = array[tuple(slice(o, o + n) for o, n in zip(fragment.offsets, fragment.sizes, strict=True))]
        assert (memory[at] == -1).all()
        memory[at] = box.ravel()
        local = grid[tuple(slice(o, o + n) for o, n in zip(fragment.local, fragment.sizes, strict=True))]
        assert (local.ravel() - piece.start).tolist() == at
    assert memory.tolist() == brute.held(piece, shape).tolist()


@given(st.data(), shapes())
def test_windows_of_windows(data: st.DataObject, shape: Ints) -> None:
    piece = data.draw(pieces(shape))
    start = data.draw(st.integers(0, piece.numel))
    stop = data.draw(st.integers(start, piece.numel))
    window = piece.window(start, stop)
    assert brute.held(window, shape).tolist() == brute.held(piece, shape)[start:stop].tolist()
    assert window.numel == stop - start
    assert prod(window.shape) == window.numel
    assert window.is_window == (window.numel != prod(piece.grid_shape))


@given(st.data(), shapes())
def test_intersections_copy_every_common_element_once(data: st.DataObject, shape: Ints) -> None:
    source, target = data.draw(pieces(shape)), data.draw(pieces(shape))
    copies = intersect(source, target)
    placed = brute.carry_out(copies, source, target, shape)
    wanted = brute.held(target, shape).tolist()
    common = set(brute.held(source, shape).tolist()) & set(wanted)
    assert placed == {at: element for at, element in enumerate(wanted) if element in common}
    grid = np.arange(prod(target.grid_shape)).reshape(target.grid_shape)
    for copy in copies:
        local = grid[tuple(slice(o, o + n) for o, n in zip(copy.target_local, copy.sizes, strict=True))]
        assert (local.ravel() - target.start).tolist() == brute.positions(copy.sizes, target.grid_strides, copy.target_position)


def test_constructors_agree() -> None:
    assert Piece.box((0, 0), (3, 4)) == Piece.whole((((0, 3),), ((0, 4),))) == Piece.flat((3, 4), 0, 12)
    assert Piece.flat((3, 4), 2, 7).shape == (5,)
    assert Piece.box((1, 2), (2, 2)).shape == (2, 2)
    assert Piece.box((), ()).numel == 1
    assert Piece.flat((), 0, 0).shape == (0,)
