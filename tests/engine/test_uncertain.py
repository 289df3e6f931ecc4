# SPDX-License-Identifier: Apache-2.0
"""Commits of which not all ranks learn the end: no rank removes files that a manifest may name."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardckpt
from shardckpt.coordinate import Coordinator
from shardckpt.errors import RankTimeout, StoreError
from shardckpt.options import Options
from shardckpt.saving import Saver
from shardckpt.store import LocalStore
from tests.ranks import RankDied, RankPool
from tests.store.faults import FaultyFileSystem

TIMEOUT = 1.0
STEP = "step-00000002/"


class SlowCommit(FaultyFileSystem):
    """Takes longer than the others wait."""

    def link(self, source: str, target: str) -> None:
        time.sleep(4 * TIMEOUT)
        super().link(source, target)


class DiesBeforeCommit(FaultyFileSystem):
    def link(self, source: str, target: str) -> None:
        os._exit(9)


class DiesAfterCommit(FaultyFileSystem):
    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        os._exit(9)


class FailsToFlush(FaultyFileSystem):
    """The manifest has its name, but the directory cannot be flushed: a power cut may take it back."""

    def link(self, source: str, target: str) -> None:
        super().link(source, target)
        self.fail_always("fsync", errno.EIO)


FAULTS = {kind.__name__: kind for kind in (SlowCommit, DiesBeforeCommit, DiesAfterCommit, FailsToFlush)}


def state(value: float) -> dict[str, Any]:
    return {"t": torch.full((4,), value), "own": shardckpt.PerRank(torch.full((2,), dist.get_rank() + value))}


def save_with(root: Path, fault: str, timeout: float) -> str:
    """A good first step, then one whose commit goes wrong on rank 0."""
    fs = FAULTS[fault]() if dist.get_rank() == 0 else FaultyFileSystem()
    with Coordinator.connect(timeout=30) as coordinator:
        Saver(coordinator, LocalStore(root), Options()).save("step-00000001/", 1, state(1.0), {})
    with Coordinator.connect(timeout=timeout) as coordinator:
        saver = Saver(coordinator, LocalStore(root, fs), Options())
        return saver.save(STEP, 2, state(2.0), {}).url


def files_of(root: Path, step: str) -> list[str]:
    return sorted(path.name.split("-")[1] if "rank" in path.name else path.name for path in (root / step).iterdir())


def test_a_slow_commit_is_not_undone_by_those_who_gave_up(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(3, save_with, tmp_path, "SlowCommit", TIMEOUT)
    assert outcomes[0] == str(tmp_path / STEP.rstrip("/"))
    for outcome in outcomes[1:]:
        assert isinstance(outcome, RankTimeout)
        assert outcome.ranks == [0]
    loaded = shardckpt.load(tmp_path)
    assert loaded.step == 2
    assert {rank: own.tolist() for rank, own in loaded.state["own"].items()} == {r: [r + 2.0] * 2 for r in range(3)}


def test_rank_0_dies_after_its_commit(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(2, save_with, tmp_path, "DiesAfterCommit", TIMEOUT)
    assert isinstance(outcomes[0], RankDied)
    assert isinstance(outcomes[1], RankTimeout)
    loaded = shardckpt.load(tmp_path)
    assert (loaded.step, loaded.state["t"].tolist()) == (2, [2.0] * 4)


def save_again(root: Path) -> int:
    with shardckpt.Checkpointer(root) as ckpt:
        target = state(0.0)
        restored = ckpt.restore(target)
        assert restored is not None
        ckpt.save(2, target, wait=True)
        return restored.step


def test_rank_0_dies_before_its_commit(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(2, save_with, tmp_path, "DiesBeforeCommit", TIMEOUT)
    assert isinstance(outcomes[0], RankDied)
    assert isinstance(outcomes[1], RankTimeout)
    assert "manifest.json" not in files_of(tmp_path, STEP)
    assert shardckpt.load(tmp_path).step == 1
    assert ranks.run(2, save_again, tmp_path) == [1, 1]
    loaded = shardckpt.load(tmp_path)
    assert (loaded.step, loaded.state["t"].tolist()) == (2, [1.0] * 4)


def test_a_commit_that_may_not_last_is_an_error_and_stays(ranks: RankPool, tmp_path: Path) -> None:
    for outcome in ranks.run_expecting_errors(2, save_with, tmp_path, "FailsToFlush", 30.0):
        assert isinstance(outcome, StoreError)
        assert outcome.outcome == "unknown"
        assert "verify the checkpoint before use" in str(outcome)
    assert files_of(tmp_path, STEP)[:2] == ["00000", "00001"]
    assert shardckpt.load(tmp_path).step == 2


def save_or_restore(root: str) -> None:
    with shardckpt.Checkpointer(root, options=Options(timeout=30)) as ckpt:
        if dist.get_rank():
            ckpt.restore(state(0.0))
        else:
            ckpt.save(1, state(1.0), wait=True)


def test_ranks_in_different_operations(ranks: RankPool, tmp_path: Path) -> None:
    for outcome in ranks.run_expecting_errors(2, save_or_restore, str(tmp_path)):
        assert isinstance(outcome, shardckpt.CoordinationError)
        assert "ranks are in different operations" in str(outcome)
        assert "all have to call the same" in str(outcome)
