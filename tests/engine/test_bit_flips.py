# SPDX-License-Identifier: Apache-2.0
"""A bit that flips after staging, in host memory, on the way to the disk or there, is found by verify, load and readback."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt import CheckpointError, ChecksumMismatch, ConfigError, Event, PerRank, SaveHandle, TruncatedFile
from shardckpt.background.messages import Done
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.maintain.timings import list_timings
from shardckpt.maintain.verify import verify
from shardckpt.manifest import HEADER_ALIGNMENT, step_directory
from shardckpt.store import LocalStore
from tests.engine.stores import CHUNK, checkpointer, equal, files, large, loaded
from tests.engine.test_worker import BLOCK, Trainer, data
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem
from tests.store.helpers import aligned

PATIENCE = 120.0
FLIPPED = 1000
"""The byte of a chunk."""

OPTIONS: dict[str, dict[str, Any]] = {
    "blocking": {},
    "staged": {},
    "ring": {"host_memory_limit": 2 * CHUNK},
    "none": {"stage": "none"},
}


class Flips(FaultyFileSystem):
    """Flips a bit when the first chunk of data is written: of the memory it lies in, or only of what comes to the disk."""

    def __init__(self, in_memory: bool, chunk: int = 0) -> None:
        super().__init__()
        self.flipped = 0
        self._in_memory = in_memory
        self._chunk = chunk

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if not offset or self.flipped:
            return super().pwrite(fd, buffer, offset)
        self.flipped += 1
        if self._in_memory:
            memory = memoryview(buffer.obj)
        else:
            memory = buffer = aligned(bytes(buffer))
        memory[self._chunk * CHUNK + FLIPPED] ^= 1
        return super().pwrite(fd, buffer, offset)


def require_refused(root: Path, start: int = FLIPPED) -> None:
    """Both who verifies and who loads name the block, and nothing else is wrong."""
    (found,) = verify(LocalStore(root), read_data=True)
    assert [problem.kind for problem in found.problems] == ["ChecksumMismatch"]
    with pytest.raises(ChecksumMismatch) as caught:
        shardckpt.load(root)
    for error in (found.problems[0], caught.value):
        assert error.start is not None and error.stop is not None
        assert error.start <= HEADER_ALIGNMENT + start < error.stop
        assert set(error.tensors) <= set("abc") and error.tensors


@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "on the way"])
@pytest.mark.parametrize("how", OPTIONS)
def test_a_bit_that_flips_after_staging(tmp_path: Path, how: str, in_memory: bool) -> None:
    fs = Flips(in_memory)
    with checkpointer(tmp_path, fs, workers=1, **OPTIONS[how]) as ckpt:
        ckpt.save(1, large(3.4), wait=how == "blocking").result(PATIENCE)
    assert fs.flipped == 1
    require_refused(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_digests_of_a_staged_image_are_all_taken_before_any_of_it_is_written(tmp_path: Path, workers: int) -> None:
    """What flips in the last chunk while the first is on its way is found."""
    fs = Flips(in_memory=True, chunk=5)
    with checkpointer(tmp_path, fs, workers=workers) as ckpt:
        ckpt.save(1, large(5.4)).result(PATIENCE)
    require_refused(tmp_path, 5 * CHUNK + FLIPPED)


@pytest.mark.parametrize("slots", [None, 2])
def test_a_bit_that_flips_in_shared_memory(tmp_path: Path, slots: int | None) -> None:
    """Between the trainer and its background process, which runs in a thread here."""
    fs = Flips(in_memory=True)
    trainer = Trainer(tmp_path, fs)
    trainer.begin(1, 4 * BLOCK, slots)
    trainer.fill(data(1, 4 * BLOCK))
    trainer.staged()
    assert isinstance(trainer.end(), Done)
    trainer.stop()
    assert fs.flipped == 1
    with pytest.raises(ChecksumMismatch):
        shardckpt.load(tmp_path)


# ---- readback


class BadDisk(FaultyFileSystem):
    """What is on the disk differs in one bit, at a byte of the file, from what the page cache shows of it."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self._at = at
        self._past_the_cache: set[int] = set()
        self._own = threading.Lock()

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        is_read = flags & os.O_ACCMODE == os.O_RDONLY
        # so that it does not matter on what the tests run
        fd = super().open(path, flags & ~os.O_DIRECT if is_read else flags, mode)
        with self._own:
            (self._past_the_cache.add if flags & os.O_DIRECT and is_read else self._past_the_cache.discard)(fd)
        return fd

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = super().preadv(fd, buffers, offset)
        if self._at is not None and fd in self._past_the_cache and offset <= self._at < offset + got:
            buffers[0][self._at - offset] ^= 0x10
        return got


def save_in_some_way(ckpt: shardckpt.Checkpointer, step: int, how: str, state: dict[str, Any]) -> SaveHandle:
    handle = ckpt.save(step, state, wait=how == "blocking", verify="readback")
    handle.result(PATIENCE)
    return handle


