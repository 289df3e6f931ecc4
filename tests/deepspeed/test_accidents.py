# SPDX-License-Identifier: Apache-2.0
"""A rank of a DeepSpeed job is killed in the middle of a save; and a bit of a checkpoint is flipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt.errors import CheckpointError, ChecksumMismatch
from shardckpt.integrations.deepspeed import Attachment, attach
from shardckpt.store import open_store
from tests.corruption.make import flip
from tests.deepspeed.engines import make_engine, masters, needs_deepspeed, train
from tests.faults.stores import FaultyStore
from tests.ranks import RankDied, RankPool, meet

pytestmark = [needs_deepspeed, pytest.mark.slow, pytest.mark.timeout(900)]

_Result = TypeVar("_Result")
PATIENCE = 20.0
"""Seconds that survivors wait for what only the killed rank could do."""


class Deadly(FaultyStore):
    """Kills this process when it has written its part of step 2, before that is flushed and anybody is told."""

    def call(self, what: str, operation: Callable[[], _Result]) -> _Result:
        if what.startswith(f"finish step-00000002/rank-{dist.get_rank():05}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().call(what, operation)


class DeadlyCheckpointer(shardckpt.Checkpointer):
    """Saves through such a store."""

    @staticmethod
    def _open_store(url: str | os.PathLike[str]) -> Deadly:
        return Deadly(open_store(url))


def die_in_mid_save(root: str, stage: int, victim: int) -> str:
    """Save step 1, train, and save step 2, in which a rank dies; what the others hear of it."""
    engine = make_engine(stage)
    train(engine, first=1, count=1)
    with attach(engine, root, wait=True):
        engine.save_checkpoint(root)
    train(engine, first=2, count=1)
    kind = DeadlyCheckpointer if dist.get_rank() == victim else shardckpt.Checkpointer
    options = shardckpt.Options(timeout=PATIENCE)
    attachment = Attachment(engine, root, lambda place: kind(place, options=options), wait=True)
    meet("before the save")
    try:
        attachment.save_checkpoint(root)
    except CheckpointError as error:
        return str(error)
    return "saved"


def go_on(root: str | None, stage: int) -> tuple[int, list[float]]:
    """Resume, or train from the start without a checkpoint; the step, and the losses of steps 2 and 3."""
    engine = make_engine(stage, seed=0 if root is None else 1)
    if root is None:
        train(engine, first=1, count=1)
        return engine.global_steps, train(engine, first=2, count=2)
    with attach(engine, root):
        engine.load_checkpoint(root)
    return engine.global_steps, train(engine, first=2, count=2)


@pytest.mark.parametrize(("stage", "victim"), [(2, 1), (3, 0)])
def test_killed_in_mid_save_resumes_from_the_checkpoint_before(
    ranks: RankPool, tmp_path: Path, stage: int, victim: int
) -> None:
    """With the losses of a run that nobody has killed. DeepSpeed's ``latest`` would name what is not whole."""
    outcomes = ranks.run_expecting_errors(2, die_in_mid_save, str(tmp_path), stage, victim, timeout=200, fresh=True)
    assert isinstance(outcomes[victim], RankDied)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    assert f"rank {victim}" in outcomes[1 - victim]
    assert list(tmp_path.glob(f"step-00000002/rank-{victim:05}-*"))
    resumed = ranks.run(2, go_on, str(tmp_path), stage, timeout=200)
    assert resumed == ranks.run(2, go_on, None, stage, timeout=200)
    assert [step for step, _ in resumed] == [1, 1]


def save_one(root: str) -> None:
    engine = make_engine(2)
    train(engine, first=1, count=1)
    with attach(engine, root):
        engine.save_checkpoint(root)


def load_one(root: str) -> tuple[Any, bool]:
    """The error of a load, and whether it has changed the weights."""
    engine = make_engine(3, seed=1)
    before = masters(engine)
    with attach(engine, root):
        try:
            engine.load_checkpoint(root)
        except CheckpointError as error:
            return type(error), False
    return None, not all(torch.equal(found, before[name]) for name, found in masters(engine).items())


def test_a_flipped_bit_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    """By all ranks, in the file of any of those that saved; with the bit flipped back, it loads."""
    ranks.run(2, save_one, str(tmp_path), timeout=200)
    files = sorted(tmp_path.glob("step-*/rank-*"))
    assert len(files) == 2
    for file in files:
        at = file.stat().st_size // 2
        flip(file, at)
        assert ranks.run(3, load_one, str(tmp_path), timeout=200) == [(ChecksumMismatch, False)] * 3
        flip(file, at)
    assert ranks.run(3, load_one, str(tmp_path), timeout=200) == [(None, True)] * 3
