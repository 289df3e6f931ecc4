# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in the background surfaces on every rank, once, and harms nothing that was committed before."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Options
from shardckpt.background.background import Background
from shardckpt.device_staging import DeviceCopies, DeviceStaging
from shardckpt.errors import (
    AlreadyCommitted,
    CheckpointerClosed,
    CheckpointError,
    RankFailed,
    ReplicaDivergence,
    StorageFull,
    StoreError,
)
from tests.engine.stores import Gate, a_state, checkpointer, files, loaded
from tests.engine.waiting import PATIENCE, InThread, until_blocked
from tests.ranks import RankPool
from tests.store.faults import FaultyFileSystem

Found = Mapping[str, Any]


def error_of(call: Callable[[], object]) -> CheckpointError | None:
    """What ``call`` raises."""
    try:
        call()
    except CheckpointError as error:
        return error
    return None


def a_part(step: int, **more: Any) -> dict[str, Any]:
    """A state of which each rank has a part of its own, so that each writes."""
    return a_state(step, rank=shardckpt.PerRank(torch.full((3,), dist.get_rank() + step)), **more)


# ---- on several ranks


def save_on_full_disk(root: str, bad: int, on_error: str) -> Found:
    """Step 2 of four fails on rank ``bad``, in the background."""
    fs = FaultyFileSystem()
    raised = []
    with checkpointer(root, fs, on_error=on_error, keep_last=2) as ckpt:
        handles = [ckpt.save(1, a_part(1))]
        handles[0].result(PATIENCE)
        if dist.get_rank() == bad:
            fs.fail("pwrite", errno.ENOSPC)
        handles.append(ckpt.save(2, a_part(2)))
        state_at_return = handles[1].state
        for step in (3, 4):
            error = error_of(lambda step=step: handles.append(ckpt.save(step, a_part(step))))  # type: ignore[misc]
            raised.append(error)
        ckpt.wait()
        dist.barrier()
        left = files(root)
        dist.barrier()
        handles.append(ckpt.save(5, a_part(5)))
    return {
        "state_at_return": state_at_return,
        "raised": raised,
        "states": {handle.step: handle.state for handle in handles},
        "left": sorted({name[:13] for name in left}),
        "result": [error_of(handles[1].result), handles[1].error],
    }


@pytest.mark.parametrize("bad", [0, 2])
def test_a_full_disk_is_a_warning(ranks: RankPool, tmp_path: Path, bad: int) -> None:
    """The older checkpoints stay, the newer ones come, and the handle tells."""
    for found in ranks.run(3, save_on_full_disk, str(tmp_path), bad, "warn"):
        assert found["state_at_return"] == "staged"
        assert found["raised"] == [None, None]
        assert found["states"] == {1: "durable", 2: "failed", 3: "durable", 4: "durable", 5: "durable"}
        assert found["left"] == ["step-00000003", "step-00000004"]
        for error in found["result"]:
            assert isinstance(error, StorageFull)
            assert "No space left" in error.message
    assert {name[:13] for name in files(tmp_path)} == {"step-00000004", "step-00000005"}


@pytest.mark.parametrize("bad", [0, 2])
def test_a_full_disk_ends_training_if_that_is_wanted(ranks: RankPool, tmp_path: Path, bad: int) -> None:
    """At the next call on all ranks, which saves nothing; and not a second time."""
    for found in ranks.run(3, save_on_full_disk, str(tmp_path), bad, "raise"):
        assert found["states"] == {1: "durable", 2: "failed", 4: "durable", 5: "durable"}
        third, fourth = found["raised"]
        assert isinstance(third, StorageFull)
        assert fourth is None
        assert found["left"] == ["step-00000001", "step-00000004"]
    assert {name[:13] for name in files(tmp_path)} == {"step-00000004", "step-00000005"}


def save_what_differs(root: str) -> list[CheckpointError | None]:
    with checkpointer(root, FaultyFileSystem()) as ckpt:
        state = a_part(1, replicated=torch.ones(4))
        ckpt.save(1, state)
        state["replicated"][2] += dist.get_rank()
        return [error_of(ckpt.save(2, state).result)]


