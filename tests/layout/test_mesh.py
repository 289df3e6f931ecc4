# SPDX-License-Identifier: Apache-2.0
"""Mesh layouts: what each rank holds, who holds a part, and how replicas are counted, against index arrays."""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.layout import Ints, Mesh, MeshLayout, Placement, Replicate, Shard, StridedShard
from tests.layout import brute
from tests.layout.strategies import mesh_layouts, meshes


def coordinates(mesh: Mesh) -> list[Ints]:
    return list(product(*map(range, mesh.shape)))


@given(meshes())
def test_coordinates_are_those_of_a_row_major_array(mesh: Mesh) -> None:
    array = np.array(mesh.ranks).reshape(mesh.shape)
    assert [mesh.coordinate(int(array[at])) for at in coordinates(mesh)] == coordinates(mesh)
    assert mesh.coordinate(max(mesh.ranks) + 1) is None


@given(meshes(), st.data())
def test_ranks_are_selected_as_an_array_is_indexed(mesh: Mesh, data: st.DataObject) -> None:
    fixed = tuple(data.draw(st.none() | st.integers(0, size - 1)) for size in mesh.shape)
    array = np.array(mesh.ranks).reshape(mesh.shape)
    index = tuple(slice(None) if at is None else at for at in fixed)
    assert mesh.select(fixed) == tuple(np.atleast_1d(array[index]).ravel().tolist())


def test_equal_meshes_are_one_key() -> None:
    assert len({Mesh((0, 1), (2,)), Mesh((0, 1), (2,)), Mesh((1, 0), (2,)), Mesh((0, 1), (2, 1))}) == 3


@given(mesh_layouts())
def test_pieces_hold_what_brute_force_gives(layout: MeshLayout) -> None:
    for rank in layout.mesh.ranks:
        piece = layout.piece(rank)
        expected = brute.local(layout, rank)
        assert piece is not None
        assert brute.held(piece, layout.shape).tolist() == expected.ravel().tolist()
        if expected.size:
            assert piece.shape == expected.shape
        assert piece.numel == expected.size == prod(piece.shape)


@given(mesh_layouts())
def test_a_rank_outside_of_the_mesh_holds_nothing(layout: MeshLayout) -> None:
    assert layout.ranks == set(layout.mesh.ranks)
    assert layout.piece(max(layout.mesh.ranks) + 1) is None


@given(mesh_layouts())
def test_cells_cover_every_element_once(layout: MeshLayout) -> None:
    by_cell = {layout.piece(rank): brute.local(layout, rank).ravel().tolist() for rank in layout.mesh.ranks}
    covered = [element for elements in by_cell.values() for element in elements]
    assert sorted(covered) == list(range(prod(layout.shape)))


@given(mesh_layouts())
def test_sizes_and_replicas_of_all_ranks_at_once(layout: MeshLayout) -> None:
    held = [brute.local(layout, rank).size for rank in layout.mesh.ranks]
    assert layout.numel_by_position.tolist() == held
    assert layout.replica_by_position.tolist() == [layout.replica_index(rank) for rank in layout.mesh.ranks]


@given(mesh_layouts())
def test_replicas_of_a_cell_are_numbered_in_mesh_order(layout: MeshLayout) -> None:
    cells: dict[Ints, list[int]] = {}
    for at, rank in zip(coordinates(layout.mesh), layout.mesh.ranks, strict=True):
        cell = tuple(i for i, placement in zip(at, layout.placements, strict=True) if not isinstance(placement, Replicate))
        cells.setdefault(cell, []).append(rank)
    for ranks in cells.values():
        assert len(ranks) == layout.replicas
        assert [layout.replica_index(rank) for rank in ranks] == list(range(layout.replicas))


def test_an_empty_box_is_over_no_cell() -> None:
    for placement in (Shard(1), StridedShard(1, 2)):
        layout = MeshLayout((1, 2), Mesh((0,), (1,)), (placement,))
        assert list(layout.cells((0, 1), (1, 0))) == []


@given(mesh_layouts(), st.data())
def test_cells_over_a_box_are_just_those_that_share_elements(layout: MeshLayout, data: st.DataObject) -> None:
    offsets = tuple(data.draw(st.integers(0, max(0, size - 1))) for size in layout.shape)
    sizes = tuple(data.draw(st.integers(0, size - at)) for size, at in zip(layout.shape, offsets, strict=True))
    box = brute.numbered(layout.shape)[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
    found = list(layout.cells(offsets, sizes))
    assert len({cell.piece for cell in found}) == len(found)
    reached: dict[int, tuple[int, ...]] = {}
    for cell in found:
        for rank in cell.ranks:
            assert layout.piece(rank) == cell.piece
            reached[rank] = cell.ranks
        assert [layout.replica_index(rank) for rank in cell.ranks] == list(range(layout.replicas))
    wanted = set(box.ravel().tolist())
    expected = {rank for rank in layout.mesh.ranks if wanted & set(brute.local(layout, rank).ravel().tolist())}
    assert set(reached) == expected


@pytest.mark.parametrize(
    ("shape", "mesh_shape", "placements", "lengths"),
    [
        pytest.param((10,), (4,), (Shard(0),), [3, 3, 3, 1], id="uneven"),
        pytest.param((5,), (4,), (Shard(0),), [2, 2, 1, 0], id="last one empty"),
        pytest.param((2,), (4,), (Shard(0),), [1, 1, 0, 0], id="fewer elements than ranks"),
        pytest.param((0,), (2,), (Shard(0),), [0, 0], id="no elements"),
        pytest.param((), (2,), (Replicate(),), [1, 1], id="0-d"),
        pytest.param((9,), (2, 2), (Shard(0), Shard(0)), [3, 2, 2, 2], id="sharded twice"),
        pytest.param((9,), (4,), (StridedShard(0, 2),), [3, 3, 2, 1], id="strided, as in torch's own example"),
        pytest.param((4, 6), (2, 3), (Shard(1), Replicate()), [12, 12, 12, 12, 12, 12], id="replicated on one axis"),
    ],
)
def test_known_lengths(shape: Ints, mesh_shape: Ints, placements: tuple[Placement, ...], lengths: list[int]) -> None:
    layout = MeshLayout(shape, Mesh(tuple(range(prod(mesh_shape))), mesh_shape), placements)
    assert layout.numel_by_position.tolist() == lengths


def test_strided_shards_of_fsdp_and_tensor_parallelism() -> None:
    """The example in the docstring of torch's _StridedShard: tensor parallelism cuts first, though it stands last."""
    layout = MeshLayout((8,), Mesh((0, 1, 2, 3), (2, 2)), (StridedShard(0, 2), Shard(0)))
    held = [brute.held(piece, (8,)).tolist() for rank in range(4) if (piece := layout.piece(rank))]
    assert held == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_a_rank_is_looked_up_in_large_meshes_without_asking_the_others() -> None:
    world = 1 << 14
    layout = MeshLayout((world * 3 + 1, 8), Mesh(tuple(range(world)), (world // 8, 8)), (Shard(0), Replicate()))
    cells = list(layout.cells((5000, 0), (3, 8)))
    assert len(cells) == 1
    assert cells[0].ranks == tuple(range(cells[0].ranks[0], cells[0].ranks[0] + 8))
