# SPDX-License-Identifier: Apache-2.0
"""The journal: what it tells of a save at each point, what stays of saves that fail or are killed, and that it is harmless."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardckpt.errors import AlreadyCommitted, NotACheckpointRoot, StorageFull, StoreError
from shardckpt.journal import KEPT_FAILURES, LOST_SECONDS, SILENT_SECONDS, Journal, JournalEntry, outdated
from shardckpt.manifest import MANIFEST_NAME, step_directory
from shardckpt.options import Retention
from shardckpt.pruning import Pruner
from shardckpt.root import Root, commit_times
from shardckpt.store import Entry, FileReader, FileWriter, LocalStore, MemoryStore, Store
from tests.store.faults import FaultyFileSystem, Killed, WithoutLinks
from tests.store.helpers import names

A, B, C = "a" * 16, "b" * 16, "c" * 16


class Clock:
    """Time that only a test moves, in seconds."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def on_memory() -> tuple[Clock, MemoryStore, Journal]:
    clock = Clock()
    store = MemoryStore(uuid.uuid4().hex, clock)
    return clock, store, Journal(store, clock)


def commit(store: Store, step: int) -> None:
    store.put_if_absent(f"{step_directory(step)}/{MANIFEST_NAME}", b"{}")


def clean(store: Store, now: float) -> None:
    """Remove all that is outdated, as prune does."""
    for entry in outdated(Journal(store).entries(), commit_times(Root(store).scan()), now):
        for name in entry.names:
            store.delete(name)


def told(journal: Journal) -> list[tuple[int, str, str]]:
    return [(entry.step, entry.attempt, entry.state) for entry in journal.entries()]


# ---- the course of a save, on each kind of store


