# SPDX-License-Identifier: Apache-2.0
"""How memory of a process and its children is counted."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from shardckpt.bench.copying import plain_copies
from shardckpt.bench.memory import MemoryWatch, family_of, give_back_free_memory, memory_now, memory_of

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")


@contextmanager
def child(shared: mmap.mmap, own: int) -> Iterator[int]:
    """A process that has written to all of ``shared``, and to ``own`` bytes of its own memory."""
    ready, theirs = os.pipe()
    waits, ours = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        shared[:] = b"1" * len(shared)
        kept = bytearray(b"1" * own)
        os.write(theirs, b"1")
        os.read(waits, 1)
        del kept
        os._exit(0)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.close(ours)
        os.waitpid(pid, 0)
        for fd in (ready, theirs, waits):
            os.close(fd)


def test_children_count_and_what_they_share_counts_once() -> None:
    with mmap.mmap(-1, 64 * MIB) as shared, child(shared, 32 * MIB) as pid:
        assert pid in family_of(os.getpid())
        assert 96 * MIB <= memory_of([pid]) < 4096 * MIB
        alone = memory_of([os.getpid()])
        shared[:] = b"1" * len(shared)
        assert memory_of([os.getpid()]) >= alone + 60 * MIB
        both = memory_of([os.getpid(), pid])
        assert both < memory_of([os.getpid()]) + memory_of([pid]) - 60 * MIB


def test_who_is_gone_has_no_memory() -> None:
    assert memory_of([]) == 0
    assert family_of(-1) == [-1]
    assert memory_of([-1]) == 0


def test_a_watch_sees_the_peak() -> None:
    before = memory_now()
    with MemoryWatch() as watch:
        kept = bytearray(b"1" * (48 * MIB))
        while watch.peak < before + 40 * MIB:
            kept[0] ^= 1
        del kept
        peak = watch.peak
    assert watch.peak >= peak


def test_what_was_freed_goes_back_to_the_system() -> None:
    kept = [torch.zeros(MIB // 64, dtype=torch.uint8) for _ in range(64 * 64)]
    full = memory_now()
    del kept
    give_back_free_memory()
    assert memory_now() < full - 48 * MIB


def test_plain_copies_copy() -> None:
    ways = plain_copies(1000, torch.device("cpu"))
    assert ways.keys() == {"torch", "numpy"}
    for copy in ways.values():
        copy()
