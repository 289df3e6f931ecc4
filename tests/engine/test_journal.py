# SPDX-License-Identifier: Apache-2.0
"""The journal of a Checkpointer's saves, as ``shardckpt ls`` sees it; and saves whose journal fails."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import CheckpointNotFound, NotACheckpointRoot, StorageFull
from shardckpt.journal import DIRECTORY, SILENT_SECONDS
from shardckpt.maintain.listing import list_steps
from shardckpt.store import LocalStore
from tests.engine.stores import Gate, a_state, checkpointer, large
from tests.engine.waiting import InThread, until
from tests.ranks import RankDied, RankPool
from tests.store.faults import FaultyFileSystem


def states(root: Path) -> dict[int, str]:
    """State of each step."""
    try:
        return {found.step or 0: found.state for found in list_steps(LocalStore(root))}
    except CheckpointNotFound:
        return {}


def markers(root: Path) -> list[str]:
    """The steps and states of all markers."""
    return sorted(f"{path.name[:13]}{path.suffix}" for path in (root / DIRECTORY).glob("*"))


class Full(FaultyFileSystem):
    """Has no room for the rank files of some steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__()
        self._directories = {f"step-{step:08d}" for step in steps}

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT and Path(path).name.startswith("rank-") and Path(path).parent.name in self._directories:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().open(path, flags, mode)


class NoJournal(FaultyFileSystem):
    """One operation never works on the journal."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self._operation = operation

    def mkdir(self, path: str) -> None:
        self._refuse("mkdir", path)
        super().mkdir(path)

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        self._refuse("open", path)
        return super().open(path, flags, mode)

    def link(self, source: str, target: str) -> None:
        self._refuse("link", target)
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self._refuse("unlink", path)
        super().unlink(path)

    def _refuse(self, operation: str, path: str) -> None:
        if operation == self._operation and DIRECTORY in path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


# ---- the course of a save


def test_a_save_that_is_staged_is_listed_until_it_is_durable(tmp_path: Path) -> None:
    gate = Gate(is_open=False)
    with checkpointer(tmp_path, gate) as ckpt:
        handle = ckpt.save(1, a_state(1))
        until(lambda: states(tmp_path) == {1: "staged"})
        assert markers(tmp_path) == ["step-00000001.staged"]
        gate.lift()
        handle.result()
        assert states(tmp_path) == {1: "committed"}
        assert markers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("options", [{"stage": "none"}, {"host_memory_limit": 4 << 20}], ids=["no copy", "little memory"])
def test_a_save_that_is_never_staged_as_a_whole_is_requested(tmp_path: Path, options: dict[str, object]) -> None:
    gate = Gate(is_open=False)
    with checkpointer(tmp_path, gate, **options) as ckpt:
        # in a thread, because with little memory it waits for the writer
        saving = InThread(lambda: ckpt.save(1, large(3)))
        until(lambda: states(tmp_path) == {1: "requested"})
        gate.lift()
        saving.result().result()
    assert states(tmp_path) == {1: "committed"}


def test_a_failed_save_is_listed_until_a_newer_one_is_durable(tmp_path: Path) -> None:
    with checkpointer(tmp_path, Full(2, 3)) as ckpt:
        ckpt.save(1, a_state(1)).result()
        for step in (2, 3):
            ckpt.save(step, a_state(step))
            ckpt.wait()
        assert states(tmp_path) == {1: "committed", 2: "failed", 3: "failed"}
        problem = list_steps(LocalStore(tmp_path))[1].problem
        assert problem is not None
        assert problem.startswith("StorageFull: cannot create")
        assert "No space left on device" in problem
        ckpt.save(4, a_state(4)).result()
        assert states(tmp_path) == {1: "committed", 4: "committed"}
    assert not (tmp_path / DIRECTORY).exists()


def test_a_blocking_save_that_fails_is_listed(tmp_path: Path) -> None:
    with checkpointer(tmp_path, Full(1)) as ckpt:
        with pytest.raises(StorageFull):
            ckpt.save(1, a_state(1), wait=True)
        assert states(tmp_path) == {1: "failed"}
        ckpt.save(2, a_state(2), wait=True)
        assert states(tmp_path) == {2: "committed"}


def test_nothing_is_put_into_a_place_that_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    with checkpointer(tmp_path, FaultyFileSystem()) as ckpt:
        for wait in (True, False):
            with pytest.raises(NotACheckpointRoot):
                ckpt.save(1, a_state(1), wait=wait)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def save_on_ranks(root: str) -> list[str]:
    """What all ranks see of the journal while none can write."""
    gate = Gate(is_open=False)
    with checkpointer(root, gate) as ckpt:
        handle = ckpt.save(1, a_state(1))
        until(lambda: markers(Path(root)))
        dist.barrier()
        found = markers(Path(root))
        dist.barrier()
        gate.lift()
        handle.result()
    return found


def test_one_rank_writes_the_journal(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(3, save_on_ranks, str(tmp_path)) == [["step-00000001.staged"]] * 3
    assert markers(tmp_path) == []


# ---- a journal that fails


@pytest.mark.parametrize("operation", ["mkdir", "open", "link", "unlink"])
@pytest.mark.parametrize("wait", [True, False])
def test_saves_do_not_depend_on_the_journal(
    tmp_path: Path, operation: str, wait: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fs = NoJournal(operation)
    with checkpointer(tmp_path, fs, keep_last=2, on_error="raise") as ckpt:
        for step in (1, 2, 3):
            assert ckpt.save(step, a_state(step), wait=wait).result().step == step
        assert ckpt.steps() == [2, 3]
    assert "the journal cannot tell that step 1" in caplog.text


def test_a_failed_save_is_the_same_without_the_journal(tmp_path: Path) -> None:
    class NoRoom(Full, NoJournal):
        def __init__(self) -> None:
            NoJournal.__init__(self, "open")
            self._directories = {"step-00000001"}

    with checkpointer(tmp_path, NoRoom()) as ckpt:
        handle = ckpt.save(1, a_state(1))
        with pytest.raises(StorageFull):
            handle.result()
        assert ckpt.save(2, a_state(2)).result().step == 2
    assert states(tmp_path) == {2: "committed"}


# ---- runs that were killed


def be_killed(root: str) -> None:
    gate = Gate(is_open=False)
    ckpt = checkpointer(root, gate)
    ckpt.save(7, {"t": torch.ones(3)})
    gate.until_reached()
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_next_run_takes_the_markers_of_a_killed_one_away(ranks: RankPool, tmp_path: Path) -> None:
    (died,) = ranks.run_expecting_errors(1, be_killed, str(tmp_path), fresh=True)
    assert isinstance(died, RankDied)
    assert states(tmp_path) == {7: "staged"}
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(5, a_state(5)).result()
        assert markers(tmp_path) == ["step-00000007.staged"], "it may still be alive"
        (marker,) = (tmp_path / DIRECTORY).iterdir()
        long_ago = time.time() - SILENT_SECONDS - 60
        os.utime(marker, (long_ago, long_ago))
        assert states(tmp_path) == {5: "committed"}
        ckpt.save(6, a_state(6)).result()
    assert not (tmp_path / DIRECTORY).exists()


def test_a_step_that_was_killed_can_be_saved_again(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run_expecting_errors(1, be_killed, str(tmp_path), fresh=True)
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(7, a_state(7)).result()
    assert states(tmp_path) == {7: "committed"}
    assert not (tmp_path / DIRECTORY).exists()
