# SPDX-License-Identifier: Apache-2.0
"""Errors and sudden death at every system call: what is reported, what is left, and that nothing earlier is harmed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shardckpt.errors import CheckpointError, StorageFull, StoreError, TruncatedFile
from shardckpt.store import ALIGNMENT, LocalStore, is_temporary
from tests.store.faults import Buffered, FaultyFileSystem, Killed, WithoutLinks
from tests.store.helpers import aligned, load_file, names, read_all, replace_file, some_bytes, store_file, write

KINDS = [
    (errno.ENOSPC, StorageFull, "prune older checkpoints"),
    (errno.EDQUOT, StorageFull, "prune older checkpoints"),
    (errno.EIO, StoreError, "system log"),
    (errno.EACCES, StoreError, "no permission"),
    (errno.EROFS, StoreError, "read-only"),
    (errno.EMFILE, StoreError, "ulimit -n"),
    (errno.EREMCHG, StoreError, "no more detail"),
]
NEW = some_bytes(2 * ALIGNMENT + 5, seed=1)
OLD = some_bytes(ALIGNMENT + 7, seed=2)


@pytest.fixture
def fs() -> FaultyFileSystem:
    return FaultyFileSystem()


@pytest.fixture
def store(tmp_path: Path, fs: FaultyFileSystem) -> LocalStore:
    store = LocalStore(tmp_path / "root", fs)
    store_file(store, "step-1/file", OLD)
    return store


@pytest.mark.parametrize(("code", "kind", "advice"), KINDS)
@pytest.mark.parametrize("operation", ["pwrite", "ftruncate", "fsync", "close"])
def test_a_failed_save_is_explained_and_leaves_nothing(
    store: LocalStore, fs: FaultyFileSystem, operation: str, code: int, kind: type[StoreError], advice: str
) -> None:
    with pytest.raises(kind, match=advice) as caught, store.create("step-2/file", len(NEW)) as writer:
        fs.fail(operation, code)
        write(writer, NEW)
        writer.finish()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == code
    assert f"'{store.url}/step-2/file'" in caught.value.message
    assert errno.errorcode[code] in caught.value.message
    assert caught.value.errno == errno.errorcode[code]
    assert names(store) == ["step-1/file"]
    assert not Path(store.url, "step-2").exists()
    assert load_file(store, "step-1/file") == OLD


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failed_flush_is_never_tried_again(store: LocalStore, fs: FaultyFileSystem, nth: int) -> None:
    with store.create("step-2/file", len(NEW)) as writer:
        write(writer, NEW)
        fs.fail("fsync", errno.EIO, nth)
        before = fs.names().count("fsync")
        with pytest.raises(StoreError, match="EIO"):
            writer.finish()
        assert fs.names().count("fsync") == before + nth
        with pytest.raises(StoreError, match="its writer is failed"):
            writer.finish()


def test_an_abort_that_fails_is_logged_and_does_not_hide_the_error(
    store: LocalStore, fs: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StorageFull), store.create("step-2/file", len(NEW)) as writer:
        fs.fail("pwrite", errno.ENOSPC).fail("unlink", errno.EIO).fail("close", errno.EIO)
        write(writer, NEW)
    assert "step-2/file" in caplog.text and "left behind" in caplog.text


@pytest.mark.parametrize("operation", ["mkdir", "open", "pwrite", "fsync", "close", "link"])
def test_a_failed_put_leaves_no_name(store: LocalStore, fs: FaultyFileSystem, operation: str) -> None:
    fs.fail(operation, errno.EIO)
    with pytest.raises(StoreError, match="EIO"):
        store.put_if_absent("step-2/manifest.json", NEW)
    assert names(store) == ["step-1/file"]
    store.put_if_absent("step-2/manifest.json", NEW)
    assert load_file(store, "step-2/manifest.json") == NEW


def test_a_put_is_not_reported_when_its_name_was_not_flushed(store: LocalStore, fs: FaultyFileSystem) -> None:
    fs.fail("fsync", errno.EIO, nth=2)
    with pytest.raises(StoreError, match="flush directory"):
        store.put_if_absent("step-1/manifest.json", NEW)


def test_a_temporary_file_that_stays_is_logged(
    store: LocalStore, fs: FaultyFileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    fs.fail("unlink", errno.EIO)
    store.put_if_absent("step-2/manifest.json", NEW)
    [left] = [name for name in names(store, "step-2") if is_temporary(name)]
    assert left in caplog.text


@pytest.mark.parametrize(
    ("operation", "act"),
    [
        ("preadv", lambda store: load_file(store, "step-1/file")),
        ("open", lambda store: store.open("step-1/file")),
        ("fstat", lambda store: store.open("step-1/file")),
        ("listdir", lambda store: store.list("step-1")),
        ("lstat", lambda store: store.list()),
        ("unlink", lambda store: store.delete("step-1/file")),
        ("fsync", lambda store: store.delete("step-1/file")),
        ("rmdir", lambda store: store.delete("step-1/file")),
    ],
)
def test_errors_of_other_operations(
    store: LocalStore, fs: FaultyFileSystem, operation: str, act: Callable[[LocalStore], object]
) -> None:
    fs.fail(operation, errno.EIO)
    with pytest.raises(StoreError, match=r"cannot .*step-1.*EIO"):
        act(store)


def test_opened_files_are_closed_when_they_are_refused(store: LocalStore, fs: FaultyFileSystem) -> None:
    Path(store.url, "directory").mkdir()
    with pytest.raises(StoreError):
        store.open("directory")
    assert fs.names()[-1] == "close"


def test_a_hint_never_fails(store: LocalStore, fs: FaultyFileSystem) -> None:
    fs.fail("expect_ascending", errno.EINVAL)
    with store.open("step-1/file") as reader:
        reader.expect_ascending()


@pytest.mark.parametrize("file_system", [FaultyFileSystem, Buffered, WithoutLinks])
def test_a_kill_before_any_system_call_leaves_all_or_nothing(
    tmp_path: Path, file_system: Callable[[], FaultyFileSystem]
) -> None:
    """Save, publish, replace: after a kill at each call in turn, the manifest is whole or absent, and so is its file."""
    calls = 0
    finished = False
    after = LocalStore(tmp_path, FaultyFileSystem())
    store_file(after, "step-1/file", OLD)
    while not finished:
        try:
            _save(LocalStore(tmp_path, file_system().die_after(calls)))
            finished = True
        except Killed:
            calls += 1
        assert load_file(after, "step-1/file") == OLD
        if "step-2/manifest.json" in names(after):
            assert load_file(after, "step-2/manifest.json") == b"manifest"
            assert load_file(after, "step-2/file") == NEW
        _clean(after)
        _save(after)
        _clean(after)
    assert calls > 30


def _save(store: LocalStore) -> None:
    with store.create("step-2/file", len(NEW)) as writer:
        writer.write_at(0, aligned(NEW))
        writer.finish()
    store.put_if_absent("step-2/manifest.json", b"manifest")


def _clean(store: LocalStore) -> None:
    for name in names(store):
        if name.startswith("step-2") or is_temporary(name):
            store.delete(name)


def test_all_errors_carry_plain_details(store: LocalStore, fs: FaultyFileSystem) -> None:
    fs.fail("open", errno.EIO)
    with pytest.raises(CheckpointError) as caught:
        store.open("step-1/file")
    assert caught.value.details == {"operation": "open", "path": f"{store.url}/step-1/file", "errno": "EIO"}


def test_a_replacement_is_the_old_file_or_the_new_one_when_it_is_killed_at_any_call(tmp_path: Path) -> None:
    seen = []
    for calls in range(100):
        fs = FaultyFileSystem()
        store = LocalStore(tmp_path / str(calls), fs)
        store_file(store, "step-1/file", OLD)
        fs.die_after(calls)
        try:
            replace_file(store, "step-1/file", NEW)
        except Killed:
            seen.append(load_file(LocalStore(store.url), "step-1/file"))
        else:
            assert load_file(LocalStore(store.url), "step-1/file") == NEW
            break
    changed = seen.index(NEW)
    assert seen == [OLD] * changed + [NEW] * (len(seen) - changed)
    assert changed > 5


# ---- reads past the page cache


class ReadsDirectly(FaultyFileSystem):
    """Notes which reads go past the page cache."""

    def __init__(self) -> None:
        super().__init__()
        self.direct: set[int] = set()
        self.past: list[bool] = []
        self.forgotten = 0

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        # without the flag where the tests run on a file system that does not take it
        fd = super().open(path, flags & ~os.O_DIRECT, mode)
        (self.direct.add if flags & os.O_DIRECT else self.direct.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.past.append(fd in self.direct)
        return super().preadv(fd, buffers, offset)

    def forget(self, fd: int) -> None:
        self.forgotten += 1
        super().forget(fd)


@pytest.mark.parametrize("size", [0, 1, ALIGNMENT, 3 * ALIGNMENT + 5])
def test_reads_past_the_page_cache(tmp_path: Path, size: int) -> None:
    fs = ReadsDirectly()
    store = LocalStore(tmp_path, fs)
    data = some_bytes(size)
    store_file(store, "file", data)
    with store.open_uncached("file") as reader:
        fs.past.clear()
        assert read_all(reader) == data
    assert set(fs.past) == ({True} if size else set())
    assert fs.forgotten == 0


@pytest.mark.parametrize("operation", ["open", "preadv"])
@pytest.mark.parametrize("can_forget", [True, False])
def test_a_file_system_without_direct_reads_is_asked_to_forget(tmp_path: Path, operation: str, can_forget: bool) -> None:
    """Some refuse the flag, and some only the reads."""
    fs = ReadsDirectly()
    store = LocalStore(tmp_path, fs)
    store_file(store, "file", NEW)
    fs.fail(operation, errno.EINVAL)
    if not can_forget:
        fs.fail("forget", errno.ESPIPE)
    with store.open_uncached("file") as reader:
        fs.past.clear()
        assert read_all(reader) == NEW
    assert set(fs.past) == {False}
    assert fs.names().count("forget") == 1


@pytest.mark.parametrize("operation", ["open", "preadv"])
def test_other_errors_of_direct_reads_are_explained(tmp_path: Path, operation: str) -> None:
    fs = ReadsDirectly()
    store = LocalStore(tmp_path, fs)
    store_file(store, "file", NEW)
    fs.fail(operation, errno.EIO)
    with pytest.raises(StoreError, match="EIO"):
        store.open_uncached("file")


@pytest.mark.parametrize("size", [len(NEW), 2 * ALIGNMENT])
def test_direct_reads_go_on_after_short_ones(tmp_path: Path, size: int) -> None:
    """With a whole block, as they have begun."""
    fs = ReadsDirectly()
    store = LocalStore(tmp_path, fs)
    store_file(store, "file", NEW)
    with store.open_uncached("file") as reader:
        fs.transfer_at_most(ALIGNMENT + 100)
        found = aligned(bytes(size))[:size]
        reader.read_at(0, [found])
    assert found == NEW[:size]
    offsets = [args[2] for name, args in fs.calls if name == "preadv"]
    assert len(offsets) > 2
    assert not [offset for offset in offsets if offset % ALIGNMENT]


@pytest.mark.parametrize("size", [len(NEW), 2 * ALIGNMENT])
def test_a_file_that_is_cut_while_it_is_read_directly(tmp_path: Path, size: int) -> None:
    store = LocalStore(tmp_path, ReadsDirectly())
    store_file(store, "file", NEW)
    with store.open_uncached("file") as reader:
        os.truncate(tmp_path / "file", ALIGNMENT)
        with pytest.raises(TruncatedFile) as caught:
            reader.read_at(0, [aligned(bytes(size))[:size]])
    assert (caught.value.wanted, caught.value.got) == (size, ALIGNMENT)
