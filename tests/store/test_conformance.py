# SPDX-License-Identifier: Apache-2.0
"""Every store keeps the contract in ``shardckpt/store/base.py``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import AlreadyExists, CheckpointError, MissingFile, StoreError, TruncatedFile
from shardckpt.store import ALIGNMENT, FileReader, LocalStore, Store, check_name, is_temporary
from tests.store.helpers import aligned, in_threads, load_file, names, read_all, replace_file, some_bytes, store_file, write

BAD_NAMES = ["", "/a", "a//b", "a/", "..", "a/../b", ".", "./a", "a\0b", "a\nb", "a\x1bb", "a\\b", "a\u202eb", "\ud800"]
SIZES = [0, 1, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 5 * ALIGNMENT + 17]
WAYS: dict[str, Callable[[Store, str], FileReader]] = {
    "open": lambda store, name: store.open(name),
    "open_uncached": lambda store, name: store.open_uncached(name),
}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_by_every_operation(store: Store, name: str) -> None:
    operations = [
        lambda: store.create(name, 1),
        lambda: store.replace(name, 1),
        lambda: store.open(name),
        lambda: store.open_uncached(name),
        lambda: store.get(name, 1),
        lambda: store.put_if_absent(name, b""),
        lambda: store.put_if_allowed(name, b"", lambda: None),
        lambda: store.delete(name),
        *([lambda: store.list(name)] if name else []),
    ]
    for operation in operations:
        with pytest.raises(StoreError, match="is refused"):
            operation()


@given(st.text())
def test_a_name_that_is_taken_stays_under_the_root(name: str) -> None:
    try:
        check_name(name)
    except StoreError:
        return
    path = os.path.join("/store", name)
    assert os.path.normpath(path) == path
    assert path.startswith("/store/")


@pytest.mark.parametrize("name", ["manifest.json", "step-1/a b", "step-1/größe.~1%41", "a/b/c/d", "a+b&c=d#?"])
def test_good_names_come_back_from_a_listing(store: Store, name: str) -> None:
    store.put_if_absent(name, b"data")
    assert names(store) == [name]
    assert store.get(name, 4) == b"data"


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_out_of_order_is_read_back(store: Store, size: int) -> None:
    data = some_bytes(size)
    store_file(store, "step-1/rank-0", data)
    assert load_file(store, "step-1/rank-0") == data
    with store.open_uncached("step-1/rank-0") as reader:
        assert (reader.name, reader.size) == ("step-1/rank-0", size)
        assert read_all(reader) == data
    assert [entry.size for entry in store.list()] == [size]


def test_threads_write_and_read_one_file_at_once(store: Store) -> None:
    data = some_bytes(16 * ALIGNMENT + 100)
    view = aligned(data)
    with store.create("file", len(data)) as writer:
        in_threads(17, lambda i: writer.write_at(i * ALIGNMENT, view[i * ALIGNMENT : (i + 1) * ALIGNMENT]))
        writer.finish()
    with store.open("file") as reader:

        def read(i: int) -> bytes:
            part = bytearray(min(ALIGNMENT, len(data) - i * ALIGNMENT))
            reader.read_at(i * ALIGNMENT, [memoryview(part)])
            return bytes(part)

        assert b"".join(in_threads(17, read)) == data


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("offset", [7, 0, ALIGNMENT, ALIGNMENT - 1])
def test_read_fills_scattered_buffers(store: Store, offset: int, way: str) -> None:
    data = some_bytes(3 * ALIGNMENT)
    store.put_if_absent("file", data)
    buffers = [bytearray(n) for n in (3, 0, ALIGNMENT, 500, 1, 0)]
    with WAYS[way](store, "file") as reader:
        reader.expect_ascending()
        reader.read_at(offset, [memoryview(buffer) for buffer in buffers])
        reader.read_at(3 * ALIGNMENT, [])
    assert b"".join(buffers) == data[offset : offset + 504 + ALIGNMENT]


@pytest.mark.parametrize("size", [2 * ALIGNMENT, 3 << 20])
def test_what_is_read_past_caches_may_go_to_aligned_memory_or_not(store: Store, size: int) -> None:
    data = some_bytes((4 << 20) + 5)
    store.put_if_absent("file", data)
    with store.open_uncached("file") as reader:
        for view in (aligned(bytes(size)), memoryview(bytearray(size + 1))[1:], aligned(bytes(size))[: size - 3]):
            reader.read_at(ALIGNMENT, [view])
            assert view == data[ALIGNMENT : ALIGNMENT + view.nbytes]
        end = memoryview(bytearray(5 + ALIGNMENT))
        reader.read_at(len(data) - end.nbytes, [end])
        assert end == data[-end.nbytes :]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("offset", "length", "got"), [(0, 101, 100), (90, 20, 10), (200, 1, 0)])
def test_read_past_the_end_names_what_is_missing(store: Store, offset: int, length: int, got: int, way: str) -> None:
    store.put_if_absent("step-1/file", some_bytes(100))
    with WAYS[way](store, "step-1/file") as reader, pytest.raises(TruncatedFile, match="step-1/file") as caught:
        reader.read_at(offset, [memoryview(bytearray(length))])
    assert (caught.value.wanted, caught.value.got, caught.value.offset) == (length, got, offset)


@pytest.mark.parametrize("way", WAYS)
def test_close_of_a_reader_can_be_repeated(store: Store, way: str) -> None:
    store.put_if_absent("file", b"data")
    reader = WAYS[way](store, "file")
    reader.close()
    reader.close()


@pytest.mark.parametrize(("offset", "length"), [(1, ALIGNMENT), (0, 100), (-ALIGNMENT, ALIGNMENT), (8192, ALIGNMENT)])
def test_writes_off_the_grid_or_the_file_are_refused(store: Store, offset: int, length: int) -> None:
    with store.create("file", ALIGNMENT + 1) as writer, pytest.raises(StoreError, match="multiples of 4096"):
        writer.write_at(offset, aligned(bytes(ALIGNMENT))[:length])


def test_a_file_with_bytes_missing_cannot_be_finished(store: Store) -> None:
    with store.create("file", 2 * ALIGNMENT) as writer:
        writer.write_at(ALIGNMENT, aligned(bytes(ALIGNMENT)))
        with pytest.raises(StoreError, match="4096 of 8192 bytes"):
            writer.finish()
    assert names(store) == []


def test_leaving_without_finish_removes_the_file(store: Store) -> None:
    with store.create("step-1/quiet", 10) as writer:
        write(writer, bytes(10))
    with pytest.raises(ZeroDivisionError), store.create("step-1/loud", 10) as writer:
        write(writer, bytes(10))
        raise ZeroDivisionError
    assert names(store) == []
    store_file(store, "step-1/quiet", b"the name is free again")


def test_a_finished_file_outlives_abort(store: Store) -> None:
    with store.create("file", 5) as writer:
        write(writer, b"01234")
        writer.finish()
        writer.abort()
    assert load_file(store, "file") == b"01234"


def test_a_writer_that_ended_takes_nothing_more(store: Store) -> None:
    finished = store.create("finished", 0)
    finished.finish()
    aborted = store.create("aborted", 0)
    aborted.abort()
    aborted.abort()
    for writer in (finished, aborted):
        with pytest.raises(StoreError, match="its writer is"):
            writer.write_at(0, memoryview(b""))
        with pytest.raises(StoreError, match="its writer is"):
            writer.finish()


def test_create_never_touches_an_existing_file(store: Store) -> None:
    store_file(store, "step-1/file", b"old")
    with pytest.raises(AlreadyExists, match="step-1/file"):
        store.create("step-1/file", 3)
    assert load_file(store, "step-1/file") == b"old"


@pytest.mark.parametrize("size", SIZES)
def test_a_replacement_shows_when_it_is_whole_and_not_before(store: Store, size: int) -> None:
    store_file(store, "step-1/file", b"old")
    with store.open("step-1/file") as before, store.replace("step-1/file", size) as writer:
        write(writer, some_bytes(size))
        assert load_file(store, "step-1/file") == b"old"
        assert [entry.size for entry in store.list() if not is_temporary(entry.name)] == [3]
        writer.finish()
        assert before.size == 3
    assert load_file(store, "step-1/file") == some_bytes(size)
    assert names(store) == ["step-1/file"]
    replace_file(store, "step-1/file", b"and again")
    assert load_file(store, "step-1/file") == b"and again"


def test_a_replacement_of_nothing_is_a_new_file(store: Store) -> None:
    replace_file(store, "step-1/file", b"new")
    assert load_file(store, "step-1/file") == b"new"
    assert names(store) == ["step-1/file"]


def test_a_replacement_that_is_given_up_leaves_the_old_file(store: Store) -> None:
    store_file(store, "step-1/file", b"old")
    with store.replace("step-1/file", 2 * ALIGNMENT) as writer:
        writer.write_at(0, aligned(bytes(ALIGNMENT)))
        with pytest.raises(StoreError, match="4096 of 8192 bytes"):
            writer.finish()
    with pytest.raises(ZeroDivisionError), store.replace("step-1/file", 10) as writer:
        write(writer, bytes(10))
        raise ZeroDivisionError
    with store.replace("step-1/never", 10) as writer:
        write(writer, bytes(10))
    assert load_file(store, "step-1/file") == b"old"
    assert names(store) == ["step-1/file"]


def test_get_checks_the_size_first(store: Store) -> None:
    store.put_if_absent("manifest.json", bytes(100))
    assert store.get("manifest.json", 100) == bytes(100)
    with pytest.raises(StoreError, match="more than the 99") as caught:
        store.get("manifest.json", 99)
    assert (caught.value.size, caught.value.limit) == (100, 99)


def test_missing_files_are_named(store: Store) -> None:
    for operation in (
        lambda: store.open("step-1/gone"),
        lambda: store.open_uncached("step-1/gone"),
        lambda: store.get("step-1/gone", 10),
    ):
        with pytest.raises(MissingFile, match="step-1/gone"):
            operation()


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_put_if_absent_appears_once(store: Store, size: int) -> None:
    store.put_if_absent("step-1/manifest.json", some_bytes(size, seed=1))
    with pytest.raises(AlreadyExists, match=r"step-1/manifest\.json"):
        store.put_if_absent("step-1/manifest.json", some_bytes(size + 1, seed=2))
    assert load_file(store, "step-1/manifest.json") == some_bytes(size, seed=1)
    assert names(store) == ["step-1/manifest.json"]


def test_exactly_one_of_many_racing_puts_wins(store: Store) -> None:
    def put(i: int) -> bool:
        try:
            store.put_if_absent("step-1/manifest.json", f"attempt {i}".encode())
        except AlreadyExists:
            return False
        return True

    won = in_threads(16, put)
    assert won.count(True) == 1
    assert store.get("step-1/manifest.json", 100) == f"attempt {won.index(True)}".encode()
    assert names(store) == ["step-1/manifest.json"]


def test_what_is_not_allowed_does_not_appear(store: Store) -> None:
    asked: list[list[str]] = []

    def refuse() -> None:
        asked.append([name for name in names(store) if not is_temporary(name)])
        raise Interrupted

    with pytest.raises(Interrupted):
        store.put_if_allowed("step-1/manifest.json", b"data", refuse)
    assert (asked, names(store)) == ([[]], [])
    store.put_if_allowed("step-1/manifest.json", b"data", lambda: None)
    assert store.get("step-1/manifest.json", 10) == b"data"
    with pytest.raises(AlreadyExists):
        store.put_if_allowed("step-1/manifest.json", b"other", lambda: None)
    store.revoke("step-1/manifest.json")
    store.revoke("step-2/manifest.json")
    assert store.get("step-1/manifest.json", 10) == b"data"
    assert names(store) == ["step-1/manifest.json"]


def test_listing(store: Store) -> None:
    assert names(store) == names(store, "step-1") == []
    before = time.time()
    for name in ("step-10/b", "step-1/b", "step-1/a/deep", "step-1/a-b", "top"):
        store.put_if_absent(name, name.encode())
    assert names(store) == ["step-1/a-b", "step-1/a/deep", "step-1/b", "step-10/b", "top"]
    assert names(store, "step-1") == ["step-1/a-b", "step-1/a/deep", "step-1/b"]
    assert names(store, "step-1/a") == ["step-1/a/deep"]
    assert names(store, "step") == names(store, "step-2") == names(store, "top") == []
    for entry in store.list():
        assert entry.size == len(entry.name)
        assert before - 2 < entry.modified < time.time() + 2


def test_delete(store: Store) -> None:
    for name in ("step-1/a", "step-1/b", "top"):
        store.put_if_absent(name, b"data")
    store.delete("step-1/a")
    store.delete("step-1/a")
    store.delete("step-2/never")
    assert names(store) == ["step-1/b", "top"]
    store.delete("step-1/b")
    store.delete("top")
    assert names(store) == []
    store.put_if_absent("step-1/a", b"again")
    assert store.get("step-1/a", 10) == b"again"


def test_threads_delete_one_directory_while_others_fill_it(store: Store) -> None:
    def turn(i: int) -> None:
        for n in range(5):
            store.put_if_absent(f"step/{i}-{n}", b"data")
            store.delete(f"step/{i}-{n}")

    in_threads(4, turn)
    assert names(store) == []


def test_empty_directories_go_with_a_file_that_is_not_there(store: Store, tmp_path: Path) -> None:
    store.put_if_absent("step-1/manifest.json", b"x")
    assert list(store.empty_directories()) == []
    if not isinstance(store, LocalStore):
        return
    (Path(store.url) / "step-2").mkdir()
    (Path(store.url) / "step-3" / "sub").mkdir(parents=True)
    (entry,) = store.empty_directories()
    assert (entry.name, entry.size) == ("step-2", 0)
    assert entry.modified == (Path(store.url) / "step-2").stat().st_mtime
    for name in ("step-1", "step-2"):
        store.delete(f"{name}/empty.tmp")
    assert sorted(path.name for path in Path(store.url).iterdir()) == ["step-1", "step-3"]
    assert list(LocalStore(tmp_path / "missing").empty_directories()) == []


def test_temporary_names_are_told_by_their_end() -> None:
    assert is_temporary("step-1/manifest.json.1f6c2a9e.tmp")
    assert is_temporary("step-1/manifest.json.claim.tmp")
    assert not is_temporary("step-1/manifest.json")


def test_errors_can_travel_to_another_rank(store: Store) -> None:
    with pytest.raises(CheckpointError) as caught:
        store.open("gone")
    assert all(isinstance(value, str | int | bool) for value in caught.value.details.values())
