# SPDX-License-Identifier: Apache-2.0
"""SIGSTOP of one rank in each phase of a save: the others give up in time and name it, and nothing is mixed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Options
from shardckpt.errors import CheckpointError, RankTimeout
from tests.engine.phases import Phased
from tests.engine.stores import checkpointer, files
from tests.engine.test_process import background_process
from tests.engine.waiting import until
from tests.ranks import RankPool, meet

PATIENT = 120.0
TIMEOUT = 4.0
"""Seconds after which the others give up. All that they do in them is to wait: they meet before."""
WORLD_SIZE = 4

Outcome = int | CheckpointError
"""Step of a save that was committed, or its error."""


class Stopping(Phased):
    """Stops the process in a phase of its next save, if there is one; until it is told to go on, from outside.

    Ranks that are not stopped wait for each other when they have written, as who is late by himself would be named too.
    """

    def __init__(self, root: str, phase: str | None, writers: int) -> None:
        super().__init__(root)
        self._phase = phase
        self._writers = writers

    def _reach(self, phase: str) -> None:
        if phase == self._phase:
            self._phase = None
            os.kill(os.getpid(), signal.SIGSTOP)
        if phase == "receipt" and self._writers:
            come_together("written", self._writers)


def a_part(step: int) -> dict[str, Any]:
    """A state of which each rank has a part of its own, and all have one together."""
    return {"t": torch.full((100,), float(step)), "own": shardckpt.PerRank(torch.full((1000,), 10 * step + dist.get_rank()))}


def come_together(place: str, count: int) -> None:
    """Wait for so many ranks."""
    store = dist.distributed_c10d._get_default_store()
    store.add(place, 1)
    until(lambda: store.add(place, 0) >= count, PATIENT)


def resume(pid: int, givers_up: int) -> None:
    """When the others have given up: let a process go on that has stopped."""
    store = dist.distributed_c10d._get_default_store()
    if store.add("gave up", 1) == givers_up:
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, PATIENT)
        os.kill(pid, signal.SIGCONT)


def outcome_of(save: Callable[[], shardckpt.SaveHandle]) -> Outcome:
    try:
        return save().result(PATIENT).step
    except CheckpointError as error:
        return error


def save_beside_a_stopped_rank(root: str, phase: str, victim: int, wait: bool) -> tuple[Outcome, list[int]]:
    """What becomes of save 2, and the steps that are there after one more save by a new checkpointer."""
    rank = dist.get_rank()
    pids: list[int] = [0] * WORLD_SIZE
    dist.all_gather_object(pids, os.getpid())
    with shardckpt.Checkpointer(root, options=Options(timeout=PATIENT)) as ckpt:
        ckpt.save(1, a_part(1), wait=True)
    writers = {"tables": 0, "commit": WORLD_SIZE}.get(phase, 0 if rank == victim else WORLD_SIZE - 1)
    fs = Stopping(root, phase if rank == victim else None, writers)
    meet("open")
    with checkpointer(root, fs, timeout=TIMEOUT) as ckpt:
        meet("save")
        if phase == "tables" and rank == victim:
            os.kill(os.getpid(), signal.SIGSTOP)
        found = outcome_of(lambda: ckpt.save(2, a_part(2), wait=wait))
        if rank != victim:
            resume(pids[victim], WORLD_SIZE - 1)
        meet("over")
    with shardckpt.Checkpointer(root, options=Options(timeout=PATIENT)) as ckpt:
        ckpt.save(3, a_part(3), wait=True)
        return found, ckpt.steps()


def require_whole(root: Path, steps: list[int]) -> None:
    """These steps are there with their values, and no files but theirs."""
    for step in steps:
        state = shardckpt.load(root / f"step-{step:08}").state
        assert state["t"].tolist() == [float(step)] * 100
        assert {rank: own.unique().tolist() for rank, own in state["own"].items()} == {
            rank: [10 * step + rank] for rank in range(len(state["own"]))
        }
    names = [(name[:13], name[14:].split("-")[0]) for name in files(root)]
    assert names == [(f"step-{step:08}", kind) for step in steps for kind in ["manifest.json"] + ["rank"] * len(state["own"])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "victim", "wait"),
    [("tables", 2, True), ("writing", 3, True), ("writing", 1, False), ("receipt", 2, True)],
)
def test_the_others_name_it_and_it_learns_why(ranks: RankPool, tmp_path: Path, phase: str, victim: int, wait: bool) -> None:
    """All have the same error, the stopped rank too when it goes on."""
    for error, steps in ranks.run(WORLD_SIZE, save_beside_a_stopped_rank, str(tmp_path), phase, victim, wait, timeout=250):
        assert isinstance(error, RankTimeout)
        assert error.ranks == [victim]
        assert f"no word from rank {victim} (" in error.message
        assert f"within {TIMEOUT:g} s" in error.message
        assert steps == [1, 3]
    require_whole(tmp_path, [1, 3])


@pytest.mark.slow
def test_rank_0_before_it_begins(ranks: RankPool, tmp_path: Path) -> None:
    """The others have left when it goes on: nothing is committed."""
    found = ranks.run(WORLD_SIZE, save_beside_a_stopped_rank, str(tmp_path), "tables", 0, True, timeout=250)
    for rank, (error, steps) in enumerate(found):
        assert isinstance(error, RankTimeout)
        assert error.ranks == ([0] if rank else [1, 2, 3])
        assert steps == [1, 3]
    require_whole(tmp_path, [1, 3])


@pytest.mark.slow
def test_rank_0_before_it_commits(ranks: RankPool, tmp_path: Path) -> None:
    """It has all receipts, so it commits when it goes on. The others could not know, and have left their files in place."""
    found = ranks.run(WORLD_SIZE, save_beside_a_stopped_rank, str(tmp_path), "commit", 0, True, timeout=250)
    assert found[0] == (2, [1, 2, 3])
    for error, steps in found[1:]:
        assert isinstance(error, RankTimeout)
        assert error.ranks == [0]
        assert steps == [1, 2, 3]
    require_whole(tmp_path, [1, 2, 3])


def save_beside_a_slow_rank(root: str, phase: str, victim: int) -> int:
    """A rank stops while it saves in the background, and goes on before anybody loses patience."""
    pids: list[int] = [0] * WORLD_SIZE
    dist.all_gather_object(pids, os.getpid())
    rank = dist.get_rank()
    fs = Stopping(root, phase if rank == victim else None, 0)
    with checkpointer(root, fs, timeout=PATIENT) as ckpt:
        handle = ckpt.save(1, a_part(1))
        if rank == (victim + 1) % WORLD_SIZE:
            resume(pids[victim], 1)
        return handle.result(PATIENT).step


@pytest.mark.parametrize(("phase", "victim"), [("writing", 3), ("receipt", 1), ("commit", 0)])
def test_who_goes_on_in_time_costs_nothing(ranks: RankPool, tmp_path: Path, phase: str, victim: int) -> None:
    assert ranks.run(WORLD_SIZE, save_beside_a_slow_rank, str(tmp_path), phase, victim, timeout=250) == [1] * WORLD_SIZE
    require_whole(tmp_path, [1])


def save_beside_a_stopped_process(root: str) -> tuple[Outcome, Outcome]:
    """The background process of rank 1 stands still."""
    rank = dist.get_rank()
    with shardckpt.Checkpointer(root, options=Options(timeout=PATIENT)) as ckpt:
        ckpt.save(1, a_part(1), wait=True)
    meet("open")
    with shardckpt.Checkpointer(root, options=Options(timeout=TIMEOUT, background="process")) as ckpt:
        process = background_process()
        pids: list[int] = [0, 0]
        if rank == 0:
            # it takes seconds to start, and rank 1 would wait for them in the save
            ckpt._background._carrier._process.wait_for_port()  # type: ignore[attr-defined]
        else:
            process.suspend()
        dist.all_gather_object(pids, process.pid)
        handle = ckpt.save(2, a_part(2))
        found = outcome_of(lambda: handle)
        if rank == 0:
            resume(pids[1], 1)
        meet("over")
    with shardckpt.Checkpointer(root, options=Options(timeout=PATIENT)) as ckpt:
        return found, outcome_of(lambda: ckpt.save(3, a_part(3), wait=True))


@pytest.mark.slow
def test_a_background_process(ranks: RankPool, tmp_path: Path) -> None:
    (error, later), (own, also_later) = ranks.run(2, save_beside_a_stopped_process, str(tmp_path), timeout=250, fresh=True)
    assert isinstance(error, RankTimeout)
    assert error.ranks == [1]
    assert isinstance(own, RankTimeout)
    assert own.ranks in ([0], [1])
    assert later == also_later == 3
    require_whole(tmp_path, [1, 3])
