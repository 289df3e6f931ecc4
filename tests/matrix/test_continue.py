# SPDX-License-Identifier: Apache-2.0
"""Training goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardckpt
from tests.models import KINDS, differences, make_job, snapshot
from tests.ranks import RankPool


def train_and_save(kind: str, root: str) -> dict[str, Any]:
    """Three steps, a save, three more steps; the state at the end."""
    job = make_job(kind, seed=5)
    job.train(3)
    with shardckpt.Checkpointer(root) as ckpt:
        ckpt.save(3, job.state(), wait=True)
    job.train(3)
    return snapshot(job, with_rng=True)


def resume_and_train(kind: str, root: str, trained: int) -> dict[str, Any]:
    """Another process group, another job, perhaps one that has trained: restore, and the same three steps."""
    job = make_job(kind, seed=123)
    job.train(trained)
    with shardckpt.Checkpointer(root) as ckpt:
        restored = ckpt.restore(job.state())
    assert restored is not None
    assert restored.step == 3
    job.train(3)
    return snapshot(job, with_rng=True)


def check_resume(ranks: RankPool, root: str, kind: str, world_size: int, trained: int) -> None:
    uninterrupted = ranks.run(world_size, train_and_save, kind, root)
    resumed = ranks.run(world_size, resume_and_train, kind, root, trained)
    for found, expected in zip(resumed, uninterrupted, strict=True):
        assert differences(found, expected) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_world_size_gives_the_same_bits(ranks: RankPool, tmp_path: Any, kind: str) -> None:
    """Parameters, optimizer, schedule, dropout: all is as if the job had never stopped, on every rank."""
    check_resume(ranks, str(tmp_path), kind, 2, trained=0)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_world_size_gives_the_same_bits(ranks: RankPool, tmp_path: Any, kind: str, world_size: int, trained: int) -> None:
    check_resume(ranks, str(tmp_path), kind, world_size, trained)


def save_while_training(kind: str, root: str, save: bool) -> dict[str, Any]:
    """Six steps, with a save after each, or none."""
    job = make_job(kind, seed=5)
    with shardckpt.Checkpointer(root, keep_last=2) as ckpt:
        for step in range(6):
            job.train(1)
            if save:
                ckpt.save(step, job.state(), wait=True)
    return snapshot(job, with_rng=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2+tp", "zero"])
def test_saving_changes_nothing(ranks: RankPool, tmp_path: Any, kind: str) -> None:
    with_saves = ranks.run(4, save_while_training, kind, str(tmp_path), True)
    without = ranks.run(4, save_while_training, kind, str(tmp_path), False)
    for found, expected in zip(with_saves, without, strict=True):
        assert differences(found, expected) == []


def resume_elsewhere(kind: str, root: str) -> tuple[dict[str, Any], float, list[float]]:
    """The state at resume on another world size, whether it trains on, and the first random numbers."""
    job = make_job(kind, seed=123)
    shardckpt.load(root, into=job.state())
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    found = copy.deepcopy(snapshot(job))
    return found, job.train(2), torch.rand(3, generator=generator).tolist()


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp2", 3), ("zero", 4), ("ddp", 1)])
def test_another_world_size_goes_on_from_the_same_state(ranks: RankPool, tmp_path: Any, kind: str, world_size: int) -> None:
    expected = ranks.run(2, save_at_three, kind, str(tmp_path / "c"))
    found = ranks.run(world_size, resume_elsewhere, kind, str(tmp_path / "c"))
    for rank, (state, loss, numbers) in enumerate(found):
        assert differences(state, expected[0][0]) == []
        assert math.isfinite(loss)
        if rank < 2:
            assert numbers == expected[rank][1]
    assert len({tuple(numbers) for _, _, numbers in found}) == world_size, "ranks draw different numbers"


def save_at_three(kind: str, root: str) -> tuple[dict[str, Any], list[float]]:
    job = make_job(kind, seed=5)
    job.train(3)
    shardckpt.save(root, job.state())
    state = torch.get_rng_state()
    numbers = torch.rand(3).tolist()
    torch.set_rng_state(state)
    dist.barrier()
    return snapshot(job), numbers