def test_replicas_that_differ(ranks: RankPool, tmp_path: Path) -> None:
    for (error,) in ranks.run(3, save_what_differs, str(tmp_path)):
        assert isinstance(error, ReplicaDivergence)
        assert error.names == ["replicated"]
    assert {name[:13] for name in files(tmp_path)} == {"step-00000001"}


def be_overtaken(root: str, winner: str) -> list[Any]:
    """Somebody else commits step 2 while this job is about to write it."""
    gate = Gate()
    with checkpointer(root, gate, on_error="raise") as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        gate.lower()
        handle = ckpt.save(2, a_part(2))
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(root) / "step-00000002").mkdir(exist_ok=True)
            for path in Path(winner).glob("step-00000002/*"):
                path.rename(Path(root) / "step-00000002" / path.name)
        dist.barrier()
        gate.lift()
        return [error_of(handle.result), error_of(lambda: ckpt.save(3, a_part(3))), ckpt.steps()]


def test_a_step_that_another_job_commits_meanwhile(ranks: RankPool, tmp_path: Path) -> None:
    """Whoever has seen the error in the handle does not get it again."""
    winner, root = tmp_path / "winner", tmp_path / "root"
    with shardckpt.Checkpointer(winner) as ckpt:
        ckpt.save(2, {"theirs": torch.ones(3)})
    for error, again, steps in ranks.run(2, be_overtaken, str(root), str(winner)):
        assert isinstance(error, AlreadyCommitted)
        assert (again, steps) == (None, [1, 2])
    assert loaded(root, 2)["theirs"].tolist() == [1.0] * 3
    assert [name[:13] for name in files(root)] == ["step-00000001"] * 3 + ["step-00000002"] * 2 + ["step-00000003"] * 3


class Interrupted(DeviceStaging):
    """Ctrl-C comes while the state is copied."""

    is_armed = False

    def start(self, *args: Any, **options: Any) -> DeviceCopies:
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt
        return super().start(*args, **options)


def interrupt_staging(root: str) -> list[Any]:
    """Rank 1 is interrupted in its second save."""
    staging = Interrupted()

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _make_device_staging() -> DeviceStaging:
            return staging

    found: list[Any] = []
    with Injected(root, options=Options(timeout=PATIENCE)) as ckpt:
        ckpt.save(1, a_part(1))
        staging.is_armed = dist.get_rank() == 1
        try:
            found.append(error_of(ckpt.save(2, a_part(2)).result))
        except KeyboardInterrupt as interrupt:
            found.append(interrupt)
        found.append(ckpt.save(3, a_part(3)).result(PATIENCE).step)
    return found