@pytest.mark.parametrize("how", OPTIONS)
def test_a_disk_that_has_something_else_than_the_page_cache(tmp_path: Path, how: str) -> None:
    at = HEADER_ALIGNMENT + 2 * CHUNK + 77
    with checkpointer(tmp_path, BadDisk(at), **OPTIONS[how]) as ckpt:
        with pytest.raises(ChecksumMismatch, match="read back otherwise than they were staged") as caught:
            save_in_some_way(ckpt, 1, how, large(3.4))
        assert caught.value.start <= at < caught.value.stop
        assert (caught.value.stop - caught.value.start) <= CHUNK
        assert caught.value.tensors == ["b"]
        assert caught.value.name.startswith("step-00000001/rank-")
        assert files(tmp_path) == []
        # which nobody sees who does not ask
        ckpt.save(2, large(3.4)).result(PATIENCE)
    assert equal(loaded(tmp_path, 2), large(3.4))


def test_a_header_that_is_read_back_otherwise(tmp_path: Path) -> None:
    with checkpointer(tmp_path, BadDisk(9)) as ckpt, pytest.raises(ChecksumMismatch, match="They hold the header") as caught:
        save_in_some_way(ckpt, 1, "blocking", large(0.1))
    assert (caught.value.start, caught.value.stop, caught.value.tensors) == (0, HEADER_ALIGNMENT, [])


class CutsFiles(FaultyFileSystem):
    """Loses the end of each file of a rank right after it was made durable."""

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        size = os.fstat(fd).st_size
        if size > CHUNK:
            os.truncate(fd, size - 1)


def test_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    with checkpointer(tmp_path, CutsFiles()) as ckpt, pytest.raises(TruncatedFile, match="do not trust this storage"):
        save_in_some_way(ckpt, 1, "staged", large(1.5))
    assert files(tmp_path) == []


@pytest.mark.parametrize("how", OPTIONS)
def test_a_good_disk(tmp_path: Path, how: str) -> None:
    with checkpointer(tmp_path, BadDisk(None), **OPTIONS[how]) as ckpt:
        for step, chunks in enumerate((3.4, 0.0, 2.0)):
            save_in_some_way(ckpt, step, how, large(chunks))
    for step, chunks in enumerate((3.4, 0.0, 2.0)):
        assert equal(loaded(tmp_path, step), large(chunks))


def read_back_on_two_ranks(root: str) -> list[CheckpointError]:
    """The disk of rank 1 is bad in the first two saves."""
    fs = BadDisk(HEADER_ALIGNMENT + 40)
    errors = []
    with checkpointer(root, fs) as ckpt:
        for step in (1, 2):
            fs._at = HEADER_ALIGNMENT + 40 if dist.get_rank() == 1 else None
            try:
                save_in_some_way(ckpt, step, "blocking" if step == 1 else "staged", {"own": PerRank(large(0.1))})
            except CheckpointError as error:
                errors.append(error)
        fs._at = None
        save_in_some_way(ckpt, 3, "staged", {"own": PerRank(large(0.1))})
    return errors


def test_the_bad_disk_of_one_rank_is_an_error_on_all(ranks: RankPool, tmp_path: Path) -> None:
    for errors in ranks.run(2, read_back_on_two_ranks, str(tmp_path), timeout=PATIENCE):
        assert [type(error) for error in errors] == [ChecksumMismatch] * 2
        for step, error in enumerate(errors, 1):
            assert error.name.startswith(f"{step_directory(step)}/rank-00001")
            assert error.start == HEADER_ALIGNMENT
    assert {name[:13] for name in files(tmp_path)} == {"step-00000003"}


@pytest.mark.parametrize("background", ["thread", "process"])
def test_readback_is_a_phase(tmp_path: Path, background: Any) -> None:
    heard: list[Event] = []
    options = shardckpt.Options(background=background, timeout=PATIENCE)
    with shardckpt.Checkpointer(tmp_path, on_event=heard.append, options=options) as ckpt:
        save_in_some_way(ckpt, 1, "staged", large(1.5))
    (event,) = [event for event in heard if event.phase == "readback"]
    assert event.bytes == next(entry.size for entry in LocalStore(tmp_path).list() if "rank-" in entry.name)
    assert event.seconds > 0
    (timed,) = [timed for timed in list_timings(open_checkpoint(LocalStore(tmp_path))) if timed.phase == "readback"]
    assert timed.seconds[0] == pytest.approx(event.seconds, abs=2e-6)
    assert timed.speed(0)


def test_one_call_reads_back_wherever_files_are_kept(tmp_path: Path) -> None:
    for url in (str(tmp_path), "memory://read-back"):
        heard: list[Event] = []
        saved = shardckpt.save(url, large(1.2), verify="readback", on_event=heard.append)
        assert [event.phase for event in heard if event.phase in ("fsync", "readback", "receipts")] == [
            "fsync",
            "readback",
            "receipts",
        ]
        assert shardckpt.load(url, expect_digest=saved.digest).step == 0


@pytest.mark.parametrize("value", ["read-back", True, "", 1])
def test_other_ways_to_verify_are_refused(tmp_path: Path, value: Any) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        for save in (lambda: ckpt.save(1, {}, verify=value), lambda: shardckpt.save(tmp_path, {}, verify=value)):
            with pytest.raises(ConfigError, match="take verify='readback', or leave it out"):
                save()
    assert files(tmp_path) == []