def test_a_save_is_told_of_until_it_is_durable(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(store)
    assert told(journal) == []
    journal.requested(42, A)
    assert told(journal) == [(42, A, "requested")]
    journal.staged(42, A)
    assert told(journal) == [(42, A, "staged")]
    commit(store, 42)
    journal.durable(42, A)
    assert told(journal) == []
    assert names(store) == ["step-00000042/manifest.json"]
    assert caplog.records == []


def test_a_save_that_is_staged_at_once_has_one_marker(store: Store) -> None:
    journal = Journal(store)
    journal.staged(3, A)
    assert names(store) == [f".saves/step-00000003-{A}.staged"]
    journal.durable(3, A)
    assert names(store) == []


def test_a_failed_save_leaves_its_error_and_no_other_marker(store: Store) -> None:
    journal = Journal(store)
    journal.requested(42, A)
    journal.staged(42, A)
    journal.failed(42, A, StorageFull("no space left for rank 3"))
    (entry,) = Journal(store).entries()
    assert (entry.step, entry.attempt, entry.state) == (42, A, "failed")
    assert (entry.error, entry.message) == ("StorageFull", "no space left for rank 3")
    assert names(store) == [f".saves/step-00000042-{A}.failed"] == list(entry.names)


def test_each_save_is_told_of_once_the_latest_last(store: Store) -> None:
    journal, other = Journal(store), Journal(store)
    journal.staged(7, A)
    other.requested(5, B)
    journal.staged(7, A)
    found = Journal(store).entries()
    assert sorted(told(journal)) == [(5, B, "requested"), (7, A, "staged")]
    assert [entry.modified for entry in found] == sorted(entry.modified for entry in found)


def test_saves_of_others_are_left_alone(store: Store) -> None:
    journal, other = Journal(store), Journal(store)
    other.requested(5, B)
    other.staged(90, C)
    journal.staged(42, A)
    journal.durable(42, A)
    journal.staged(43, A)
    journal.failed(43, A, StoreError("no"))
    clean(store, time.time())
    assert sorted(told(other)) == [(5, B, "requested"), (43, A, "failed"), (90, C, "staged")]


def test_a_root_does_not_mind_the_journal(store: Store) -> None:
    journal, root = Journal(store), Root(store)
    journal.staged(2, A)
    journal.failed(3, B, StoreError("no"))
    assert root.scan() == []
    root.require_place("step-00000002/")
    root.require_place("")
    commit(store, 1)
    assert root.steps() == [1]
    assert [found.step for found in root.scan()] == [1]
    pruner = Pruner(store)
    assert [pruner.remove(removal) for removal in pruner.plan(root.look(), Retention(keep_last=1), dead_before=2e9)] == []
    assert len(names(store)) == 3


def test_without_links(tmp_path: Path) -> None:
    journal = Journal(LocalStore(tmp_path, WithoutLinks()))
    journal.requested(1, A)
    journal.staged(1, A)
    assert told(journal) == [(1, A, "staged")]
    journal.durable(1, A)
    assert list(tmp_path.iterdir()) == []


def test_a_save_costs_two_puts_a_listing_and_two_deletes_at_most() -> None:
    _, store, _ = on_memory()
    counted = Failing(store)
    journal = Journal(counted)
    journal.requested(1, A)
    journal.staged(1, A)
    journal.durable(1, A)
    assert counted.calls == ["put_if_absent", "put_if_absent", "list", "delete", "delete"]


# ---- failed saves


def test_a_failure_is_told_of_until_its_step_or_a_newer_one_is_committed() -> None:
    clock, store, journal = on_memory()
    journal.failed(10, A, StoreError("no"))
    clock.now += LOST_SECONDS * 100
    journal.durable(9, B)
    clean(store, clock.now)
    assert told(journal) == [(10, A, "failed")]
    journal.durable(10, B)
    assert told(journal) == []
    journal.failed(11, A, StoreError("no"))
    journal.durable(12, B)
    assert told(journal) == []


def test_a_failure_is_not_made_good_by_what_was_committed_before() -> None:
    clock, store, journal = on_memory()
    commit(store, 1000)
    clock.now += 1
    journal.failed(600, A, StoreError("no"))
    clean(store, clock.now)
    assert told(journal) == [(600, A, "failed")]


def test_the_newest_failures_are_kept() -> None:
    clock, _, journal = on_memory()
    for step in range(KEPT_FAILURES + 5):
        clock.now += 1
        journal.failed(step, A, StoreError(f"no {step}"))
    entries = journal.entries()
    assert [entry.step for entry in entries] == list(range(5, KEPT_FAILURES + 5))
    assert [entry.message for entry in entries] == [f"no {entry.step}" for entry in entries]


def test_only_the_newest_failures_are_read() -> None:
    clock, store, journal = on_memory()
    for step in range(KEPT_FAILURES + 30):
        store.put_if_absent(f".saves/{step_directory(step)}-{A}.failed", b'{"error":"E","message":"m"}')
    counted = Failing(store)
    assert len(Journal(counted).entries()) == KEPT_FAILURES + 30
    assert counted.calls.count("open") == KEPT_FAILURES
    clean(store, clock.now)
    assert len(journal.entries()) == KEPT_FAILURES


@pytest.mark.parametrize("error", [AlreadyCommitted("another save was first"), NotACheckpointRoot("a thesis is here")])
def test_refusals_leave_nothing(store: Store, error: StoreError) -> None:
    Journal(store).failed(3, A, error)
    assert names(store) == []


def test_of_two_saves_of_a_step_the_loser_leaves_no_marker() -> None:
    _, store, journal = on_memory()
    journal.staged(3, A)
    journal.failed(3, A, AlreadyCommitted("another save was first"))
    assert names(store) == []


@given(st.text(max_size=3000) | st.text(st.characters(categories=["Cc", "Cs", "Cf"]), max_size=3000))
def test_any_message_is_kept_in_bounds_and_printable(text: str) -> None:
    _, _, journal = on_memory()
    journal.failed(1, A, RuntimeError(text))
    (entry,) = journal.entries()
    assert entry.error == "RuntimeError"
    assert entry.message.isprintable()
    assert len(entry.message) <= 2000
    if text.isprintable():
        assert entry.message == text[:2000]


# ---- killed saves


def test_a_killed_save_is_given_up_when_it_is_silent_and_another_was_begun_since() -> None:
    clock, store, journal = on_memory()
    journal.staged(42, A)
    clock.now += SILENT_SECONDS + 1
    clean(store, clock.now)
    assert told(journal) == [(42, A, "staged")], "nothing came after it: it may only be slow"
    journal.staged(40, B)
    clean(store, clock.now)
    assert told(journal) == [(40, B, "staged")]
    assert names(store) == [f".saves/step-00000040-{B}.staged"]


def test_a_save_that_outlives_its_run_is_not_given_up_at_once() -> None:
    clock, _, journal = on_memory()
    journal.staged(42, A)
    clock.now += SILENT_SECONDS - 1
    journal.staged(40, B)
    journal.durable(40, B)
    assert told(journal) == [(42, A, "staged")]
    clock.now += 2
    journal.durable(41, C)
    assert told(journal) == []


def test_a_killed_save_is_given_up_in_any_case_after_a_day() -> None:
    clock, store, journal = on_memory()
    journal.requested(42, A)
    clock.now += LOST_SECONDS - 1
    clean(store, clock.now)
    assert told(journal) == [(42, A, "requested")]
    clock.now += 2
    clean(store, clock.now)
    assert names(store) == []


def test_a_save_that_was_killed_after_its_commit_is_known_by_the_manifest() -> None:
    clock, store, journal = on_memory()
    journal.staged(42, A)
    commit(store, 42)
    clean(store, clock.now)
    assert told(journal) == []


def test_a_put_that_was_killed_counts_as_a_request_and_is_cleaned_up() -> None:
    clock, store, journal = on_memory()
    journal.requested(41, A)
    for state in ("staged", "failed"):
        store.put_if_absent(f".saves/step-00000041-{A}.{state}.0badcafe.tmp", b"")
    store.put_if_absent(f".saves/step-00000042-{A}.staged.claim.tmp", b"")
    assert told(journal) == [(41, A, "requested"), (42, A, "requested")]
    clock.now += 2 * LOST_SECONDS
    clean(store, clock.now)
    assert names(store) == []


def entry(step: int, modified: float, state: str = "staged") -> JournalEntry:
    return JournalEntry(step, A, state, modified, (f"{step}",))  # type: ignore[arg-type]


def test_what_is_older_than_asked_for_is_outdated() -> None:
    entries = [entry(1, 10.0, "failed"), entry(2, 20.0), entry(3, 30.0, "failed"), entry(4, 40.0)]
    assert outdated(entries, {}, 50.0) == []
    assert outdated(entries, {}, 50.0, 30.0) == entries[:2]


# ---- what is not a marker


@pytest.mark.parametrize(
    "name",
    [
        *("notes.txt", "step-00000001", f"step-1-{A}.staged", f"step-000000001-{A}.staged", "step-00000001-XYZ.staged"),
        *(f"step-00000001-{A}.durable", f"step-00000001-{A}.staged.txt", f"step-00000001-{A}.staged/x"),
        f"x/step-00000001-{A}.staged",
    ],
)
def test_other_files_are_ignored_with_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, store, journal = on_memory()
    store.put_if_absent(f".saves/{name}", b"")
    store.put_if_absent(".saves/zzz", b"")
    journal.staged(1, B)
    assert told(journal) == [(1, B, "staged")]
    journal.durable(1, B)
    assert names(store) == [f".saves/{name}", ".saves/zzz"]
    assert [record.message for record in caplog.records] == [
        f"{store.url} holds {f'.saves/{name}'!r}, which is ignored, as are others like it: it is no marker"
    ]


BAD_FAILURES = [
    *(b"", b"\xff", b"{}", b"[]", b'"x"', b"[" * 16000, b'{"error":"E","message":1}', b'{"error":"E","message":"\xff"}'),
    *(b'{"error":"E","message":"m","x":1}', b'{"error":"E","message":"' + b"m" * 2001 + b'"}', b" " * (17 << 10)),
]


@pytest.mark.parametrize("content", BAD_FAILURES, ids=lambda content: repr(content[:30]))
def test_a_marker_with_other_content_still_says_that_the_save_failed(content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    _, store, journal = on_memory()
    for attempt in (A, B):
        store.put_if_absent(f".saves/step-00000001-{attempt}.failed", content)
    assert [(e.state, e.error, e.message) for e in journal.entries()] == [("failed", "", "")] * 2
    assert len(caplog.records) == 1
    journal.durable(2, C)
    assert names(store) == []


@given(st.binary(max_size=300), st.binary(max_size=300).map(lambda data: b'{"error":"' + data + b'","message":""}'))
def test_any_content_can_be_read(plain: bytes, quoted: bytes) -> None:
    _, store, journal = on_memory()
    for attempt, content in ((A, plain), (B, quoted)):
        store.put_if_absent(f".saves/step-00000001-{attempt}.failed", content)
        store.put_if_absent(f".saves/step-00000002-{attempt}.staged", content)
    assert sorted(told(journal)) == [(s, a, state) for s, state in ((1, "failed"), (2, "staged")) for a in (A, B)]


def test_a_marker_that_is_no_file_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"error": "E", "message": "secret"}')
    saves = tmp_path / "root" / ".saves"
    saves.mkdir(parents=True)
    (saves / f"step-00000001-{A}.failed").symlink_to(secret)
    os.mkfifo(saves / f"step-00000002-{A}.failed")
    assert Journal(LocalStore(tmp_path / "root")).entries() == []


def test_a_file_in_place_of_the_journal_is_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".saves").write_text("mine")
    journal = Journal(LocalStore(tmp_path))
    assert journal.entries() == []
    journal.staged(1, A)
    journal.durable(1, A)
    journal.failed(2, A, StoreError("no"))
    assert (tmp_path / ".saves").read_text() == "mine"
    assert "cannot tell that step 1" in caplog.text


