# SPDX-License-Identifier: Apache-2.0
"""A save that finds another one under way waits, is skipped, or takes its place: on all ranks alike."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Options, SaveHandle
from shardckpt.background.background import Background
from shardckpt.errors import SaveDropped
from shardckpt.guard import STEP_GUARD
from tests.engine.stores import Gate, a_state, checkpointer, content, files
from tests.engine.waiting import PATIENCE, InThread, until_blocked
from tests.models import make_job
from tests.ranks import RankPool

Found = dict[str, Any]


def outcomes(*handles: SaveHandle) -> list[str]:
    """How each ended: its state, or the message of its error."""
    found = []
    for handle in handles:
        try:
            handle.result(PATIENCE)
        except SaveDropped as error:
            found.append(error.message)
        else:
            found.append(handle.state)
    return found


def test_the_second_waits(tmp_path: Path) -> None:
    gate = Gate(is_open=False)
    with checkpointer(tmp_path, gate) as ckpt:
        first = ckpt.save(1, a_state(1))
        assert first.state == "staged"
        saving = InThread(lambda: ckpt.save(2, a_state(2)))
        until_blocked(saving, Background.wait)
        gate.lift()
        second = saving.result()
        assert first.done()
        assert outcomes(first, second) == ["durable", "durable"]
    assert ckpt.steps() == [1, 2]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_a_blocking_save_always_waits(tmp_path: Path, policy: str) -> None:
    gate = Gate(is_open=False)
    with checkpointer(tmp_path, gate, when_busy=policy) as ckpt:
        first = ckpt.save(1, a_state(1))
        saving = InThread(lambda: ckpt.save(2, a_state(2), wait=True))
        until_blocked(saving, Background.wait)
        gate.lift()
        assert outcomes(first, saving.result()) == ["durable", "durable"]


# ---- skip


def skip(root: str, slow: int) -> Found:
    """Save 1 is held up on rank ``slow``; 2 and 3 come too early, and 4 does not."""
    gate = Gate(is_open=dist.get_rank() != slow)
    with checkpointer(root, gate, when_busy="skip", on_error="raise") as ckpt:
        handles = [ckpt.save(step, a_state(step)) for step in (1, 2, 3)]
        states = [handle.state for handle in handles]
        dist.barrier()
        gate.lift()
        ckpt.wait()
        dist.barrier()
        handles.append(ckpt.save(4, a_state(4)))
        return {"states": states, "outcomes": outcomes(*handles), "stalls": [handle.stall > 0 for handle in handles]}


@pytest.mark.parametrize("slow", [0, 1])
def test_skipped_saves(ranks: RankPool, tmp_path: Path, slow: int) -> None:
    """They do not end training, whatever ``on_error`` says."""
    for found in ranks.run(2, skip, str(tmp_path), slow):
        assert found["states"] == ["staged", "failed", "failed"]
        assert found["outcomes"] == [
            "durable",
            "step 2 was not saved: the save of step 1 was still under way",
            "step 3 was not saved: the save of step 1 was still under way",
            "durable",
        ]
        assert found["stalls"] == [True] * 4
    assert [name[:13] for name in files(tmp_path)] == ["step-00000001"] * 3 + ["step-00000004"] * 3


def test_skipping_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate(is_open=False)
    with checkpointer(tmp_path, gate, when_busy="skip") as ckpt:
        ckpt.save(1, a_state(1))
        with caplog.at_level(logging.WARNING, "shardckpt"):
            ckpt.save(2, a_state(2))
        gate.lift()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "step 2 was not saved: the save of step 1 was still under way")
    ]


class SlowToRemove(Gate):
    """The gate is in front of what is removed after a commit."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        return super(Gate, self).open(path, flags, mode)

    def unlink(self, path: str) -> None:
        if "step-00000001/" in path:
            self.pass_through()
        super().unlink(path)


