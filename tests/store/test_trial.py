# SPDX-License-Identifier: Apache-2.0
"""What is found out about a place: its mount, its room, what it can do, how fast it is; and that nothing is left there."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shardckpt.errors import NotACheckpointRoot, StorageFull, StoreError
from shardckpt.root import Root
from shardckpt.store import LocalStore, MemoryStore, is_temporary
from shardckpt.store.filesystem import FileSystem
from shardckpt.store.mounts import Mount, mount_of
from shardckpt.store.trial import (
    Space,
    has_links,
    measure_speed,
    nearest_directory,
    remove_leftovers,
    seconds_to_flush,
    space_in,
    try_store,
)
from tests.store.faults import Buffered, FaultyFileSystem, WithoutLinks

MIB = 1 << 20


# ---- mounts


def mounted(path: Path | str, *lines: str | bytes) -> Mount | None:
    return mount_of(str(path), lambda: b"\n".join(os.fsencode(line) for line in lines))


ROOT_DISK = "/dev/vda / ext4 rw,relatime 0 0"


def test_a_path_is_of_the_innermost_mount(tmp_path: Path) -> None:
    table = (ROOT_DISK, f"server:/export {tmp_path} nfs4 rw,soft,timeo=100 0 0", f"none {tmp_path}-2 tmpfs rw 0 0")
    assert mounted("/", *table) == Mount("/", "/dev/vda", "ext4", ("rw", "relatime"))
    within = mounted(tmp_path / "a" / "b", *table)
    assert within == Mount(str(tmp_path), "server:/export", "nfs4", ("rw", "soft", "timeo=100"))
    assert mounted(f"{tmp_path}-3", *table) == mounted("/", *table)


def test_links_are_followed_to_the_mount(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    found = mounted(tmp_path / "link" / "run", ROOT_DISK, f"/dev/vdb {tmp_path / 'disk'} xfs rw 0 0")
    assert found is not None and found.device == "/dev/vdb"


def test_of_mounts_on_one_directory_the_last_one_counts(tmp_path: Path) -> None:
    found = mounted(tmp_path, f"systemd-1 {tmp_path} autofs rw 0 0", f"server:/e {tmp_path} nfs rw 0 0")
    assert found is not None and found.kind == "nfs"


def test_names_that_the_table_has_to_escape(tmp_path: Path) -> None:
    place = tmp_path / "a b\\c\nü"
    place.mkdir()
    escaped = os.fsencode(place).replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\n", b"\\012")
    line = b"/dev/vdb " + escaped + b" xfs rw 0 0"
    assert mounted(place, ROOT_DISK, line) == Mount(str(place), "/dev/vdb", "xfs", ("rw",))


def test_a_table_that_makes_no_sense_or_is_not_there() -> None:
    assert mounted("/", "", "one", "/dev/vda /", b"\xff\xfe \\777 \xff") is None

    def missing() -> bytes:
        raise FileNotFoundError

    assert mount_of("/", missing) is None


def test_this_machine_tells_of_its_mounts(tmp_path: Path) -> None:
    found = mount_of(str(tmp_path))
    assert found is not None and os.path.commonpath([found.point, str(tmp_path)]) == found.point
    processes = mount_of("/proc/1")
    assert processes is not None and (processes.point, processes.kind) == ("/proc", "proc")


# ---- directories, and room


def test_the_nearest_directory(tmp_path: Path) -> None:
    assert nearest_directory(str(tmp_path)) == str(tmp_path)
    assert nearest_directory(str(tmp_path / "a" / "b")) == str(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert nearest_directory(str(tmp_path / "link")) == str(tmp_path / "link")


@pytest.mark.parametrize("there", ["file", "below a file", "a link to nothing"])
def test_where_no_directory_can_be(tmp_path: Path, there: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    path = {"file": "file", "below a file": "file/run", "a link to nothing": "link"}[there]
    with pytest.raises(NotACheckpointRoot, match="is not a directory"):
        nearest_directory(str(tmp_path / path))


class Sized(FileSystem):
    """A file system of a given size; -1 stands for what it does not tell."""

    def __init__(self, blocks: int, free: int, files: int, free_files: int) -> None:
        self._values = (blocks, free, files, free_files)

    def statvfs(self, path: str) -> os.statvfs_result:
        blocks, free, files, free_files = self._values
        return os.statvfs_result((1 << 20, 4096, blocks, free + 7, free, files, free_files + 7, free_files, 0, 255))


def test_room_is_counted_in_the_units_of_the_file_system() -> None:
    """Without what is kept for the administrator."""
    assert space_in("/", Sized(1000, 300, 50, 20)) == Space(4_096_000, 1_228_800, 20)
    assert space_in("/", Sized(1000, 300, 0, 0)) == Space(4_096_000, 1_228_800, None)
    assert space_in("/", Sized(0, 0, 0, 0)) is None


def test_room_that_cannot_be_asked_for() -> None:
    with pytest.raises(StoreError, match="cannot look at '/': Stale file handle"):
        space_in("/", FaultyFileSystem().fail("statvfs", errno.ESTALE))


# ---- trials


def test_a_local_directory(tmp_path: Path) -> None:
    trial = try_store(LocalStore(tmp_path), 2 * MIB + 5000)
    assert trial.links is True
    assert trial.flush_seconds is not None and trial.flush_seconds > 0
    assert trial.speed is not None
    assert trial.speed.nbytes == 2 * MIB + 4096
    assert min(trial.speed.written, trial.speed.read) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_or_direct_io(tmp_path: Path) -> None:
    without = WithoutLinks(errno.EPERM)
    assert try_store(LocalStore(tmp_path, without), MIB, without).links is False
    buffered = Buffered()
    assert try_store(LocalStore(tmp_path, buffered), MIB, buffered).direct is False
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_for_a_file(tmp_path: Path) -> None:
    trial = try_store(LocalStore(tmp_path), MIB - 1)
    assert trial.speed is None
    assert trial.links is True


def test_a_store_without_file_system() -> None:
    store = MemoryStore(uuid.uuid4().hex)
    trial = try_store(store, MIB)
    assert (trial.direct, trial.links, trial.flush_seconds) == (None, None, None)
    assert trial.speed is not None and trial.speed.nbytes == MIB
    assert store.list() == []


def test_an_object_store(s3_endpoint: str) -> None:
    from tests.store.s3 import object_store

    store = object_store(s3_endpoint, uuid.uuid4().hex)
    speed = measure_speed(store, 6 * MIB)
    assert speed.nbytes == 6 * MIB
    assert store.list() == []


def test_a_slow_place_is_measured_with_a_small_file(tmp_path: Path) -> None:
    ticks = itertools.count(step=0.2)
    speed = measure_speed(LocalStore(tmp_path), 20 * MIB, lambda: next(ticks))
    assert speed.nbytes == 20 * MIB
    assert speed.written == pytest.approx(20 * MIB / 0.2)
    seconds = itertools.count(step=1.0)
    speed = measure_speed(LocalStore(tmp_path), 20 * MIB, lambda: next(seconds))
    assert speed.nbytes == 16 * MIB
    assert (speed.written, speed.read) == (16 * MIB, 16 * MIB)


def test_flushes_take_the_median_and_no_more_than_their_time(tmp_path: Path) -> None:
    times = [0.0, 0.9, 1.0, 1.1, 2.0, 2.3, 3.0, 4.5]
    assert seconds_to_flush(str(tmp_path), clock=iter(times).__next__) == pytest.approx(0.6)
    assert list(tmp_path.iterdir()) == []


class Liar(FaultyFileSystem):
    """Returns one wrong byte in the second piece of a file."""

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().preadv(fd, buffers, offset)
        if offset == 4 * MIB:
            buffers[0][100] ^= 1
        return count


def test_a_file_of_more_pieces_than_there_are_buffers(tmp_path: Path) -> None:
    seen = set()

    class Watched(FaultyFileSystem):
        def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            seen.add((np.frombuffer(buffers[0], np.uint8).ctypes.data, len(buffers[0])))
            return super().preadv(fd, buffers, offset)

    ticks = itertools.count(step=0.1)
    speed = measure_speed(LocalStore(tmp_path, Watched()), 54 * MIB, lambda: next(ticks))
    assert speed.nbytes == 54 * MIB
    # two rounds, each of which is timed alone
    assert speed.read == pytest.approx(54 * MIB / 0.2)
    assert len([address for address, length in seen if length == 4 * MIB]) <= 12 + 4


def test_a_device_that_returns_other_bytes(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match="returns other bytes than were written to it a moment ago, from byte 4194304"
    ) as error:
        measure_speed(LocalStore(tmp_path, Liar()), 9 * MIB)
    assert error.value.offset == 4 * MIB
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("operation", ["open", "pwrite", "fsync", "preadv", "link"])
def test_a_trial_that_fails_leaves_nothing(tmp_path: Path, operation: str) -> None:
    broken = FaultyFileSystem().fail_always(operation, errno.EIO)
    with pytest.raises(StoreError, match=r"EIO"):
        try_store(LocalStore(tmp_path, broken), 2 * MIB, broken)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    full = FaultyFileSystem().fail_always("pwrite", errno.ENOSPC)
    for attempt in (lambda: seconds_to_flush(str(tmp_path), full), lambda: measure_speed(LocalStore(tmp_path, full), MIB)):
        with pytest.raises(StorageFull):
            attempt()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_trial_leaves_is_known_to_prunes(tmp_path: Path) -> None:
    stuck = FaultyFileSystem().fail_always("unlink", errno.EIO)
    assert has_links(str(tmp_path), stuck) is True
    left = [entry.name for entry in LocalStore(tmp_path).list()]
    assert len(left) == 2
    assert all(map(is_temporary, left))
    assert [entry.name for entry in Root(LocalStore(tmp_path)).look().strays] == left


def test_what_a_killed_trial_leaves_goes_with_a_later_one(tmp_path: Path) -> None:
    names = [
        "probe.0123abcd.tmp",
        "probe.89abcdef.tmp",
        "probe.0123abcd.tmp.x",
        "probe.0123abc.tmp",
        "manifest.json.89abcdef.tmp",
    ]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    young = (tmp_path / "probe.89abcdef.tmp").stat().st_ctime - 3500
    os.utime(tmp_path / "probe.89abcdef.tmp", (young, young))
    (tmp_path / "probe.00000000.tmp").mkdir()
    (tmp_path / "probe.11111111.tmp").symlink_to("manifest.json")
    remove_leftovers(str(tmp_path))
    left = {"probe.00000000.tmp", "probe.11111111.tmp", *names[1:]}
    assert {path.name for path in tmp_path.iterdir()} == left
    os.utime(tmp_path / "probe.89abcdef.tmp", (1000, 1000))
    try_store(LocalStore(tmp_path), MIB)
    assert {path.name for path in tmp_path.iterdir()} == left - {"probe.89abcdef.tmp"}


def test_leftovers_of_others_and_those_that_cannot_be_removed_stay(tmp_path: Path) -> None:
    class Foreign(FileSystem):
        def lstat(self, path: str) -> os.stat_result:
            found = list(super().lstat(path))
            found[stat.ST_UID] += 1
            return os.stat_result(found)

    path = tmp_path / "probe.0123abcd.tmp"
    path.touch()
    os.utime(path, (1000, 1000))
    remove_leftovers(str(tmp_path), Foreign())
    remove_leftovers(str(tmp_path), FaultyFileSystem().fail_always("unlink", errno.EACCES))
    remove_leftovers(str(tmp_path / "missing"))
    assert path.exists()
