# SPDX-License-Identifier: Apache-2.0
"""Saves on real ranks: plans are kept, faults raise the same error everywhere and leave nothing behind."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointError,
    RankFailed,
    RankTimeout,
    ReplicaDivergence,
    StorageFull,
    StoreError,
)
from shardckpt.manifest import step_directory
from shardckpt.options import Options
from shardckpt.saving import Saver
from shardckpt.store import LocalStore
from tests.engine.recording import connect
from tests.ranks import RankDied, RankPool
from tests.store.faults import FaultyFileSystem

FULL = ["save: tables", "save: distinct tables", "save: write"]
SHORT = ["save: tables", "save: write"]


def state_of(numel: int, **more: Any) -> dict[str, Any]:
    rank = dist.get_rank()
    return {"t": torch.arange(numel, dtype=torch.float32), "own": shardckpt.PerRank(torch.full((3,), rank)), **more}


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def save_states(root: Path, states: list[dict[str, Any]]) -> list[list[str]]:
    """Save one state after the other; the rounds that each took."""
    rounds = []
    with connect() as coordinator:
        saver = Saver(coordinator, LocalStore(root), Options(timeout=30))
        for step, state in enumerate(states):
            saver.save(f"{step_directory(step)}/", step, state_of(**state), {})
            rounds.append(coordinator.labels())
    return rounds


def test_plans_are_used_again_until_the_structure_changes(ranks: RankPool, tmp_path: Path) -> None:
    """Values may change, shapes and names may not. Each checkpoint holds its own state."""
    states: list[dict[str, Any]] = [
        {"numel": 1000, "lr": 0.1},
        {"numel": 1000, "lr": 0.05},
        {"numel": 1001, "lr": 0.05},
        {"numel": 1001, "lr": "now a text"},
        {"numel": 1001, "new": 1},
        {"numel": 1001, "extra": torch.zeros(2)},
    ]
    for rounds in ranks.run(2, save_states, tmp_path, states):
        assert rounds == [FULL, SHORT, FULL, SHORT, FULL, FULL]
    for step, state in enumerate(states):
        loaded = shardckpt.load(tmp_path / step_directory(step)).state
        assert loaded["t"].tolist() == list(range(state["numel"]))
        assert {key: value.tolist() for key, value in loaded["own"].items()} == {0: [0] * 3, 1: [1] * 3}
        assert loaded.get("lr") == state.get("lr")
        assert loaded.keys() == {"t", "own"} | state.keys() - {"numel"}


# ---- faults on one rank


def save_with_fault(root: Path, bad: int, operation: str, code: int, nth: int) -> list[list[str]]:
    """A good save, one with a fault on rank ``bad``, and a good one again with the same saver."""
    fs = FaultyFileSystem()
    left = []
    with connect() as coordinator:
        saver = Saver(coordinator, LocalStore(root, fs), Options(timeout=30))
        saver.save("step-00000001/", 1, state_of(5000), {})
        if coordinator.rank == bad:
            fs.fail(operation, code, nth)
        try:
            saver.save("step-00000002/", 2, state_of(5000), {})
        except CheckpointError as error:
            dist.barrier()
            left.append(files(root / "step-00000002"))
            dist.barrier()
            saver.save("step-00000002/", 2, state_of(5000), {})
            left.append(files(root / "step-00000002"))
            raise type(error)(error.message, **error.details, left=left) from None
    return left


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize(
    ("operation", "code", "kind"),
    [
        ("open", errno.EACCES, StoreError),
        ("pwrite", errno.ENOSPC, StorageFull),
        ("pwrite", errno.EDQUOT, StorageFull),
        ("pwrite", errno.EIO, StoreError),
        ("fsync", errno.EIO, StoreError),
    ],
)
def test_a_failing_disk_of_one_rank(
    ranks: RankPool, tmp_path: Path, bad: int, operation: str, code: int, kind: type[CheckpointError]
) -> None:
    outcomes = ranks.run_expecting_errors(3, save_with_fault, tmp_path, bad, operation, code, 1)
    for outcome in outcomes:
        assert isinstance(outcome, kind), outcome
        before, after = outcome.left
        assert before == []
        assert len(after) == 4
    assert len({outcome.message.removeprefix(f"rank {bad}: ") for outcome in outcomes}) == 1
    assert [shardckpt.load(tmp_path / step_directory(step)).step for step in (1, 2)] == [1, 2]


class PublishFault(FaultyFileSystem):
    """Fails when the manifest gets its name."""

    def link(self, source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_without_commit(root: Path) -> list[str]:
    with connect() as coordinator:
        saver = Saver(coordinator, LocalStore(root, PublishFault()), Options(timeout=30))
        try:
            saver.save("step-00000002/", 2, state_of(10), {})
        except StorageFull:
            dist.barrier()
            return files(root)
    raise AssertionError("the save went through")


def test_a_commit_that_fails_removes_the_files_of_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, save_without_commit, tmp_path) == [[], []]


# ---- ranks that differ, fail, hang or die


def save_on(root: str, plan: dict[int, str], timeout: float) -> Any:
    """Save while the ranks in ``plan`` misbehave."""
    rank = dist.get_rank()
    behaviour = plan.get(rank, "")
    with shardckpt.Checkpointer(root, options=Options(timeout=timeout)) as ckpt:
        state: dict[str, Any] = {"t": torch.ones(4), "v": 3}
        ckpt.save(1, state, wait=True)
        if behaviour == "late":
            time.sleep(3 * timeout)
            return None
        if behaviour == "dies":
            os._exit(9)
        if behaviour == "raises":
            state["bad"] = Raises()
        if behaviour == "differs":
            state["t"][2] = 7
        ckpt.save(2, state, wait=True)
    return None


class Raises:
    """Has state, but cannot say which."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_a_rank_that_fails_is_heard_by_all(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(3, save_on, str(tmp_path), {1: "raises"}, 30.0)
    assert isinstance(outcomes[1], KeyError)
    for rank in (0, 2):
        assert isinstance(outcomes[rank], RankFailed)
        assert outcomes[rank].rank == 1
        assert "no state today" in outcomes[rank].message
    assert shardckpt.load(tmp_path).step == 1
    assert not (tmp_path / step_directory(2)).exists()


