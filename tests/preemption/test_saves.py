# SPDX-License-Identifier: Apache-2.0
"""A `Checkpointer` that saves when it is due, and one last time when a process is told to stop."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import AlreadyCommitted, CheckpointerClosed, ConfigError, RankTimeout
from shardckpt.store import LocalStore, Store
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

TERM = signal.SIGTERM


def a_state(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), float(step)), "step": step}


@pytest.fixture(autouse=True)
def term() -> Iterator[None]:
    """A process that leaves stays deaf, but the next test has to start as usual."""
    yield
    signal.signal(TERM, signal.SIG_DFL)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


class Gate(FaultyFileSystem):
    """A file system on which no file of a rank can be made before ``lifted`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.lifted = threading.Event()

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT and Path(path).name.startswith("rank-"):
            assert self.lifted.wait(60)
        return super().open(path, flags, mode)


def checkpointer(root: Path, fs: FaultyFileSystem, *, schedule: dict[str, Any] | None = None, **options: Any) -> Any:
    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> Store:
            return LocalStore(url, fs)

    return Injected(root, **(schedule or {}), options=shardckpt.Options(**options))


# --- one process


def test_without_a_schedule_should_save_says_what_to_give(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt, pytest.raises(ConfigError, match="should_save has nothing to go by: give the"):
        ckpt.should_save(1)
    with pytest.raises(CheckpointerClosed):
        ckpt.should_save(1)
    with pytest.raises(CheckpointerClosed):
        ckpt.on_signal(TERM)


def test_a_schedule_is_checked_before_anything_is_opened(root: Path) -> None:
    with pytest.raises(ConfigError, match="continuous and max_overhead do not go together"):
        shardckpt.Checkpointer(root, continuous=True, max_overhead=0.02)


def test_every_so_many_steps(root: Path) -> None:
    with shardckpt.Checkpointer(root, every_steps=5) as ckpt:
        for step in range(1, 18):
            if ckpt.should_save(step):
                ckpt.save(step, a_state(step))
    assert ckpt.steps() == [5, 10, 15]


def test_a_continuous_save_begins_when_the_last_one_is_durable(root: Path) -> None:
    gate = Gate()
    with checkpointer(root, gate, schedule={"continuous": True}) as ckpt:
        assert ckpt.should_save(1)
        handle = ckpt.save(1, a_state(1))
        assert not any(ckpt.should_save(step) for step in range(2, 50))
        gate.lifted.set()
        handle.result(60)
        assert ckpt.should_save(50)


def test_a_signal_makes_one_last_save_and_ends_the_process(root: Path) -> None:
    with pytest.raises(SystemExit) as caught, shardckpt.Checkpointer(root) as ckpt:
        ckpt.on_signal(TERM)
        for step in range(1, 100):
            if step == 7:
                signal.raise_signal(TERM)
                signal.raise_signal(TERM)
            if ckpt.should_save(step):
                ckpt.save(step, a_state(step))
    assert caught.value.code == 143
    assert ckpt.steps() == [7]


def test_the_last_save_waits_for_one_under_way_whatever_else_a_busy_one_means(root: Path) -> None:
    gate = Gate()
    with checkpointer(root, gate, when_busy="skip") as ckpt:
        ckpt.on_signal(TERM, leave=False)
        first = ckpt.save(1, a_state(1))
        signal.raise_signal(TERM)
        assert not ckpt.preempted
        assert ckpt.should_save(2)
        assert ckpt.preempted
        threading.Timer(0.1, gate.lifted.set).start()
        last = ckpt.save(2, a_state(2))
        assert (first.state, last.state) == ("durable", "durable")
        assert ckpt.steps() == [1, 2]
    assert signal.getsignal(TERM) == signal.SIG_DFL


def test_an_earlier_failure_does_not_cost_the_last_save(root: Path) -> None:
    fs = FaultyFileSystem()
    with pytest.raises(SystemExit), checkpointer(root, fs, on_error="raise") as ckpt:
        ckpt.on_signal(TERM)
        fs.fail("pwrite", errno.EIO)
        handle = ckpt.save(1, a_state(1))
        ckpt.wait()
        assert handle.state == "failed"
        signal.raise_signal(TERM)
        assert ckpt.should_save(2)
        ckpt.save(2, a_state(2))
    assert ckpt.steps() == [2]


def test_a_last_save_that_fails_is_an_error_and_no_promised_exit(root: Path) -> None:
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.on_signal(TERM)
        ckpt.save(1, a_state(1), wait=True)
        signal.raise_signal(TERM)
        assert ckpt.should_save(1)
        with pytest.raises(AlreadyCommitted):
            ckpt.save(1, a_state(1))


# --- several ranks


def train(root: Path, steps: int, victim: int | None, schedule: dict[str, Any]) -> tuple[list[int], Any]:
    """Steps of unequal length, each ended by a collective; what was saved, and the exit status."""
    rank, saved = dist.get_rank(), []
    try:
        with shardckpt.Checkpointer(root, **schedule) as ckpt:
            ckpt.on_signal(TERM)
            for step in range(1, steps + 1):
                # ranks need milliseconds to agree, and more on a busy machine: two steps shall be enough there, too
                time.sleep(0.1 if victim is not None and step >= 20 else 0.002 * rank)
                if rank == victim and step == 20:
                    os.kill(os.getpid(), TERM)
                dist.all_reduce(torch.ones(1))
                if ckpt.should_save(step):
                    saved.append(step)
                    ckpt.save(step, a_state(step))
    except SystemExit as leave:
        # this process gets another case
        signal.signal(TERM, signal.SIG_DFL)
        return saved, leave.code
    return saved, None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_ends_all_in_one_step(ranks: RankPool, root: Path, victim: int) -> None:
    outcomes = ranks.run(2, train, root, 1000, victim, {})
    ((step,), status), other = outcomes
    assert other == ([step], status)
    assert 20 <= step <= 22
    assert status == 143
    assert shardckpt.load(root).step == step


def lose_a_rank(root: Path) -> list[int] | None:
    """Rank 1 agrees on a step, and never comes to it."""
    with shardckpt.Checkpointer(root, options=shardckpt.Options(timeout=1.0)) as ckpt:
        ckpt.on_signal(TERM)
        missing = None
        if dist.get_rank() == 0:
            signal.raise_signal(TERM)
            step = 1
            while not ckpt.should_save(step):
                step += 1
            try:
                ckpt.save(step, a_state(step))
            except RankTimeout as error:
                missing = error.ranks
        dist.barrier()
    signal.signal(TERM, signal.SIG_DFL)
    return missing


def test_a_rank_that_does_not_come_to_the_agreed_step_is_named(ranks: RankPool, root: Path) -> None:
    assert ranks.run(2, lose_a_rank, root) == [[1], None]


@pytest.mark.parametrize("schedule", [{"continuous": True}, {"max_overhead": 0.3}, {"every_seconds": 0.1, "every_steps": 37}])
def test_ranks_save_the_same_steps_by_the_clock(ranks: RankPool, root: Path, schedule: dict[str, Any]) -> None:
    (saved, status), *others = ranks.run(3, train, root, 150, None, schedule)
    assert others == [(saved, None)] * 2
    assert status is None
    assert len(saved) >= 2
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.steps() == saved
