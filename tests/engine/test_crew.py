# SPDX-License-Identifier: Apache-2.0
"""Threads that share out a list: all of it, in order, no longer than it lasts, and not on after an error."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from shardckpt.crew import share_out
from tests.engine.waiting import PATIENCE


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_results_are_in_order(threads: int, count: int) -> None:
    before = threading.active_count()
    assert share_out(lambda item: item * item, range(count), threads, "crew") == [item * item for item in range(count)]
    assert threading.active_count() == before


def test_as_many_work_at_a_time_as_are_asked_for() -> None:
    """Each item waits for two others to be under way."""
    barrier = threading.Barrier(3)

    def meet(_: int) -> str:
        barrier.wait(PATIENCE)
        return threading.current_thread().name

    names = share_out(meet, range(9), 3, "crew")
    assert set(names) == {threading.current_thread().name, "crew-1", "crew-2"}


def test_items_are_begun_in_order() -> None:
    """A ring of chunks depends on it: what has to make room for others must not be left for later."""
    done = [threading.Event() for _ in range(100)]

    def follow(item: int) -> None:
        assert item == 0 or done[item - 1].wait(PATIENCE)
        done[item].set()

    share_out(follow, range(100), 4, "crew")
    assert all(event.is_set() for event in done)


def test_the_first_error_ends_it_when_all_threads_are_done() -> None:
    raised, began = threading.Event(), threading.Event()
    done: list[int] = []

    def work(item: int) -> None:
        if item == 0:
            assert began.wait(PATIENCE)
            raised.set()
            raise OSError("the first")
        began.set()
        assert raised.wait(PATIENCE)
        done.append(item)
        raise ValueError("a later one")

    with pytest.raises(OSError, match="the first"):
        share_out(work, range(100), 2, "crew")
    assert done == [1]


def test_what_is_no_exception_is_raised_as_well() -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        share_out(interrupt, range(3), 3, "crew")


AT_EXIT = """
import atexit, threading
from shardckpt.crew import share_out
from tests.engine.waiting import PATIENCE

@atexit.register
def finish():
    print(sum(share_out(lambda item: item, range(10), 3, "crew")))
"""


def test_it_works_while_the_interpreter_exits() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("45\n", "")
