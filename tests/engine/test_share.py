# SPDX-License-Identifier: Apache-2.0
"""Who reads which bytes when data is read once: each byte in one turn of one rank, in even shares."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardckpt.layout import PerRankShapes
from shardckpt.plan import Plan
from shardckpt.share import Shares
from tests.engine.simulate import by_hand

CHUNK = 8192


@st.composite
def files(draw: st.DrawFn) -> Plan:
    """Files of all sizes, empty ones too."""
    sizes = draw(
        st.lists(st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1]) | st.integers(0, 9 * CHUNK), min_size=1, max_size=9)
    )
    shapes = tuple((size,) for size in sizes)
    return by_hand(len(sizes), {"x": ("uint8", PerRankShapes(shapes), (0, 1))})


def chunks_of_all(shares: Shares, world_size: int) -> dict[tuple[int, int], tuple[int, int, int]]:
    found = {}
    for rank in range(world_size):
        for turn in range(shares.turns):
            chunk = shares.chunk_of(rank, turn)
            if chunk is not None:
                found[rank, turn] = chunk
    return found


@given(files(), st.integers(1, 12))
def test_every_byte_is_read_in_one_turn_of_one_rank(plan: Plan, world_size: int) -> None:
    shares = Shares(plan, world_size, CHUNK)
    chunks = chunks_of_all(shares, world_size)
    by_file: dict[int, list[tuple[int, int]]] = {}
    for file, start, stop in chunks.values():
        assert start % CHUNK == 0
        assert 0 < stop - start <= CHUNK
        by_file.setdefault(file, []).append((start, stop))
    for file, size in enumerate(plan.bytes_by_rank.tolist()):
        covered = 0
        for start, stop in sorted(by_file.get(file, [])):
            assert start == covered
            covered = stop
        assert covered == size


@given(files(), st.integers(1, 12), st.data())
def test_all_ranks_know_who_reads_a_byte(plan: Plan, world_size: int, data: st.DataObject) -> None:
    shares = Shares(plan, world_size, CHUNK)
    chunks = chunks_of_all(shares, world_size)
    for file, size in enumerate(plan.bytes_by_rank.tolist()):
        for position in {0, size // 2, size - 1, data.draw(st.integers(0, max(0, size - 1)))} if size else ():
            rank, turn = shares.reader_of(file, position)
            assert 0 <= rank < world_size
            found, start, stop = chunks[rank, turn]
            assert found == file
            assert start <= position < stop


@given(files(), st.integers(1, 12))
def test_shares_are_even(plan: Plan, world_size: int) -> None:
    shares = Shares(plan, world_size, CHUNK)
    total = sum(-(-size // CHUNK) for size in plan.bytes_by_rank.tolist())
    assert shares.turns == max(1, -(-total // world_size))
