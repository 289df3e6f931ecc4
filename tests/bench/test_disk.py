# SPDX-License-Identifier: Apache-2.0
"""The page cache, the raw disk, and facts about the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardckpt.bench.disk import (
    cached_pages,
    drop_from_cache,
    empty,
    file_system_of,
    files_under,
    read_into_cache,
    takes_direct,
)
from shardckpt.bench.machine import describe_machine
from shardckpt.bench.raw import RawDisk, Way
from tests.ranks import RankPool


def test_files_leave_and_enter_the_page_cache(tmp_path: Path) -> None:
    if file_system_of(str(tmp_path))[0] in ("tmpfs", "overlay"):
        pytest.skip("its files are never out of memory, or are those of another file system")
    path = tmp_path / "below" / "file"
    path.parent.mkdir()
    path.write_bytes(os.urandom(1 << 20))
    drop_from_cache(str(tmp_path))
    assert cached_pages(str(path)) == 0
    read_into_cache(str(tmp_path))
    assert cached_pages(str(path)) == 256


def test_a_folder_is_emptied(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/x", "a/b/x"):
        (tmp_path / name).write_bytes(b"1")
    assert len(files_under(str(tmp_path))) == 3
    empty(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_facts_about_the_machine(tmp_path: Path) -> None:
    machine = describe_machine(str(tmp_path))
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28
    assert machine.file_system in str(machine)
    assert list(tmp_path.iterdir()) == []


# run on ranks


def write_raw(folder: str, nbytes: int) -> None:
    disk = RawDisk(folder, nbytes)
    for threads in (1, 3):
        for direct in {False, takes_direct(folder)}:
            disk.write(0, Way(threads, direct, chunk=8192))


def read_raw(folder: str) -> list[int]:
    """Raw reads say nothing of what they have read; this counts the calls by how many bytes the process asked for."""
    counts = []
    disk = RawDisk(folder, 0)
    for direct in {False, takes_direct(folder)}:
        before = int(Path("/proc/self/io").read_text().split()[1])
        disk.read(0, Way(2, direct, chunk=8192))
        counts.append(int(Path("/proc/self/io").read_text().split()[1]) - before)
    return counts


@pytest.mark.slow
def test_raw_bytes_go_out_and_come_back_on_any_world_size(tmp_path: Path, ranks: RankPool) -> None:
    ranks.run(2, write_raw, str(tmp_path), 100_001)
    assert [os.stat(path).st_size for path in files_under(str(tmp_path))] == [102_400, 102_400]
    for world_size in (1, 2, 3):
        for counts in ranks.run(world_size, read_raw, str(tmp_path)):
            assert all(204_800 / world_size - 4096 <= count <= 204_800 / world_size + 16_384 for count in counts)
