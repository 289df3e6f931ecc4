# SPDX-License-Identifier: Apache-2.0
"""Two ranks: errors, kills and hangs of each at every storage call of a save, and errors of each in a load of both."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch.distributed as dist

from shardckpt.coordinate import Coordinator
from shardckpt.errors import CheckpointError
from shardckpt.manifest import step_directory
from tests.engine.stores import checkpointer, equal, files
from tests.faults.forks import DIED, LONGEST, PATIENCE, Meeting, run_worlds
from tests.faults.saves import (
    ERRORS,
    KEPT,
    KINDS,
    NEXT,
    Ended,
    Fault,
    a_state,
    attempt,
    check,
    count_calls,
    faults,
    recover,
    save_together,
)
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LONGEST)]

_Value = TypeVar("_Value")

SHORT_PATIENCE = 2.0
"""Seconds that a rank waits for one that hangs."""


def make_root_of_two(template: Path, root: Path) -> list[str]:
    """A root of two ranks, ``template``, and a copy with one more step; this rank's calls for that one."""
    with Coordinator.connect(timeout=PATIENCE) as coordinator:
        for step in KEPT:
            save_together(coordinator, template, FaultyFileSystem(), step)
        coordinator.broadcast("copy", lambda: str(open_roots(template, [root])).encode())
        return count_calls(lambda fs: save_together(coordinator, root, fs))


def open_roots(template: Path, roots: Sequence[Path]) -> Sequence[Path]:
    """Copies of a root with a directory for one more step: which rank makes it is not up to us, nor who makes more calls."""
    for root in roots:
        shutil.copytree(template, root)
        (root / step_directory(NEXT)).mkdir()
    return roots


def save_with_errors(roots: Sequence[Path], planned: Sequence[Fault]) -> list[Ended]:
    outcomes = []
    with Coordinator.connect(timeout=PATIENCE) as coordinator:
        for root, fault in zip(roots, planned, strict=True):
            fs = FaultyFileSystem()
            if fault.rank == coordinator.rank:
                fault.on(fs)
            outcomes.append(attempt(fs, partial(save_together, coordinator, root, fs)))
    return outcomes


def require_same_error(own: Ended, others: Ended, fault: Fault) -> None:
    """Both ranks raise what happened to one of them, or none does."""
    assert (own.error, own.unknown) == (others.error, others.unknown)
    assert own.what in others.message
    assert not own.flushed_again
    if own.error and not own.unknown:
        assert own.error == ("StorageFull" if fault.kind in ("ENOSPC", "EDQUOT") else "StoreError")


def look(roots: Sequence[Path], planned: Sequence[Fault], outcomes: Sequence[Sequence[Any]], before: Sequence[str]) -> None:
    """What must hold after each attempt, seen by another process; then a run of one rank goes on."""
    for root, fault, both in zip(roots, planned, outcomes, strict=True):
        try:
            require_sound(root, fault, [outcome for outcome in both if isinstance(outcome, Ended)], before)
            step = recover(root)
            assert check(root) == [step - 1, step]
        except (AssertionError, CheckpointError) as error:
            raise AssertionError(f"after {fault}, {both}: {error}") from error
        shutil.rmtree(root)


def require_sound(root: Path, fault: Fault, outcomes: Sequence[Ended], before: Sequence[str]) -> None:
    steps = check(root)
    assert steps in ([1, 2], [1, 2, 3])
    for outcome in outcomes:
        if not outcome.error:
            assert NEXT in steps, "it was reported as saved"
        elif not outcome.unknown and outcome.error in ("StoreError", "StorageFull"):
            assert NEXT not in steps, "it was reported as not saved"
            if not fault.lasting:
                assert files(root) == before, "files of the attempt are left"


@pytest.fixture
def world(ranks: RankPool, tmp_path: Path) -> tuple[Path, list[list[str]]]:
    """A root of two ranks, and the calls of each in one more save."""
    template = tmp_path / "root"
    calls = ranks.run(2, make_root_of_two, template, tmp_path / "counted")
    [steps] = ranks.run(1, check, tmp_path / "counted")
    assert steps == [1, 2, 3]
    assert min(map(len, calls)) > 20
    return template, calls


def test_every_error_at_every_call_of_a_save(ranks: RankPool, tmp_path: Path, world: tuple[Path, list[list[str]]]) -> None:
    template, calls = world
    planned = [
        fault
        for rank in (0, 1)
        for fault in faults(calls[rank], (*ERRORS, "short"), rank=rank) + faults(calls[rank], ERRORS, lasting=True, rank=rank)
    ]
    roots = open_roots(template, [tmp_path / str(number) for number in range(len(planned))])
    outcomes = list(zip(*ranks.run(2, save_with_errors, roots, planned, timeout=LONGEST), strict=True))
    for fault, both in zip(planned, outcomes, strict=True):
        assert both[fault.rank].struck, fault
        require_same_error(both[fault.rank], both[1 - fault.rank], fault)
    ranks.run(1, look, roots, planned, outcomes, files(template), timeout=LONGEST, fresh=True)
    failed = [both for both in outcomes if both[0].error]
    print(f"two ranks: {len(planned)} faults at {len(calls[0])} and {len(calls[1])} calls, {len(failed)} failed saves")
    assert len(planned) > 2 * sum(map(len, calls))
    assert len(failed) > len(planned) / 2


class Hang:
    """A call that waits until the other rank has come to its end; made before the ranks are forked."""

    def __init__(self) -> None:
        self._pipe = os.pipe()

    def wait(self, operation: Callable[..., Any], *args: Any) -> Any:
        """Takes the place of a call."""
        os.read(self._pipe[0], 1)
        return operation(*args)

    def end(self) -> None:
        """Let it go on."""
        os.write(self._pipe[1], b"1")

    def close(self) -> None:
        for end in self._pipe:
            os.close(end)


