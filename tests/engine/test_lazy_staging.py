# SPDX-License-Identifier: Apache-2.0
"""Copies that are made while training goes on: who makes them, who waits, and what happens when they fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from shardckpt.buffer import Buffer
from shardckpt.device_staging import DeviceCopies
from shardckpt.events import Timings
from shardckpt.feed import Feed
from shardckpt.stage import FileData, FileMap, Part
from shardckpt.staging import LazyStaging

CHUNK = 4096


class Recorded(FileData):
    """Data whose copies are made by the test."""

    def __init__(self, copy: Callable[[int], None]) -> None:
        super().__init__(FileMap(()), {})
        self._copy = copy

    def copy(self, part: Part, buffer: Buffer, position: int) -> None:
        self._copy(part.start)


class Case:
    """A staging of some batches of one part each, and what it has told."""

    def __init__(
        self, count: int, copy: Callable[[int], None] = lambda at: None, look: Callable[[], None] = lambda: None
    ) -> None:
        self._look = look
        self.copied: list[int] = []
        self.told: list[str] = []
        self.waits: list[float] = []
        self.feed = Feed(Buffer(CHUNK), CHUNK, CHUNK)

        def record(at: int) -> None:
            copy(at)
            self.copied.append(at)

        batched: Sequence[Any] = [[Part("t", at, at + 1, at)] for at in range(count)]
        self.staging = LazyStaging(
            Recorded(record), self.feed, batched, DeviceCopies(), self.look, self.end, self.waits.append, Timings()
        )

    def look(self) -> None:
        self._look()
        self.told.append("look")

    def end(self) -> None:
        self.told.append("end")
        if self.feed.failure is None:
            self.feed.staged({}, {})


def in_thread(function: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_without_threads_whoever_waits_copies() -> None:
    case = Case(3)
    case.staging.start(0)
    assert (case.copied, case.told, case.feed.is_staged) == ([], [], False)
    case.staging.wait_before_change()
    assert (case.copied, case.told, case.feed.is_staged) == ([0, 1, 2], ["look", "end"], True)
    case.staging.wait_before_change()
    assert len(case.waits) == 1


@pytest.mark.parametrize("threads", [0, 1])
def test_with_nothing_to_copy_it_is_over_at_once(threads: int) -> None:
    case = Case(0)
    case.staging.start(threads)
    assert case.feed.is_staged
    assert case.told == ["look", "end"]


def test_who_waits_helps_and_nobody_goes_on_before_all_is_copied() -> None:
    held, both = threading.Event(), threading.Barrier(3)
    first = threading.Event()

    def copy(at: int) -> None:
        if at == 0:
            first.set()
            assert held.wait(60)

    case = Case(4, copy)
    case.staging.start(1)
    assert first.wait(60)
    over: list[int] = []

    def wait() -> None:
        both.wait(60)
        case.staging.wait_before_change()
        over.append(len(case.copied))

    threads = [in_thread(wait), in_thread(wait)]
    both.wait(60)
    while len(case.copied) < 3:
        threads[0].join(0.001)
    assert over == []
    assert not case.feed.is_staged
    held.set()
    for thread in threads:
        thread.join(60)
    assert over == [4, 4]
    assert case.told == ["look", "end"]


def test_a_copy_that_fails_ends_the_save_and_lets_training_go_on() -> None:
    def copy(at: int) -> None:
        if at == 1:
            raise RuntimeError("no such memory")

    case = Case(5, copy)
    case.staging.start(0)
    case.staging.wait_before_change()
    assert case.copied == [0]
    assert case.told == ["look", "end"]
    assert case.feed.failure is not None
    assert "no such memory" in case.feed.failure.message


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_while_training_helps_is_not_lost(kind: type[BaseException]) -> None:
    def copy(at: int) -> None:
        if at == 1:
            raise kind

    case = Case(5, copy)
    case.staging.start(0)
    with pytest.raises(kind):
        case.staging.wait_before_change()
    assert case.told == ["look", "end"]
    assert case.feed.failure is not None
    # nobody waits for what will never be
    case.staging.wait_before_change()
    case.staging.settle()


def test_an_interrupt_at_the_last_look_is_not_lost() -> None:
    def look() -> None:
        raise KeyboardInterrupt

    case = Case(1, look=look)
    case.staging.start(0)
    with pytest.raises(KeyboardInterrupt):
        case.staging.wait_before_change()
    assert case.told == ["end"]
    case.staging.settle()


def test_what_nobody_copies_of_a_failed_save_is_left() -> None:
    case = Case(3)
    case.staging.start(0)
    case.staging.fail(RuntimeError("given up"))
    case.staging.settle()
    assert case.copied == []
    assert case.told == ["look", "end"]
    case.staging.wait_before_change()
    assert case.waits == []
