# SPDX-License-Identifier: Apache-2.0
"""The simulated disk keeps what POSIX promises, and nothing more."""

from __future__ import annotations

import os
import random

import pytest

from shardckpt.store.filesystem import FileSystem
from tests.power.crash import Crash, Image, variants
from tests.power.disk import BLOCK, Disk, FileState
from tests.power.turns import Turns
from tests.power.worlds import saves_of_ranks

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL
DATA = bytes(range(256)) * (BLOCK // 256)
TORN = DATA[: BLOCK // 2] + DATA[::-1][: BLOCK // 2]


@pytest.fixture
def disk() -> Disk:
    disk = Disk()
    disk.put("/d")
    return disk


def sync(disk: Disk, path: str) -> None:
    fd = disk.open(path, os.O_RDONLY)
    disk.fsync(fd)
    disk.close(fd)


def write(disk: Disk, path: str, data: bytes, flags: int = NEW) -> None:
    fd = disk.open(path, flags)
    disk.pwrite(fd, memoryview(data), 0)
    disk.close(fd)


def images(disk: Disk) -> set[Image]:
    """What a power cut may leave now, below "/d"."""
    nodes = [frozenset(node for node in image if node[0] != "/d") for image in Crash(disk.moments[-1]).images()]
    assert len(nodes) == Crash(disk.moments[-1]).count()
    return set(nodes)


def test_every_system_call_is_simulated() -> None:
    calls = {name for name in vars(FileSystem) if not name.startswith("_")}
    assert calls <= vars(Disk).keys()


@pytest.mark.parametrize("flags", [NEW, NEW | os.O_DIRECT])
def test_a_write_may_be_kept_lost_or_torn_and_its_size_and_name_too(disk: Disk, flags: int) -> None:
    write(disk, "/d/f", DATA, flags)
    contents = [b"", bytes(BLOCK), DATA, TORN]
    assert images(disk) == {frozenset(), *(frozenset({("/d/f", content)}) for content in contents)}


def test_a_flushed_file_keeps_its_data_and_not_its_name(disk: Disk) -> None:
    write(disk, "/d/f", DATA)
    sync(disk, "/d/f")
    assert images(disk) == {frozenset(), frozenset({("/d/f", DATA)})}


def test_a_flushed_directory_keeps_names_and_no_data(disk: Disk) -> None:
    write(disk, "/d/f", DATA)
    sync(disk, "/d")
    assert images(disk) == {frozenset({("/d/f", content)}) for content in (b"", bytes(BLOCK), DATA, TORN)}
    sync(disk, "/d/f")
    assert images(disk) == {frozenset({("/d/f", DATA)})}


def test_what_was_flushed_may_come_back_when_it_is_overwritten(disk: Disk) -> None:
    disk.put("/d/f", b"\1" * BLOCK)
    write(disk, "/d/f", DATA, os.O_WRONLY)
    assert images(disk) == {frozenset({("/d/f", content)}) for content in (b"\1" * BLOCK, DATA, TORN)}


def test_a_file_that_was_cut_may_be_long_again(disk: Disk) -> None:
    disk.put("/d/f", DATA)
    fd = disk.open("/d/f", os.O_WRONLY)
    disk.ftruncate(fd, 3)
    found = {content for image in images(disk) for _, content in image if content is not None}
    assert {len(content) for content in found} == {3, BLOCK}
    assert {DATA[:3], DATA} <= found
    disk.fsync(fd)
    assert images(disk) == {frozenset({("/d/f", DATA[:3])})}


def test_a_rename_may_leave_both_names_or_none_but_never_half_a_target(disk: Disk) -> None:
    disk.put("/d/old", b"new")
    disk.put("/d/target", b"before")
    disk.rename("/d/old", "/d/target")
    old, before, after = ("/d/old", b"new"), ("/d/target", b"before"), ("/d/target", b"new")
    assert images(disk) == {frozenset({old, before}), frozenset({old, after}), frozenset({before}), frozenset({after})}
    sync(disk, "/d")
    assert images(disk) == {frozenset({after})}


def test_two_names_have_one_content(disk: Disk) -> None:
    write(disk, "/d/f", DATA)
    disk.link("/d/f", "/d/g")
    both = [dict(image) for image in images(disk) if len(image) == 2]
    assert len(both) == 4
    assert all(image["/d/f"] == image["/d/g"] for image in both)


def test_what_is_in_a_directory_goes_with_its_name(disk: Disk) -> None:
    disk.mkdir("/d/e")
    write(disk, "/d/e/f", DATA)
    sync(disk, "/d/e/f")
    sync(disk, "/d/e")
    directory, file = ("/d/e", None), ("/d/e/f", DATA)
    assert images(disk) == {frozenset(), frozenset({directory, file})}
    sync(disk, "/d")
    disk.unlink("/d/e/f")
    disk.rmdir("/d/e")
    assert images(disk) == {frozenset(), frozenset({directory}), frozenset({directory, file})}
    sync(disk, "/d")
    assert images(disk) == {frozenset()}


def test_of_a_long_file_one_block_at_a_time_is_lost_or_torn() -> None:
    blocks = tuple(bytes([number + 1]) * BLOCK for number in range(6))
    found = variants(FileState(blocks=blocks, sizes=(0, 6 * BLOCK)))
    whole = b"".join(blocks)
    assert {whole, b"", bytes(6 * BLOCK)} <= set(found)
    assert len(found) == 3 + 6 * 2
    assert len(variants(FileState(blocks=blocks[:2], sizes=(0, 2 * BLOCK)))) == 1 + 3 * 3


def test_samples_are_among_all_images(disk: Disk) -> None:
    for name in "abc":
        write(disk, f"/d/{name}", DATA)
    crash = Crash(disk.moments[-1])
    every = set(crash.images())
    assert len(every) == 5**3
    samples = set(crash.sample(random.Random(0), 2000))
    assert samples <= every
    assert len(samples) > 100


def test_ranks_take_turns_as_the_seed_says() -> None:
    def calls(seed: int) -> list[str]:
        disk = Disk()
        disk.put("/disk")
        saves_of_ranks(disk, world_size=3, seed=seed, steps=1)
        return [moment.call for moment in disk.moments]

    assert calls(1) == calls(1) != calls(2)


def test_a_task_that_fails_is_heard_of() -> None:
    turns = Turns(0)

    def fail() -> None:
        raise OSError("first")

    with pytest.raises(OSError, match="first"):
        turns.run([fail, lambda: turns.pass_on(lambda: False)])
