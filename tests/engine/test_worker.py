# SPDX-License-Identifier: Apache-2.0
"""The background process by its messages: what it does when it is told something, and when it is told nothing any more."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch

import shardckpt
from shardckpt.background.messages import Begin, Broken, Done, Gone, Line, Order, Report, Setup, Stop
from shardckpt.background.worker import Worker
from shardckpt.buffer import Buffer
from shardckpt.checksum import block_digests
from shardckpt.commit import draft_manifest
from shardckpt.errors import BackgroundDied, HostMemoryError, StorageFull
from shardckpt.failure import describe, rebuild
from shardckpt.feed import Failed, Filled, Staged, Written, num_chunks
from shardckpt.finish import Job
from shardckpt.header import safetensors_header
from shardckpt.hostmemory import HostMemory
from shardckpt.layout import Mesh, MeshLayout, Shard
from shardckpt.manifest import step_directory
from shardckpt.store import LocalStore
from tests.engine.simulate import by_hand, contents
from tests.engine.stores import Gate, files
from tests.engine.waiting import InThread
from tests.store.faults import FaultyFileSystem

BLOCK = 1 << 16
LAYOUT = Mesh((0,), (1,))


class Trainer:
    """The other end of a worker that runs in a thread here. A state of one tensor of bytes is staged by hand."""

    def __init__(self, root: Path, fs: FaultyFileSystem | None = None, trainer: int | None = None) -> None:
        ours, theirs = Pipe()
        self.line: Line[Report] = Line(ours, Report)
        self.memory = HostMemory(shared=True, available=lambda: None)
        assert self.memory.fd is not None
        setup = Setup(
            url=str(root), trainer=trainer or os.getppid(), rank=0, world_size=1, hosts=("here",), timeout=30, workers=2
        )
        worker_line: Line[Order] = Line(theirs, Order)
        worker = Worker(worker_line, self.memory.fd, setup, LocalStore(root, fs or FaultyFileSystem()))
        self.running = InThread(worker.run)
        self.buffer = Buffer(BLOCK)

    def begin(self, step: int, nbytes: int, slots: int | None = None) -> None:
        """Announce a save of so many bytes, by way of memory for ``slots`` blocks (None: for all of them)."""
        plan = by_hand(1, {"t": ("uint8", MeshLayout((nbytes,), LAYOUT, (Shard(0),)), (0, 1))}, BLOCK)
        attempt = f"{step:016x}"
        job = Job(
            prefix=f"{step_directory(step)}/",
            step=step,
            attempt=attempt,
            header=safetensors_header(plan.file_pieces(0)),
            block_size=BLOCK,
            draft=draft_manifest(plan, contents(step, attempt)),
        )
        self.slots = slots or max(1, num_chunks(nbytes, BLOCK))
        self.buffer = self.memory.reserve(self.slots * BLOCK, BLOCK)
        self.line.send(Begin(job=job, nbytes=nbytes, chunk=BLOCK, memory=self.slots * BLOCK, meeting=("", 0)))

    def fill(self, data: bytes) -> None:
        """Stage all of it."""
        slots = self.slots
        written: set[int] = set()
        for index, start in enumerate(range(0, len(data), BLOCK)):
            # two threads write, so chunks are not done in order
            while index >= slots and index - slots not in written:
                report = self.line.receive()
                assert isinstance(report, Written)
                written.add(report.index)
            part = data[start : start + BLOCK]
            at = index % slots * BLOCK
            self.buffer.bytes[at : at + len(part)] = part
            self.line.send(Filled(index, block_digests(memoryview(part), BLOCK)))

    def staged(self) -> None:
        self.line.send(Staged({}, {}))

    def end(self) -> Report | Gone:
        """What becomes of the save."""
        while isinstance(report := self.line.receive(), Written):
            pass
        return report

    def error(self) -> BaseException:
        report = self.end()
        assert isinstance(report, Broken)
        return rebuild(report.error)

    def stop(self) -> None:
        self.line.send(Stop())
        self.running.result()


def data(step: int, nbytes: int) -> bytes:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(256, (nbytes,), dtype=torch.uint8, generator=generator).numpy().tobytes()


def stored(root: Path, step: int) -> bytes:
    found: bytes = shardckpt.load(root / step_directory(step)).state["t"].numpy().tobytes()
    return found


@pytest.fixture
def fs() -> FaultyFileSystem:
    return FaultyFileSystem()


@pytest.fixture
def trainer(tmp_path: Path, fs: FaultyFileSystem) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path, fs)
    yield trainer
    trainer.stop()


def test_saves_of_all_sizes_through_any_memory(trainer: Trainer, tmp_path: Path) -> None:
    sizes = [(BLOCK * 3 + 7, None), (5, None), (0, None), (BLOCK * 9, 2), (BLOCK * 4 + 1, 1), (BLOCK * 12, None)]
    for step, (nbytes, slots) in enumerate(sizes):
        trainer.begin(step, nbytes, slots)
        trainer.fill(data(step, nbytes))
        trainer.staged()
        report = trainer.end()
        assert isinstance(report, Done)
        assert {"write", "fsync", "commit"} <= report.timings.keys() or not nbytes
        # what goes through little memory is hashed by who stages it
        assert ("hash" in report.timings) == (slots is None and nbytes > 0)
        assert shardckpt.load(tmp_path, expect_digest=report.digest).step == step
        assert stored(tmp_path, step) == data(step, nbytes)


def test_a_state_that_cannot_be_staged(trainer: Trainer, tmp_path: Path) -> None:
    trainer.begin(1, 3 * BLOCK, slots=1)
    trainer.fill(data(1, BLOCK))
    trainer.line.send(Failed(describe(HostMemoryError("no memory", bytes=7))))
    error = trainer.error()
    assert isinstance(error, HostMemoryError)
    assert error.bytes == 7
    assert files(tmp_path) == []


def test_a_disk_that_fails(trainer: Trainer, fs: FaultyFileSystem, tmp_path: Path) -> None:
    """It is told once, and news of the save that come after that do no harm to the next."""
    fs.fail("pwrite", errno.ENOSPC)
    trainer.begin(1, 3 * BLOCK, slots=3)
    assert isinstance(trainer.error(), StorageFull)
    trainer.fill(data(1, 3 * BLOCK))
    trainer.staged()
    trainer.begin(2, 2 * BLOCK)
    trainer.fill(data(2, 2 * BLOCK))
    trainer.staged()
    assert isinstance(trainer.end(), Done)
    assert stored(tmp_path, 2) == data(2, 2 * BLOCK)
    assert [name[:13] for name in files(tmp_path)] == ["step-00000002"] * 2


# ---- a trainer that is gone


def hang_up(trainer: Trainer) -> None:
    trainer.line.close()


def stop(trainer: Trainer) -> None:
    trainer.line.send(Stop())


@pytest.mark.parametrize("leave", [hang_up, stop])
@pytest.mark.parametrize("slots", [None, 2])
def test_what_is_staged_is_committed_without_the_trainer(
    tmp_path: Path, leave: Callable[[Trainer], None], slots: int | None
) -> None:
    gate = Gate(is_open=slots is not None)
    trainer = Trainer(tmp_path, gate)
    trainer.begin(1, 4 * BLOCK, slots)
    trainer.fill(data(1, 4 * BLOCK))
    trainer.staged()
    leave(trainer)
    gate.lift()
    trainer.running.result()
    assert stored(tmp_path, 1) == data(1, 4 * BLOCK)


@pytest.mark.parametrize("leave", [hang_up, stop])
@pytest.mark.parametrize("slots", [None, 2])
def test_what_is_not_staged_is_given_up(tmp_path: Path, leave: Callable[[Trainer], None], slots: int | None) -> None:
    """Though every chunk of it is filled: nobody has said that the state was not changed meanwhile."""
    trainer = Trainer(tmp_path)
    trainer.begin(1, 4 * BLOCK, slots)
    trainer.fill(data(1, 4 * BLOCK))
    leave(trainer)
    if leave is stop:
        error = trainer.error()
        assert isinstance(error, BackgroundDied)
        assert error.message == "the trainer of rank 0 ended before it had staged its state"
    trainer.running.result()
    assert files(tmp_path) == []


def test_a_trainer_that_left_before_anything(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    hang_up(trainer)
    trainer.running.result()


def test_a_trainer_that_is_dead_while_its_socket_lives_on(tmp_path: Path) -> None:
    """In a process that it has forked. All that it has said is heard first."""
    trainer = Trainer(tmp_path, trainer=-1)
    trainer.begin(1, 2 * BLOCK)
    trainer.fill(data(1, 2 * BLOCK))
    trainer.staged()
    assert isinstance(trainer.end(), Done)
    trainer.running.result()
    assert stored(tmp_path, 1) == data(1, 2 * BLOCK)
