# SPDX-License-Identifier: Apache-2.0
"""Which bytes a load reads: all that it needs, whole blocks, and little else."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardckpt.layout import Mesh, MeshLayout, PerRankShapes, Piece, Replicate, Shard
from shardckpt.plan import Plan
from shardckpt.reshard import GAP_BLOCKS, FileReads, Want, plan_reads
from tests.engine.simulate import by_hand
from tests.engine.strategies import plans
from tests.layout import brute
from tests.layout.strategies import pieces

BLOCK = 4096


def needed_bytes(plan: Plan, wants: list[Want]) -> dict[int, set[int]]:
    """Byte positions of each file's data region that hold wanted elements, element by element."""
    needed: dict[int, set[int]] = {}
    for want in wants:
        if isinstance(want.tensor.layout, PerRankShapes):
            continue
        wanted = set(brute.held(want.piece, want.tensor.layout.shape).tolist())
        for rank in range(plan.world_size):
            stored = want.tensor.stored(rank)
            if stored is None or not stored.numel:
                continue
            offset, size = plan.offsets(rank)[want.tensor.name], want.tensor.itemsize
            for at, element in enumerate(brute.held(stored, want.tensor.layout.shape).tolist()):
                if element in wanted:
                    needed.setdefault(rank, set()).update(range(offset + at * size, offset + (at + 1) * size))
    return needed


def check_extents(plan: Plan, reads: FileReads) -> None:
    last = -1
    for start, stop in reads.extents:
        assert last < start < stop <= plan.bytes_by_rank[reads.file]
        assert start % plan.block_size == 0
        assert stop % plan.block_size == 0 or stop == plan.bytes_by_rank[reads.file]
        last = stop
    assert reads.nbytes == sum(stop - start for start, stop in reads.extents)
    assert list(reads.segments) == sorted(reads.segments, key=lambda segment: segment.offset)


@pytest.mark.slow
@settings(max_examples=150)
@given(plans(max_size=20), st.data())
def test_extents_are_whole_blocks_around_all_that_is_needed(plan: Plan, data: st.DataObject) -> None:
    wants = [
        Want(at, tensor, data.draw(pieces(tensor.layout.shape)))
        for at, tensor in enumerate(plan.tensors)
        if not isinstance(tensor.layout, PerRankShapes)
    ]
    wants = [want for want in wants if want.piece.numel]
    needed = needed_bytes(plan, wants)
    reads = {file.file: file for file in plan_reads(plan, wants)}
    assert needed.keys() <= reads.keys()
    for file in reads.values():
        check_extents(plan, file)
        covered = {byte for start, stop in file.extents for byte in range(start, stop)}
        found = needed.get(file.file, set())
        assert found <= covered
        for at in range(0, int(plan.bytes_by_rank[file.file]), plan.block_size):
            around = range(at - GAP_BLOCKS * plan.block_size, at + (GAP_BLOCKS + 1) * plan.block_size)
            if at in covered:
                assert not found.isdisjoint(around), "a block is read far from all that is needed"


@pytest.mark.slow
@given(plans(), st.data())
def test_segments_tile_the_bytes_that_are_read(plan: Plan, data: st.DataObject) -> None:
    """All tensors wanted whole: each byte of each file is in one segment, however the region is cut."""
    wants = [
        Want(at, t, Piece.box((0,) * len(t.layout.shape), t.layout.shape))
        for at, t in enumerate(plan.tensors)
        if not isinstance(t.layout, PerRankShapes)
    ]
    for file in plan_reads(plan, [want for want in wants if want.piece.numel]):
        end = file.segments[-1].stop
        cuts = sorted({0, end, *data.draw(st.lists(st.integers(0, end), max_size=3))})
        for start, stop in pairwise(cuts):
            parts = list(file.segments_in(start, stop))
            assert [low for _, low, _ in parts] == sorted(low for _, low, _ in parts)
            for segment, low, high in parts:
                assert max(start, segment.offset) == low < high == min(stop, segment.stop)
        for segment in file.segments:
            assert segment.part(segment.offset, segment.stop) == segment.source


def test_segments_with_one_offset_are_all_found() -> None:
    """Two names in a target may want one stored tensor."""
    plan = by_hand(1, {"x": ("uint8", MeshLayout((10_000,), Mesh((0,), (1,)), (Shard(0),)), (0, 1))}, BLOCK)
    tensor = plan.by_name["x"]
    wants = [Want(0, tensor, Piece.box((0,), (100,))), Want(1, tensor, Piece.box((9_000,), (1000,)))]
    (reads,) = plan_reads(plan, wants)
    assert reads.extents == ((0, BLOCK), (2 * BLOCK, 10_000))
    assert [segment.want.key for segment, _, _ in reads.segments_in(0, 10_000)] == [0, 1]


ROW = 16 * BLOCK


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        pytest.param(slice(0, BLOCK), 8 * BLOCK, id="one block of each row"),
        pytest.param(slice(100, 200), 8 * BLOCK, id="part of a block of each row"),
        pytest.param(slice(BLOCK - 1, BLOCK + 1), 8 * 2 * BLOCK, id="two bytes on a border"),
        pytest.param(slice(0, ROW - GAP_BLOCKS * BLOCK), 8 * (ROW - GAP_BLOCKS * BLOCK), id="a gap that is skipped"),
        pytest.param(slice(0, ROW - BLOCK), 8 * ROW - BLOCK, id="a gap that is read"),
        pytest.param(slice(0, ROW), 8 * ROW, id="all"),
    ],
)
def test_gaps_are_skipped_when_they_are_large(columns: slice, expected: int) -> None:
    plan = by_hand(1, {"x": ("uint8", MeshLayout((8, ROW), Mesh((0,), (1,)), (Replicate(),)), (0, 1))}, BLOCK)
    piece = Piece.box((0, columns.start), (8, columns.stop - columns.start))
    (reads,) = plan_reads(plan, [Want(0, plan.by_name["x"], piece)])
    assert reads.nbytes == expected


def test_only_files_with_something_wanted_are_read() -> None:
    plan = by_hand(4, {"x": ("float32", MeshLayout((40, 8), Mesh((0, 1, 2, 3), (4,)), (Shard(0),)), (0, 1))})
    reads = plan_reads(plan, [Want(0, plan.by_name["x"], Piece.box((12, 0), (10, 8)))])
    assert [file.file for file in reads] == [1, 2]


def test_a_per_rank_tensor_is_read_from_its_own_rank() -> None:
    plan = by_hand(3, {"x": ("float32", PerRankShapes(((2,), None, (5,))), (0, 1))})
    tensor = plan.by_name["x"]
    assert [file.file for file in plan_reads(plan, [Want(0, tensor, Piece.box((0,), (5,)), 2)])] == [2]
    assert plan_reads(plan, [Want(0, tensor, Piece.box((0,), (5,)), 1)]) == []
