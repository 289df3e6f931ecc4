# SPDX-License-Identifier: Apache-2.0
"""Staging in less memory than the state needs: chunk by chunk, as the writer makes room."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt import ConfigError, Options, StorageFull
from shardckpt.errors import HostMemoryError
from shardckpt.feed import Feed
from tests.engine.stores import CHUNK, SlowDisk, a_state, checkpointer, equal, files, large, loaded
from tests.engine.waiting import InThread, until_blocked
from tests.ranks import RankPool

Carrier = Literal["thread", "process"]
PATIENCE = 120.0


@pytest.mark.parametrize("background", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_what_goes_through_little_memory_is_exact(tmp_path: Path, background: Carrier) -> None:
    options = Options(background=background, host_memory_limit=2 * CHUNK + 100, timeout=PATIENCE)
    with shardckpt.Checkpointer(tmp_path, options=options) as ckpt:
        handles = [ckpt.save(step, large(chunks, seed=step)) for step, chunks in enumerate((3.4, 0.5, 5.1))]
        assert [handle.result(PATIENCE).step for handle in handles] == [0, 1, 2]
    for step, chunks in enumerate((3.4, 0.5, 5.1)):
        assert equal(loaded(tmp_path, step), large(chunks, seed=step))


def save_with_other_limits(root: str) -> list[str]:
    """Rank 0 has two chunks of memory, rank 1 what it needs, and rank 2 has one chunk and a small file."""
    rank = dist.get_rank()
    chunks = (3.4, 3.4, 0.5)[rank]
    own = {name: shardckpt.PerRank(value) for name, value in large(chunks, seed=rank).items()}
    limit = (2 * CHUNK * 3, None, CHUNK * 3)[rank]
    with shardckpt.Checkpointer(root, options=Options(host_memory_limit=limit, timeout=PATIENCE)) as ckpt:
        handles = [ckpt.save(step, own) for step in (1, 2)]
        return [handle.result(PATIENCE).url for handle in handles]


def test_each_rank_has_a_limit_of_its_own(ranks: RankPool, tmp_path: Path) -> None:
    """It is shared by the ranks of a node."""
    ranks.run(3, save_with_other_limits, str(tmp_path))
    for step in (1, 2):
        found = loaded(tmp_path, step)
        for rank, chunks in enumerate((3.4, 3.4, 0.5)):
            assert equal({name: found[name][rank] for name in found}, large(chunks, seed=rank))


# ---- while chunks are written


def test_the_call_lasts_until_the_last_chunk_is_staged(tmp_path: Path) -> None:
    disk = SlowDisk()
    with checkpointer(tmp_path, disk, host_memory_limit=2 * CHUNK) as ckpt:
        disk.lower()
        state = large(3.4)
        saving = InThread(lambda: ckpt.save(1, state))
        until_blocked(saving, Feed.room)
        disk.lift()
        handle = saving.result()
        assert handle.state in ("staged", "durable")
        state["a"] += 1
        handle.result(PATIENCE)
    assert equal(loaded(tmp_path, 1), large(3.4))


def test_a_disk_that_fails_ends_the_call(tmp_path: Path) -> None:
    """With room for two chunks, the third would never be staged."""
    disk = SlowDisk()
    with checkpointer(tmp_path, disk, host_memory_limit=2 * CHUNK) as ckpt:
        ckpt.save(1, a_state(1)).result(PATIENCE)
        disk.lower()
        saving = InThread(lambda: ckpt.save(2, large(3.4)))
        until_blocked(saving, Feed.room)
        disk.fail_always("pwrite", errno.ENOSPC)
        disk.lift()
        handle = saving.result()
        with pytest.raises(StorageFull):
            handle.result(PATIENCE)
        assert handle.state == "failed"
    assert [name[:13] for name in files(tmp_path)] == ["step-00000001"] * 2


# ---- too little memory


def save_below_a_chunk(root: str, background: Carrier, poor: int) -> list[str]:
    """Rank ``poor`` has less than a chunk of memory, and learns so at each save; the messages."""
    limit = 2 * CHUNK if dist.get_rank() == poor else None
    found = []
    options = Options(host_memory_limit=limit, background=background, timeout=PATIENCE)
    with shardckpt.Checkpointer(root, options=options) as ckpt:
        for step in (1, 2):
            handle = ckpt.save(step, a_state(step) | {"own": shardckpt.PerRank(dist.get_rank())})
            try:
                handle.result(PATIENCE)
            except ConfigError as error:
                found.append(error.message)
        ckpt.save(3, a_state(3), wait=True)
    return found


@pytest.mark.parametrize(
    ("background", "poor"),
    [("thread", 0), ("thread", 2), *(pytest.param("process", poor, marks=pytest.mark.slow) for poor in (0, 1))],
)
def test_less_than_a_chunk_is_an_error_on_all_ranks(ranks: RankPool, tmp_path: Path, background: Carrier, poor: int) -> None:
    """Blocking saves need no such memory."""
    for messages in ranks.run(3, save_below_a_chunk, str(tmp_path), background, poor):
        assert len(messages) == 2
        for message in messages:
            assert f"host_memory_limit leaves this rank {2 * CHUNK // 3} bytes" in message
            assert f"set it to at least {CHUNK} bytes for each rank of the node" in message
    assert {name[:13] for name in files(tmp_path)} == {"step-00000003"}


@contextmanager
def no_files_longer_than(nbytes: int) -> Iterator[None]:
    """Nor shared memory, of this process. For processes that it has started before, nothing changes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_shared_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the system does not give is not taken by force: the state goes through a single chunk, and a log line says so.

    Where there is not even that, the save fails, and the next one tries again.
    """
    with shardckpt.Checkpointer(tmp_path, options=Options(background="process", timeout=PATIENCE)) as ckpt:
        with no_files_longer_than(CHUNK - 1):
            handle = ckpt.save(1, a_state(1))
        with pytest.raises(HostMemoryError, match="not even 4194304 bytes of host memory"):
            handle.result(PATIENCE)
        caplog.clear()
        with no_files_longer_than(6 * CHUNK):
            handle = ckpt.save(2, large(7.4))
        assert handle.result(PATIENCE).bytes > 7 * CHUNK
        assert "bytes of host memory to stage a state in: [Errno 27] File too large" in caplog.text
    assert equal(loaded(tmp_path, 2), large(7.4))
    assert {name[:13] for name in files(tmp_path)} == {"step-00000002"}
