# SPDX-License-Identifier: Apache-2.0
"""Spaces of memory stores are told apart by name, and shared by it."""

from __future__ import annotations

import pytest

from shardckpt.errors import AlreadyExists
from shardckpt.store import MemoryStore
from tests.store.helpers import aligned, load_file, names, store_file


def test_stores_of_one_name_share_their_files() -> None:
    store_file(MemoryStore("shared"), "file", b"data")
    assert load_file(MemoryStore("shared"), "file") == b"data"
    assert names(MemoryStore("other")) == []


def test_the_clock_is_the_callers() -> None:
    seconds = iter([1.0, 2.0, 3.0])
    store = MemoryStore("clock", clock=lambda: next(seconds))
    store.put_if_absent("put", b"")
    store_file(store, "created", b"")
    assert [(entry.name, entry.modified) for entry in store.list()] == [("created", 3.0), ("put", 1.0)]


def test_what_was_put_does_not_follow_the_callers_buffer() -> None:
    store = MemoryStore("copies")
    view = aligned(b"before")
    with store.create("file", 6) as writer:
        writer.write_at(0, view)
        view[:5] = b"after"
        writer.finish()
    assert load_file(store, "file") == b"before"


def test_a_file_under_way_takes_its_name() -> None:
    store = MemoryStore("reserved")
    with store.create("file", 0), pytest.raises(AlreadyExists):
        store.create("file", 0)
