# SPDX-License-Identifier: Apache-2.0
"""Retries: only of what may pass, bounded, and at random times."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

import pytest

from shardckpt.errors import ConfigError, StoreError
from shardckpt.store import Entry, FileReader, FileWriter, MemoryStore, RetryingStore, Store
from tests.store.helpers import load_file, replace_file, store_file


class Troubled(Store):
    """A store whose operations fail ``failures`` times before they work."""

    def __init__(self, failures: int, transient: bool = True) -> None:
        self.inner = MemoryStore(uuid.uuid4().hex)
        self.url = self.inner.url
        self.failures = failures
        self.transient = transient

    def stumble(self) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError(f"trouble {self.failures}", transient=self.transient)

    def create(self, name: str, size: int) -> FileWriter:
        self.stumble()
        return self.inner.create(name, size)

    def replace(self, name: str, size: int) -> FileWriter:
        self.stumble()
        return self.inner.replace(name, size)

    def open(self, name: str) -> FileReader:
        self.stumble()
        return self.inner.open(name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self.stumble()
        self.inner.put_if_absent(name, data)

    def list(self, prefix: str = "") -> Sequence[Entry]:
        self.stumble()
        return self.inner.list(prefix)

    def delete(self, name: str) -> None:
        self.stumble()
        self.inner.delete(name)

    def revoke(self, name: str) -> None:
        self.stumble()


OPERATIONS: list[Callable[[Store], object]] = [
    lambda store: store_file(store, "new", b""),
    lambda store: replace_file(store, "new", b""),
    lambda store: load_file(store, "file"),
    lambda store: store.get("file", 10),
    lambda store: store.put_if_absent("new", b""),
    lambda store: store.put_if_allowed("new", b"", lambda: None),
    lambda store: store.revoke("new"),
    lambda store: store.list(),
    lambda store: store.delete("file"),
]


def retrying(store: Store, pauses: list[float], attempts: int = 4, share: float = 1.0) -> RetryingStore:
    return RetryingStore(store, attempts, first_pause=1.0, longest_pause=3.0, sleep=pauses.append, uniform=lambda: share)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_tried_again(operation: Callable[[Store], object]) -> None:
    store, pauses = Troubled(3), list[float]()
    store.inner.put_if_absent("file", b"data")
    operation(retrying(store, pauses))
    assert pauses == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_attempts_are_bounded_and_the_last_error_is_raised(operation: Callable[[Store], object]) -> None:
    store, pauses = Troubled(10), list[float]()
    with pytest.raises(StoreError, match="trouble 6"):
        operation(retrying(store, pauses))
    assert len(pauses) == 3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_does_not_pass_is_raised_at_once(operation: Callable[[Store], object]) -> None:
    store, pauses = Troubled(1, transient=False), list[float]()
    with pytest.raises(StoreError, match="trouble 0"):
        operation(retrying(store, pauses))
    assert pauses == []


def test_pauses_are_a_random_part(caplog: pytest.LogCaptureFixture) -> None:
    store, pauses = Troubled(2), list[float]()
    retrying(store, pauses, share=0.25).list()
    assert pauses == [0.25, 0.5]
    assert "attempt 1 of 4, next in 0.25 s: trouble 1" in caplog.text


def test_reads_of_an_open_file_are_tried_again() -> None:
    class TroubledReader(FileReader):
        failures = 2

        def close(self) -> None:
            self.closed = True

        def _fill(self, offset: int, buffers: list[memoryview]) -> None:
            buffers[0][:] = b"garbage"
            if self.failures:
                self.failures -= 1
                raise StoreError("trouble", transient=True)
            buffers[0][:] = b"correct"

    inner = TroubledReader("file", 7)

    class OneFile(Troubled):
        def open(self, name: str) -> FileReader:
            return inner

    pauses: list[float] = []
    with retrying(OneFile(0), pauses).open("file") as reader:
        data = bytearray(7)
        reader.expect_ascending()
        reader.read_at(0, [memoryview(data)])
    assert data == b"correct"
    assert (reader.name, reader.size, inner.closed) == ("file", 7, True)
    assert len(pauses) == 2


def test_one_attempt_means_no_retry() -> None:
    with pytest.raises(StoreError):
        retrying(Troubled(1), [], attempts=1).list()
    with pytest.raises(ConfigError, match="1 or more"):
        RetryingStore(Troubled(0), 0)