def test_a_late_rank_is_named(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(3, save_on, str(tmp_path), {2: "late"}, 1.0)
    for rank in (0, 1):
        assert isinstance(outcomes[rank], RankTimeout), outcomes[rank]
        assert outcomes[rank].ranks == [2]
        assert "'save: tables': no word from rank 2" in outcomes[rank].message
    assert shardckpt.load(tmp_path).step == 1


def test_a_dead_rank_is_named(ranks: RankPool, tmp_path: Path) -> None:
    outcomes = ranks.run_expecting_errors(3, save_on, str(tmp_path), {1: "dies"}, 1.5)
    assert isinstance(outcomes[1], RankDied)
    for rank in (0, 2):
        assert isinstance(outcomes[rank], RankTimeout), outcomes[rank]
        assert outcomes[rank].ranks == [1]
    assert shardckpt.load(tmp_path).step == 1


def test_replicas_that_differ_are_named(ranks: RankPool, tmp_path: Path) -> None:
    for outcome in ranks.run_expecting_errors(3, save_on, str(tmp_path), {1: "differs"}, 30.0):
        assert isinstance(outcome, ReplicaDivergence)
        assert outcome.names == ["t"]
        assert outcome.ranks == [0, 1]
        assert "'t' differs between ranks [0, 2] and ranks [1]" in outcome.message
        assert "PerRank(...)" in outcome.message
    assert shardckpt.load(tmp_path).step == 1
    assert not (tmp_path / step_directory(2)).exists()


# ---- two jobs on one step


def save_step_twice(root: str) -> str:
    with shardckpt.Checkpointer(root, options=Options(timeout=30)) as ckpt:
        ckpt.save(1, {"t": torch.ones(4)}, wait=True)
        try:
            ckpt.save(1, {"t": torch.zeros(4)}, wait=True)
        except AlreadyCommitted as error:
            return str(error)
    return ""


def test_a_step_is_saved_once(ranks: RankPool, tmp_path: Path) -> None:
    for message in ranks.run(2, save_step_twice, str(tmp_path)):
        assert "already has a committed checkpoint at 'step-00000001/'" in message
    assert len(files(tmp_path)) == 3
    assert shardckpt.load(tmp_path).state["t"].tolist() == [1.0] * 4


class Race(FaultyFileSystem):
    """Lets another job commit the step just before this one does."""

    def __init__(self, winner: Path, root: Path) -> None:
        super().__init__()
        self.winner, self.root = winner, root

    def link(self, source: str, target: str) -> None:
        step = self.root / "step-00000001"
        for path in self.winner.glob("step-00000001/*"):
            os.link(path, step / path.name)
        super().link(source, target)


def save_and_lose(root: Path, winner: Path) -> list[str]:
    with connect() as coordinator:
        saver = Saver(coordinator, LocalStore(root, Race(winner, root)), Options(timeout=30))
        try:
            saver.save("step-00000001/", 1, {"t": torch.zeros(4)}, {})
        except AlreadyCommitted:
            dist.barrier()
            return files(root)
    raise AssertionError("both jobs have committed")


def test_of_two_jobs_one_wins_and_the_other_cleans_up(ranks: RankPool, tmp_path: Path) -> None:
    winner, root = tmp_path / "winner", tmp_path / "root"
    with shardckpt.Checkpointer(winner) as ckpt:
        ckpt.save(1, {"t": torch.ones(4)}, wait=True)
    (step,) = winner.iterdir()
    expected = [f"step-00000001/{name}" for name in files(step)]
    assert ranks.run(2, save_and_lose, root, winner) == [expected, expected]
    assert shardckpt.load(root).state["t"].tolist() == [1.0] * 4
