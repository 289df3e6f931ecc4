# SPDX-License-Identifier: Apache-2.0
"""Threads that touch host buffers run near the GPU meanwhile, and only where that can be."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from shardckpt.gpu import GPU
from shardckpt.gpu.placement import near

GPU0 = GPU(
    uuid="GPU-1",
    index=0,
    name=None,
    bus_id=None,
    numa_node=1,
    cpus=(2, 3),
    link=None,
    max_link=None,
    memory_total=None,
    memory_free=None,
    uncorrected_errors=None,
)


class Scheduler:
    """Where the calling thread may run, in a system that may refuse to change it."""

    def __init__(self, *cpus: int, refuses: str = "") -> None:
        self.cpus = set(cpus)
        self.refuses = refuses

    def sched_getaffinity(self, thread: int) -> set[int]:
        assert thread == 0
        return set(self.cpus)

    def sched_setaffinity(self, thread: int, cpus: set[int]) -> None:
        assert thread == 0
        if self.refuses:
            raise PermissionError(1, self.refuses)
        self.cpus = set(cpus)


def test_a_thread_goes_near_and_comes_back() -> None:
    system = Scheduler(0, 1, 2, 3, 4)
    with near(GPU0, system):
        assert system.cpus == {2, 3}
    assert system.cpus == {0, 1, 2, 3, 4}


def test_a_thread_comes_back_after_an_error() -> None:
    system = Scheduler(0, 2)
    with pytest.raises(KeyError), near(GPU0, system):
        assert system.cpus == {2}
        raise KeyError
    assert system.cpus == {0, 2}


@pytest.mark.parametrize(
    ("gpu", "system"),
    [
        (None, Scheduler(0, 1)),
        (replace(GPU0, cpus=()), Scheduler(0, 1)),
        (GPU0, Scheduler(0, 1)),
        (GPU0, Scheduler(2)),
        (GPU0, Scheduler(0, 1, 2, 3, refuses="Operation not permitted")),
        (GPU0, object()),
    ],
    ids=["no GPU", "CPUs not known", "none of them allowed", "already there", "refused", "no such calls"],
)
def test_a_thread_stays_where_it_is(gpu: GPU | None, system: object) -> None:
    before = getattr(system, "cpus", None)
    with near(gpu, system):
        assert getattr(system, "cpus", None) == before
    assert getattr(system, "cpus", None) == before


def test_a_thread_that_may_not_come_back_goes_on_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    system = Scheduler(0, 2)
    with near(GPU0, system):
        system.refuses = "Invalid argument"
    assert "cannot move back to CPUs [0, 2]" in caplog.text


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be moved on this system")
def test_only_the_calling_thread_moves() -> None:
    usable = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []
    look, looked = threading.Event(), threading.Event()

    def bystander() -> None:
        look.wait(30)
        seen.append(os.sched_getaffinity(0))
        looked.set()

    thread = threading.Thread(target=bystander)
    thread.start()
    with near(replace(GPU0, cpus=(usable[0],))):
        assert os.sched_getaffinity(0) == {usable[0]}
        look.set()
        assert looked.wait(30)
    thread.join()
    assert seen == [set(usable)]
    assert os.sched_getaffinity(0) == set(usable)