def save_while_rank_0_prunes(root: str) -> list[str]:
    """Save 2 is over on rank 1 when 3 comes, but not on rank 0."""
    fs = SlowToRemove()
    with checkpointer(root, fs, when_busy="skip", keep_last=1) as ckpt:
        ckpt.save(1, a_state(1))
        ckpt.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            fs.lower()
        second = ckpt.save(2, a_state(2))
        if dist.get_rank() == 0:
            fs.until_reached()
        else:
            ckpt.wait()
        third = ckpt.save(3, a_state(3))
        fs.lift()
        return outcomes(second, third)


def test_all_ranks_skip_what_some_have_no_reason_to(ranks: RankPool, tmp_path: Path) -> None:
    expected = ["durable", "step 3 was not saved: the save of step 2 was still under way"]
    assert ranks.run(2, save_while_rank_0_prunes, str(tmp_path)) == [expected] * 2
    assert shardckpt.load(tmp_path).step == 2


# ---- replace


class Late(shardckpt.Checkpointer):
    """What is staged lazily is not copied before a step waits for it."""

    _LAZY_THREADS = 0


def replace(root: str) -> Found:
    """Saves 1 and 2 are replaced; training has changed nothing yet, but the state has another structure each time."""
    job = make_job("fsdp2")
    job.train(1)
    options = Options(stage="lazy", when_busy="replace", on_error="raise", timeout=PATIENCE)
    with Late(root, options=options) as ckpt:
        ckpt.save(0, job.state() | {"b": torch.full((3,), 3.0)}, wait=True)
        handles = [ckpt.save(1, job.state() | {"a": torch.ones(3)})]
        handles += [ckpt.save(step, job.state() | {"b": torch.full((step,), 1.0 * step)}) for step in (2, 3)]
        states = [handle.state for handle in handles]
        job.train(1)
        return {"states": states, "outcomes": outcomes(*handles)}


def test_what_is_not_staged_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    """The one that takes its place is exact, and the others do not end training."""
    for found in ranks.run(2, replace, str(tmp_path)):
        assert found["states"] == ["failed", "failed", "requested"]
        first, second, third = found["outcomes"]
        assert first.endswith("the save of step 1 was replaced by that of step 2")
        assert second.endswith("the save of step 2 was replaced by that of step 3")
        assert third == "durable"
    assert {name[:13] for name in files(tmp_path)} == {"step-00000000", "step-00000003"}
    assert content(tmp_path, 3) == content(tmp_path, 0)


def replace_staged(root: str) -> list[str]:
    gate = Gate(is_open=dist.get_rank() == 0)
    with checkpointer(root, gate, when_busy="replace") as ckpt:
        first = ckpt.save(1, a_state(1))
        saving = InThread(lambda: ckpt.save(2, a_state(2)))
        if dist.get_rank() == 1:
            until_blocked(saving, Background.wait)
        gate.lift()
        return outcomes(first, saving.result())


def test_what_is_staged_is_waited_for(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, replace_staged, str(tmp_path)) == [["durable", "durable"]] * 2


def replace_on_one(root: str) -> list[str]:
    """Rank 0 has staged save 1, rank 1 has not."""
    job, is_late = make_job("fsdp2"), dist.get_rank() == 1
    job.train(1)
    with (Late if is_late else shardckpt.Checkpointer)(
        root, options=Options(stage="lazy", when_busy="replace", timeout=PATIENCE)
    ) as ckpt:
        first = ckpt.save(1, job.state())
        if not is_late:
            first.wait_staged(PATIENCE)
        saving = InThread(lambda: ckpt.save(2, job.state()))
        until_blocked(saving, Background.wait)
        dist.barrier()
        STEP_GUARD.wait()
        second = saving.result()
        STEP_GUARD.wait()
        return outcomes(first, second)


def test_what_is_staged_on_one_rank_is_waited_for_on_all(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, replace_on_one, str(tmp_path)) == [["durable", "durable"]] * 2