# ---- storage that fails


class Failing(Store):
    """Another store, whose operation named ``failing`` raises; remembers the calls."""

    def __init__(self, store: Store, failing: str = "", error: Exception | None = None) -> None:
        self.url = store.url
        self.calls: list[str] = []
        self._store = store
        self._failing = failing
        self._error = error or StoreError("the storage is gone")

    def _pass(self, operation: str) -> Store:
        self.calls.append(operation)
        if operation == self._failing:
            raise self._error
        return self._store

    def create(self, name: str, size: int) -> FileWriter:
        return self._pass("create").create(name, size)

    def replace(self, name: str, size: int) -> FileWriter:
        return self._pass("replace").replace(name, size)

    def open(self, name: str) -> FileReader:
        return self._pass("open").open(name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._pass("put_if_absent").put_if_absent(name, data)

    def list(self, prefix: str = "") -> Sequence[Entry]:
        return self._pass("list").list(prefix)

    def delete(self, name: str) -> None:
        self._pass("delete").delete(name)


MARKING: list[Callable[[Journal], None]] = [
    lambda journal: journal.requested(1, A),
    lambda journal: journal.staged(1, A),
    lambda journal: journal.durable(1, A),
    lambda journal: journal.failed(1, A, StoreError("no")),
]


@pytest.mark.parametrize("error", [StoreError("the storage is gone"), OSError(errno.EIO, "the storage is gone"), MemoryError()])
@pytest.mark.parametrize("operation", ["put_if_absent", "list", "delete"])
def test_a_storage_that_fails_is_logged(operation: str, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    clock, store, journal = on_memory()
    journal.staged(1, A)
    clock.now += 2 * LOST_SECONDS
    failing = Failing(store, operation, error)
    for mark in MARKING:
        mark(Journal(failing, clock))
    caplog.set_level(logging.INFO)
    assert ("the journal cannot tell that step 1" in caplog.text) == (operation in failing.calls)
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_on_a_full_disk_no_marker_says_that_the_save_goes_on(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    journal = Journal(LocalStore(tmp_path, fs))
    journal.staged(1, A)
    fs.fail_always("pwrite", errno.ENOSPC)
    journal.failed(1, A, StorageFull("no space left"))
    assert list(tmp_path.iterdir()) == []


def test_killed_anywhere_the_journal_can_be_read_and_is_cleaned_by_the_next_save(tmp_path: Path) -> None:
    for calls in itertools.count():
        root = tmp_path / str(calls)
        journal = Journal(LocalStore(root, FaultyFileSystem().die_after(calls)))
        finished = False
        with contextlib.suppress(Killed):
            journal.requested(1, A)
            journal.staged(1, A)
            journal.failed(1, A, StoreError("no"))
            journal.staged(2, B)
            journal.durable(2, B)
            finished = True
        store = LocalStore(root)
        for entry in Journal(store).entries():
            assert entry.error == ("StoreError" if entry.state == "failed" else "")
        Journal(store, lambda: time.time() + LOST_SECONDS + 1).durable(2, C)
        assert names(store) == []
        if finished:
            assert calls > 50
            return


# ---- histories


HISTORIES = st.lists(
    st.tuples(
        st.sampled_from(["requested", "staged", "durable", "failed", "killed", "clean"]),
        st.integers(0, 1),
        st.integers(0, 6),
        st.sampled_from([0.0, 1.0, 100.0, SILENT_SECONDS + 1, LOST_SECONDS + 1]),
    ),
    max_size=40,
)


@given(HISTORIES)
def test_any_history_of_two_runs(history: list[tuple[str, int, int, float]]) -> None:
    """Each run has one save at a time; what is young and not committed is always told of, what is committed never."""
    clock, store, journal = on_memory()
    alive: dict[int, tuple[int, str, str]] = {}
    since: dict[int, float] = {}
    for number, (event, run, step, pause) in enumerate(history):
        clock.now += pause
        if event == "clean":
            clean(store, clock.now)
        elif run not in alive:
            if event in ("requested", "staged"):
                alive[run], since[run] = (step, f"{number:016x}", event), clock.now
                getattr(journal, event)(step, f"{number:016x}")
        else:
            step, attempt, state = alive[run]
            if event == "staged" and state == "requested":
                alive[run], since[run] = (step, attempt, event), clock.now
                journal.staged(step, attempt)
            elif event == "failed":
                journal.failed(step, attempt, StoreError("no"))
                assert (step, attempt, "failed") in told(journal)
            elif event == "durable":
                if step not in Root(store).steps():
                    commit(store, step)
                journal.durable(step, attempt)
            if event in ("failed", "durable", "killed"):
                del alive[run]
        there, committed = told(journal), Root(store).steps()
        for other, save in alive.items():
            assert save in there or save[0] in committed or clock.now - since[other] > SILENT_SECONDS
    clean(store, clock.now)
    assert all(state == "failed" or step not in Root(store).steps() for step, _, state in told(journal))
    clock.now += LOST_SECONDS + 1
    journal.durable(10, C)
    assert [name for name in names(store) if name.startswith(".")] == []