def save_forked(roots: Sequence[Path], planned: Sequence[Fault], patience: Sequence[float]) -> list[list[Any]]:
    """Save to each root from two forked ranks, one of which is killed or hangs."""

    def job(root: Path, fault: Fault, meeting: Meeting, hang: Hang, rank: int) -> Ended:
        fs = FaultyFileSystem()
        if fault.rank == rank:
            fs.strike(fault.call, hang.wait if fault.kind == "hang" else KINDS[fault.kind])

        def act() -> None:
            # the other rank may be killed as soon as they have met
            with meeting.attend(rank) as coordinator:
                try:
                    save_together(coordinator, root, fs)
                finally:
                    if fault.rank != rank:
                        hang.end()

        return attempt(fs, act)

    worlds: list[list[Callable[[], Ended]]] = []
    shared: list[Meeting | Hang] = []
    for root, fault in zip(roots, planned, strict=True):
        meeting, hang = Meeting(patience), Hang()
        shared += [meeting, hang]
        worlds.append([partial(job, root, fault, meeting, hang, rank) for rank in range(2)])
    try:
        return run_worlds(worlds, together=planned[0].rank == 1, at_once=32)
    finally:
        for pipe in shared:
            pipe.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_at_every_call_of_a_save(
    ranks: RankPool, tmp_path: Path, world: tuple[Path, list[list[str]]], rank: int
) -> None:
    template, calls = world
    planned = faults(calls[rank], ("kill",), rank=rank)
    roots = open_roots(template, [tmp_path / str(number) for number in range(len(planned))])
    [outcomes] = ranks.run(1, save_forked, roots, planned, (PATIENCE, PATIENCE), timeout=LONGEST)
    for both in outcomes:
        assert both[rank] == DIED
        # rank 0 is missed at once; who waits for another rank is killed by the launcher
        assert both[1] == DIED if rank == 1 else (both[1].error, both[1].ranks) == ("RankTimeout", (0,))
    ranks.run(1, look, roots, planned, outcomes, files(template), timeout=LONGEST, fresh=True)
    print(f"two ranks: rank {rank} was killed at each of {len(planned)} calls")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_at_every_call_of_a_save(
    ranks: RankPool, tmp_path: Path, world: tuple[Path, list[list[str]]], rank: int
) -> None:
    """The other rank says who is missing; what hung goes on when that one has left, and harms nothing."""
    template, calls = world
    planned = faults(calls[rank], ("hang",), rank=rank)
    roots = open_roots(template, [tmp_path / str(number) for number in range(len(planned))])
    patience = (PATIENCE, SHORT_PATIENCE) if rank == 0 else (SHORT_PATIENCE, PATIENCE)
    [outcomes] = ranks.run(1, save_forked, roots, planned, patience, timeout=LONGEST)
    for fault, both in zip(planned, outcomes, strict=True):
        assert (both[1 - rank].error, both[1 - rank].ranks) == ("RankTimeout", (rank,)), (fault, both)
        assert both[rank].error in (("RankTimeout",) if rank == 1 else ("RankTimeout", "")), (fault, both)
    ranks.run(1, look, roots, planned, outcomes, files(template), timeout=LONGEST, fresh=True)
    print(f"two ranks: rank {rank} hung at each of {len(planned)} calls")


def restore_with_errors(root: Path, read_once: str) -> tuple[list[int], int, int]:
    """Restore with errors at each call of each rank; how many calls of each rank, faults, and restores that failed."""
    fs, rank = FaultyFileSystem(), dist.get_rank()
    with checkpointer(root, fs, workers=1, read_once=read_once) as ckpt:

        def restore() -> None:
            target = a_state(0, rank)
            restored = ckpt.restore(target)
            assert restored is not None
            wanted = a_state(restored.step, rank)
            assert equal(target.pop("own").value, wanted.pop("own").value)
            assert equal(target, wanted)

        restore()
        before = len(fs.calls)
        restore()
        calls = gather(fs.names()[before:])
        planned = [f for r in (0, 1) for f in faults(calls[r], (*ERRORS, "short"), rank=r)]
        failed = 0
        for fault in planned:
            fs.strike(fault.call if fault.rank == rank else sys.maxsize, KINDS[fault.kind])
            outcomes = gather(attempt(fs, restore))
            assert outcomes[fault.rank].struck
            assert outcomes[0].error == outcomes[1].error, (fault, outcomes)
            assert outcomes[fault.rank].what in outcomes[1 - fault.rank].message, (fault, outcomes)
            failed += bool(outcomes[0].error)
        restore()
    return [len(mine) for mine in calls], len(planned), failed


def gather(mine: _Value) -> list[_Value]:
    """What each rank has."""
    values: list[Any] = [None, None]
    dist.all_gather_object(values, mine)
    return values


@pytest.mark.parametrize("read_once", ["never", "always"])
def test_errors_at_every_call_of_a_restore(
    ranks: RankPool, tmp_path: Path, world: tuple[Path, list[list[str]]], read_once: str
) -> None:
    template, _ = world
    (calls, planned, failed), _ = ranks.run(2, restore_with_errors, template, read_once, timeout=LONGEST)
    print(f"two ranks, read_once={read_once!r}: {planned} faults at {calls} calls of a restore, {failed} failed")
    assert min(calls) > 3
    assert planned > sum(calls)
    assert sum(calls) / 2 < failed < planned
