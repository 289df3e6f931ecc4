# SPDX-License-Identifier: Apache-2.0
"""What is peculiar to a directory: file types, O_DIRECT, short transfers, order of flushes, empty directories."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from shardckpt.errors import MissingFile, NotACheckpointRoot, StoreError, TruncatedFile
from shardckpt.store import ALIGNMENT, LocalStore
from tests.store.faults import Buffered, FaultyFileSystem, WithoutLinks, opened_flags
from tests.store.helpers import aligned, load_file, names, some_bytes, store_file


@pytest.fixture
def fs() -> FaultyFileSystem:
    return FaultyFileSystem()


@pytest.fixture
def store(tmp_path: Path, fs: FaultyFileSystem) -> LocalStore:
    return LocalStore(tmp_path / "root", fs)


def test_the_root_is_made_at_the_first_write_only(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "not" / "yet")
    assert names(store) == []
    store.delete("step-1/file")
    with pytest.raises(MissingFile):
        store.get("step-1/file", 1)
    assert not (tmp_path / "not").exists()
    store_file(store, "step-1/file", b"data")
    assert (tmp_path / "not" / "yet" / "step-1" / "file").read_bytes() == b"data"


def test_a_relative_root_stays_where_it_was(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        store = LocalStore("root")
    finally:
        os.chdir(before)
    store.put_if_absent("file", b"")
    assert (tmp_path / "root" / "file").exists()


@pytest.mark.parametrize("code", [None, errno.EPERM])
def test_what_is_revoked_between_the_look_and_the_name_fails(tmp_path: Path, code: int | None) -> None:
    """On file systems with hard links, and without. Nothing else in the directory is touched."""
    fs = FaultyFileSystem() if code is None else WithoutLinks(code)
    store = LocalStore(tmp_path, fs)
    beside = ["step-1/manifest.json.abc.tmp", "step-1/manifest_json.01234567.tmp", "step-1/manifest_json.claim.tmp"]
    for name in beside:
        store_file(store, name, b"")
    with pytest.raises(MissingFile):
        store.put_if_allowed("step-1/manifest.json", b"data", lambda: store.revoke("step-1/manifest.json"))
    assert names(store) == sorted(beside)


def test_new_files_follow_the_umask(store: LocalStore, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store_file(store, "file", b"data")
        store.put_if_absent("manifest.json", b"data")
    finally:
        os.umask(before)
    for name in ("file", "manifest.json"):
        assert stat.S_IMODE((tmp_path / "root" / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["symbolic link", "FIFO", "socket", "directory", "character device"])
def test_only_regular_files_are_read(store: LocalStore, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    path = root / "file"
    store.put_if_absent("real", b"data")
    if kind == "symbolic link":
        path.symlink_to(root / "real")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(os.path.relpath(path))
    elif kind == "directory":
        path.mkdir()
    else:
        store, path = LocalStore("/dev"), Path("/dev/null")
    with pytest.raises(StoreError, match=f"'{path}'.* is a .*{kind}"):
        store.open(path.name)
    assert "file" not in names(LocalStore(root))


def test_a_link_in_the_place_of_a_new_file_is_not_followed(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").symlink_to(tmp_path / "elsewhere")
    for write in (lambda: store_file(store, "file", b"data"), lambda: store.put_if_absent("file", b"data")):
        with pytest.raises(StoreError):
            write()
    assert not (tmp_path / "elsewhere").exists()


def test_a_listing_neither_follows_links_nor_shows_unspeakable_names(store: LocalStore, tmp_path: Path) -> None:
    store.put_if_absent("step-1/file", b"data")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "bad\nname").touch()
    (tmp_path / "root" / os.fsdecode(b"not-utf8-\xff")).touch()
    (tmp_path / "root" / "empty").mkdir()
    assert names(store) == ["step-1/file"]


def test_a_file_that_goes_during_a_listing_is_left_out(store: LocalStore, fs: FaultyFileSystem) -> None:
    store.put_if_absent("a", b"")
    store.put_if_absent("b", b"")
    fs.fail("lstat", errno.ENOENT)
    assert len(names(store)) == 1


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("mine")
    store = LocalStore(tmp_path / "root")
    operations = [
        lambda: store.create("step-1/file", 1),
        lambda: store.open("step-1/file"),
        lambda: store.put_if_absent("manifest.json", b""),
        lambda: store.list(),
        lambda: store.list("step-1"),
        lambda: store.delete("step-1/file"),
    ]
    for operation in operations:
        with pytest.raises(NotACheckpointRoot, match="not a directory but a file"):
            operation()
    assert (tmp_path / "root").read_text() == "mine"


def test_a_root_that_is_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").symlink_to(tmp_path / "unmounted")
    with pytest.raises(NotACheckpointRoot, match="a link to nothing"):
        LocalStore(tmp_path / "root").put_if_absent("manifest.json", b"")


def test_a_root_may_be_a_link_to_a_directory(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    store_file(LocalStore(tmp_path / "root"), "step-1/file", b"data")
    assert (tmp_path / "disk" / "step-1" / "file").read_bytes() == b"data"


def test_deleting_the_last_file_removes_its_directories_but_not_the_root(store: LocalStore, tmp_path: Path) -> None:
    store.put_if_absent("a/b/file", b"")
    store.put_if_absent("a/file", b"")
    store.delete("a/b/file")
    assert sorted(p.name for p in (tmp_path / "root" / "a").iterdir()) == ["file"]
    store.delete("a/file")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_delete_that_was_cut_short_is_finished_by_the_next(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "root" / "step-1").mkdir(parents=True)
    store.delete("step-1/file")
    assert not (tmp_path / "root" / "step-1").exists()


def test_create_goes_on_when_its_directory_is_removed_meanwhile(store: LocalStore, fs: FaultyFileSystem) -> None:
    store.put_if_absent("step-1/first", b"")
    fs.fail("open", errno.ENOENT).fail("stat", errno.ENOENT, nth=1).fail("lstat", errno.ENOENT)
    store.put_if_absent("step-1/file", b"data")
    assert store.get("step-1/file", 4) == b"data"


def test_create_gives_up_when_its_directory_never_stays(store: LocalStore, fs: FaultyFileSystem) -> None:
    fs.fail_always("open", errno.ENOENT)
    with pytest.raises(StoreError, match="removed 20 times"):
        store.put_if_absent("step-1/file", b"data")


def test_files_are_written_with_o_direct_where_it_works(store: LocalStore, fs: FaultyFileSystem) -> None:
    try:
        fd = os.open(store.url + "-probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    except OSError:
        pytest.skip("the file system of the temporary directory does not take O_DIRECT")
    os.close(fd)
    store_file(store, "file", some_bytes(ALIGNMENT + 1))
    writes = [flags for flags in opened_flags(fs) if flags & os.O_WRONLY]
    assert writes and all(flags & os.O_DIRECT for flags in writes)
    assert load_file(store, "file") == some_bytes(ALIGNMENT + 1)


def test_without_o_direct_files_are_buffered_and_the_log_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = LocalStore(tmp_path / "root", Buffered())
    with caplog.at_level(logging.INFO, "shardckpt"):
        for name in ("a", "b"):
            store_file(store, name, some_bytes(ALIGNMENT + 1))
    assert [record.getMessage() for record in caplog.records if "O_DIRECT" in record.getMessage()] == [
        f"{tmp_path / 'root'} does not take O_DIRECT: writing through the page cache, more slowly"
    ]
    assert load_file(store, "b") == some_bytes(ALIGNMENT + 1)
    assert names(store) == ["a", "b"]


def test_an_error_of_the_probe_that_is_not_about_o_direct_is_raised(store: LocalStore, fs: FaultyFileSystem) -> None:
    fs.fail("pwrite", errno.ENOSPC)
    with pytest.raises(StoreError, match="ENOSPC"):
        store.create("file", 1)
    assert names(store) == []


@pytest.mark.parametrize("count", [1, 1000, ALIGNMENT])
def test_short_transfers_are_resumed(tmp_path: Path, count: int) -> None:
    data = some_bytes(2 * ALIGNMENT + 500)
    store = LocalStore(tmp_path / "root", Buffered().transfer_at_most(count))
    store_file(store, "file", data)
    store.put_if_absent("small", data)
    assert load_file(store, "file") == load_file(store, "small") == data
    buffers = [bytearray(n) for n in (1, 0, 3000, 7, 600)]
    with store.open("file") as reader:
        reader.read_at(11, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data[11 : 11 + 3608]


def test_a_short_direct_write_is_resumed_on_a_block_boundary(store: LocalStore, fs: FaultyFileSystem) -> None:
    data = some_bytes(4 * ALIGNMENT)

    def stop_inside_a_block(fd: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(fd, buffer[: 2 * ALIGNMENT], offset) - 700

    with store.create("file", len(data)) as writer:
        fs.replace("pwrite", stop_inside_a_block)
        writer.write_at(0, aligned(data))
        writer.finish()
    assert load_file(store, "file") == data


def test_a_write_that_makes_no_progress_is_an_error(store: LocalStore, fs: FaultyFileSystem) -> None:
    with store.create("file", ALIGNMENT) as writer:
        fs.transfer_at_most(0)
        with pytest.raises(StoreError, match="EIO"):
            writer.write_at(0, aligned(bytes(ALIGNMENT)))


def test_more_buffers_than_one_call_takes(store: LocalStore) -> None:
    data = some_bytes(5000)
    store.put_if_absent("file", data)
    buffers = [bytearray(1) for _ in range(5000)]
    with store.open("file") as reader:
        reader.read_at(0, [memoryview(buffer) for buffer in buffers])
    assert b"".join(buffers) == data


def test_a_file_cut_after_open_is_named(store: LocalStore, tmp_path: Path) -> None:
    store.put_if_absent("step-1/file", some_bytes(1000))
    with store.open("step-1/file") as reader:
        os.truncate(tmp_path / "root" / "step-1" / "file", 300)
        with pytest.raises(TruncatedFile, match="step-1/file") as caught:
            reader.read_at(100, [memoryview(bytearray(50)), memoryview(bytearray(800))])
    assert (caught.value.wanted, caught.value.got) == (850, 200)


def test_a_finish_flushes_the_file_before_each_directory_above_it(store: LocalStore, fs: FaultyFileSystem) -> None:
    with store.create("a/b/file", 1) as writer:
        writer.write_at(0, aligned(b"x"))
        start = len(fs.calls)
        writer.finish()
    root = Path(store.url)
    directories = [root / "a/b", root / "a", root, *_below_mount_point(root.parent)]
    assert [name for name in fs.names()[start:] if name not in ("open", "stat")] == [
        *("ftruncate", "fsync", "close"),
        *(len(directories) * ["fsync", "close"]),
    ]
    assert [args[0] for name, args in fs.calls[start:] if name == "open"] == list(map(str, directories))


def test_what_is_above_the_root_is_flushed_once_and_again_when_it_was_removed(store: LocalStore, fs: FaultyFileSystem) -> None:
    above = str(Path(store.url).parent)
    for name in ("a", "b"):
        store.put_if_absent(name, b"")
    assert [args[0] for call, args in fs.calls if call == "open"].count(above) == 1
    shutil.rmtree(store.url)
    for name in ("a", "b"):
        store.put_if_absent(name, b"")
    assert [args[0] for call, args in fs.calls if call == "open"].count(above) == 2


def test_a_file_that_another_has_put_is_made_durable(store: LocalStore, fs: FaultyFileSystem) -> None:
    store.put_if_absent("a/file", b"")
    start = len(fs.calls)
    store.make_durable("a/file")
    assert [args[0] for call, args in fs.calls[start:] if call == "open"] == [f"{store.url}/a", store.url]
    with pytest.raises(MissingFile):
        store.make_durable("a/other")
    fs.fail("fsync", errno.EIO)
    with pytest.raises(StoreError, match="flush directory"):
        store.make_durable("a/file")


def _below_mount_point(directory: Path) -> list[Path]:
    """``directory`` and those above it, up to where its file system is mounted."""
    if os.path.ismount(directory):
        return [directory]
    return [directory, *_below_mount_point(directory.parent)]


def test_a_directory_that_cannot_be_flushed_at_all_is_no_error(store: LocalStore, fs: FaultyFileSystem) -> None:
    with store.create("step-1/file", 0) as writer:
        fs.fail("fsync", errno.EINVAL, nth=2)
        writer.finish()
    assert names(store) == ["step-1/file"]


def test_the_directory_above_the_root_need_not_be_ours(store: LocalStore, fs: FaultyFileSystem) -> None:
    os.mkdir(store.url)
    with store.create("file", 0) as writer:
        fs.fail("open", errno.EACCES, nth=2)
        writer.finish()
    assert names(store) == ["file"]