def test_ctrl_c_on_one_rank_is_heard_by_all(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks.run(2, interrupt_staging, str(tmp_path))
    assert isinstance(first[0], RankFailed)
    assert first[0].rank == 1
    assert isinstance(second[0], KeyboardInterrupt)
    assert (first[1], second[1]) == (3, 3)
    assert {name[:13] for name in files(tmp_path)} == {"step-00000001", "step-00000003"}


# ---- where and how often


@pytest.fixture
def fs() -> FaultyFileSystem:
    return FaultyFileSystem()


def fail_once(ckpt: shardckpt.Checkpointer, fs: FaultyFileSystem, step: int) -> shardckpt.SaveHandle:
    """Save ``step``; it has failed, and nobody has looked."""
    fs.fail("pwrite", errno.ENOSPC)
    handle = ckpt.save(step, a_state(step))
    ckpt.wait()
    return handle


def test_an_error_that_nobody_has_seen_is_raised_at_the_end(tmp_path: Path, fs: FaultyFileSystem) -> None:
    ckpt = checkpointer(tmp_path, fs, on_error="raise")
    ckpt.save(1, a_state(1)).result()
    fail_once(ckpt, fs, 2)
    with pytest.raises(StorageFull):
        ckpt.close()
    ckpt.close()
    with pytest.raises(CheckpointerClosed):
        ckpt.save(3, a_state(3))
    with pytest.raises(StorageFull), checkpointer(tmp_path, fs, on_error="raise") as ckpt:
        fail_once(ckpt, fs, 2)


def test_a_restore_raises_it_too(tmp_path: Path, fs: FaultyFileSystem) -> None:
    with checkpointer(tmp_path, fs, on_error="raise") as ckpt:
        ckpt.save(1, a_state(1)).result()
        fail_once(ckpt, fs, 2)
        target = a_state(0)
        with pytest.raises(StorageFull):
            ckpt.restore(target)
        restored = ckpt.restore(target)
        assert restored is not None
        assert (restored.step, target["step"]) == (1, 1)


def test_an_error_that_was_seen_is_not_raised_again(tmp_path: Path, fs: FaultyFileSystem) -> None:
    with checkpointer(tmp_path, fs, on_error="raise") as ckpt:
        ckpt.save(1, a_state(1)).result()
        with pytest.raises(StorageFull):
            fail_once(ckpt, fs, 2).result()
        ckpt.save(3, a_state(3))
    assert ckpt.steps() == [1, 3]


def test_it_does_not_hide_what_ends_the_block(tmp_path: Path, fs: FaultyFileSystem) -> None:
    with pytest.raises(ZeroDivisionError), checkpointer(tmp_path, fs, on_error="raise") as ckpt:
        ckpt.save(1, a_state(1)).result()
        fail_once(ckpt, fs, 2)
        print(1 // 0)


def test_a_warning_is_logged_once_as_an_error(tmp_path: Path, fs: FaultyFileSystem, caplog: pytest.LogCaptureFixture) -> None:
    with checkpointer(tmp_path, fs) as ckpt:
        ckpt.save(1, a_state(1)).result()
        fail_once(ckpt, fs, 2)
        ckpt.save(3, a_state(3))
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(f"the save of step 2 in {tmp_path} failed: StorageFull: ")


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_errors_of_storage_in_the_call(tmp_path: Path, fs: FaultyFileSystem, on_error: str, wait: bool) -> None:
    """Which a blocking save always raises; and none of them is raised again."""
    with checkpointer(tmp_path, fs, on_error=on_error) as ckpt:
        ckpt.save(1, a_state(1)).result()
        # whether the step is there already
        fs.replace("open", lambda *args: (_ for _ in ()).throw(OSError(errno.EIO, "")))
        if wait or on_error == "raise":
            with pytest.raises(StoreError, match="Input/output error"):
                ckpt.save(2, a_state(2), wait=wait)
        else:
            handle = ckpt.save(2, a_state(2))
            assert handle.state == "failed"
            with pytest.raises(StoreError, match="Input/output error"):
                handle.result()
        assert ckpt.save(3, a_state(3)).result().step == 3
    assert ckpt.steps() == [1, 3]


@pytest.mark.parametrize("wait", [False, True])
def test_what_cannot_be_saved_is_raised_at_once(tmp_path: Path, fs: FaultyFileSystem, wait: bool) -> None:
    """It is no matter of storage, and goes on failing until it is put right."""
    with checkpointer(tmp_path, fs, on_error="raise") as ckpt:
        with pytest.raises(shardckpt.UnsupportedLeaf):
            ckpt.save(1, {"f": open}, wait=wait)
        ckpt.save(1, a_state(1))
        with pytest.raises(AlreadyCommitted):
            ckpt.save(1, a_state(1), wait=wait)
        assert ckpt.save(2, a_state(2)).result().step == 2


# ---- the end


def test_a_save_while_another_thread_closes(tmp_path: Path) -> None:
    gate = Gate(is_open=False)
    ckpt = checkpointer(tmp_path, gate)
    handle = ckpt.save(1, a_state(1))
    closing = InThread(ckpt.close)
    until_blocked(closing, Background.wait)
    saving = InThread(lambda: ckpt.save(2, a_state(2)))
    gate.lift()
    closing.result()
    error = saving.error()
    assert isinstance(error, CheckpointerClosed)
    assert "is closed; make a new one" in str(error)
    assert handle.result().step == 1
    assert ckpt.steps() == [1]


def test_a_close_while_another_thread_saves(tmp_path: Path) -> None:
    """It lets the save go on to its end."""
    gate = Gate(is_open=False)
    ckpt = checkpointer(tmp_path, gate)
    saving = InThread(lambda: ckpt.save(1, a_state(1), wait=True))
    gate.until_reached()
    closing = InThread(ckpt.close)
    gate.lift()
    closing.result()
    assert saving.result().state == "durable"
