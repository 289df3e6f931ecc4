# SPDX-License-Identifier: Apache-2.0
"""Loads of checkpoints of which files are lost or damaged, by real ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import shardckpt
from shardckpt.errors import ChecksumMismatch, IntegrityError, MissingFile, TruncatedFile
from tests.parity.jobs import cut, extend, flip, load, lose, opened, parity_file, parity_of, rank_file, save, zero
from tests.ranks import RankErrors, RankPool

Copy = Callable[[int], Path]
DAMAGES = [lose, cut, extend, zero, flip]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_lost_file_is_rebuilt(ranks: RankPool, copy: Copy, size: int) -> None:
    path = copy(size)
    for rank in range(4):
        file = rank_file(path, rank)
        aside = file.rename(path.parent / "aside")
        assert [found[:2] for found in ranks.run(4, load, str(path))] == [(True, (file.name,))] * 4
        aside.rename(file)
    assert [found[:2] for found in ranks.run(4, load, str(path))] == [(True, ())] * 4


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_one_file_of_each_group_is_damaged(ranks: RankPool, copy: Copy, damage: Callable[[Path], None]) -> None:
    path = copy(2)
    assert [group.ranks for group in parity_of(path).record.groups] == [(0, 2), (1, 3)]
    files = [rank_file(path, rank) for rank in (2, 3)]
    for file in files:
        damage(file)
    found = ranks.run(4, load, str(path))
    assert [one[:2] for one in found] == [(True, tuple(file.name for file in files))] * 4


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_world_size_rebuilds_too(ranks: RankPool, copy: Copy, world_size: int) -> None:
    path = copy(4)
    flip(rank_file(path, 0), 300_000)
    lose(parity_file(path, 0, 3))
    found = ranks.run(world_size, load, str(path))
    assert [one[:2] for one in found] == [(True, (rank_file(path, 0).name,))] * world_size


def test_a_load_that_reads_each_block_once_rebuilds_too(ranks: RankPool, copy: Copy) -> None:
    path = copy(4)
    lost = rank_file(path, 0)
    lose(lost)
    assert [one[:2] for one in ranks.run(4, load, str(path), {"read_once": "always"})] == [(True, (lost.name,))] * 4


def test_blocks_of_all_files_are_damaged_in_different_places(ranks: RankPool, copy: Copy) -> None:
    path = copy(4)
    manifest = opened(path).checkpoint.manifest
    block, data = manifest.block_size, manifest.files[0].data
    flip(rank_file(path, 0), data + 3 * block)
    flip(rank_file(path, 2), data + 4 * block)
    flip(rank_file(path, 2), data + 7 * block)
    flip(parity_file(path, 0, 1), 2 * block)
    found = ranks.run(4, load, str(path))
    assert [one[0] for one in found] == [True] * 4
    assert found[0][1] == tuple(sorted(rank_file(path, rank).name for rank in (0, 2)))


def test_a_rebuild_reads_each_file_of_the_group_once(ranks: RankPool, copy: Copy) -> None:
    path = copy(4)
    manifest = opened(path).checkpoint.manifest
    data, block = [file.size - file.data for file in manifest.files], manifest.block_size
    assert ranks.run(1, load, str(path), {"read_once": "never"}) == [(True, (), data[0])]
    lose(rank_file(path, 0))
    stop = -(-data[0] // block) * block
    others = [min(size, stop) for size in (*data[1:], max(data))]
    assert ranks.run(1, load, str(path), {"read_once": "never"}) == [(True, (manifest.files[0].name,), sum(others))]


def test_damaged_parity_does_no_harm_to_intact_files(ranks: RankPool, copy: Copy) -> None:
    path = copy(4)
    flip(parity_file(path, 0, 0))
    lose(parity_file(path, 0, 1))
    next(path.glob("parity-*.json")).write_bytes(b"{")
    assert [one[:2] for one in ranks.run(4, load, str(path))] == [(True, ())] * 4


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [(lose, lose, MissingFile), (lose, cut, MissingFile), (cut, lose, TruncatedFile), (lose, zero, MissingFile)],
    ids=lambda value: value.__name__,
)
def test_two_losses_in_one_group_raise_the_first_error_and_say_so(
    ranks: RankPool, copy: Copy, first: Callable[[Path], None], second: Callable[[Path], None], kind: type[IntegrityError]
) -> None:
    path = copy(2)
    files = [rank_file(path, rank) for rank in (0, 2)]
    first(files[0])
    second(files[1])
    with pytest.raises(RankErrors) as caught:
        ranks.run(4, load, str(path))
    for error in caught.value.outcomes:
        assert isinstance(error, IntegrityError)
    told = [error for error in caught.value.outcomes if type(error) is kind]
    assert told
    assert files[0].name in told[0].message
    assert "cannot be rebuilt from parity" in told[0].message
    assert files[1].name in told[0].message


def test_a_flip_in_a_file_and_in_the_parity_of_the_same_place_is_refused(ranks: RankPool, copy: Copy) -> None:
    path = copy(4)
    data = opened(path).checkpoint.manifest.files[0].data
    flip(rank_file(path, 0), data + 10)
    flip(parity_file(path, 0, 0), 11)
    with pytest.raises(RankErrors) as caught:
        ranks.run(4, load, str(path))
    error = next(error for error in caught.value.outcomes if isinstance(error, ChecksumMismatch))
    assert rank_file(path, 0).name in error.message
    assert f"{parity_file(path, 0, 0).name} in {path}: bytes [0, " in error.message


def test_without_a_record_the_checkpoint_loads_and_nothing_is_rebuilt(ranks: RankPool, copy: Copy) -> None:
    """As after a crash between the two commits."""
    path = copy(2)
    lose(next(path.glob("parity-*.json")))
    assert [one[:2] for one in ranks.run(4, load, str(path))] == [(True, ())] * 4
    lose(rank_file(path, 1))
    with pytest.raises(RankErrors) as caught:
        ranks.run(4, load, str(path))
    for error in caught.value.outcomes:
        assert isinstance(error, MissingFile)
        assert "parity" not in error.message


def test_three_ranks_have_a_group_of_one(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "three"
    ranks.run(3, save, str(path), "xor:2")
    assert [group.ranks for group in parity_of(path).record.groups] == [(0, 2), (1,)]
    lose(rank_file(path, 0))
    flip(rank_file(path, 1))
    names = tuple(file.name for file in opened(path).checkpoint.manifest.files[:2])
    assert [one[:2] for one in ranks.run(3, load, str(path))] == [(True, names)] * 3


def test_one_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(shardckpt.ConfigError, match="one rank"):
        shardckpt.save(tmp_path / "x", {"a": 1}, options=shardckpt.Options(parity="xor:2"))
    assert not (tmp_path / "x").exists()
