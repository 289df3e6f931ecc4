# SPDX-License-Identifier: Apache-2.0
"""What a job of any kind and world size has saved is loaded by a job of any other, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

import shardckpt
from shardckpt.options import Options
from tests.models import KINDS, WORLD_SIZES, differences, make_job, snapshot
from tests.ranks import RankPool

Source = tuple[str, dict[str, Any]]
"""Where a checkpoint is, and the whole state that it has to hold."""
Sources = Callable[[str, int], Source]


def save_job(kind: str, root: str) -> dict[str, Any]:
    """Train, save, and gather what was saved."""
    job = make_job(kind, seed=3)
    job.train(3)
    shardckpt.save(root, job.state(), step=3)
    found = snapshot(job)
    return found if dist.get_rank() == 0 else {}


@pytest.fixture(scope="session")
def sources(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Checkpoints by kind and world size, made when they are first asked for."""
    made: dict[tuple[str, int], Source] = {}

    def source(kind: str, world_size: int) -> Source:
        if (kind, world_size) not in made:
            root = str(tmp_path_factory.mktemp("source") / "c")
            made[kind, world_size] = root, ranks.run(world_size, save_job, kind, root)[0]
        return made[kind, world_size]

    return source


def load_job(kind: str, given: list[Source], trains: bool) -> list[list[str]]:
    """Load each source into one job, which has no optimizer state before the first; what differs from what was saved.

    In between it trains, or everything in it is changed at less cost. Data is read once and passed on, and read by whoever
    wants it, in turns.
    """
    job = make_job(kind, seed=99)
    found = []
    assert len(differences(snapshot(job), given[0][1])) > 20
    for number, (root, expected) in enumerate(given):
        options = Options(read_once="never" if number % 2 else "always")
        restored = shardckpt.load(root, into=job.state(), options=options)
        assert restored.step == 3
        assert restored.info.missing == restored.info.unexpected == ()
        found.append(differences(snapshot(job), expected))
        if trains:
            job.train(1)
        else:
            job.spoil()
    return found


def check(ranks: RankPool, given: list[Source], target: str, world_size: int, *, trains: bool) -> None:
    for found in ranks.run(world_size, load_job, target, given, trains, timeout=240):
        assert found == [[] for _ in given]


@pytest.mark.parametrize(
    ("source", "saved_on", "target", "loaded_on"),
    [
        *[(kind, 4, kind, 2) for kind in KINDS],
        *(pytest.param(kind, 2, kind, 4, marks=pytest.mark.slow) for kind in KINDS),
        ("fsdp2", 4, "ddp", 3),
        ("tp", 2, "fsdp2", 3),
        ("zero", 3, "ddp", 2),
        ("ddp", 2, "zero", 3),
        ("fsdp2+tp", 4, "hsdp", 2),
        ("hsdp", 4, "fsdp2+tp", 4),
        ("fsdp2", 3, "zero", 1),
        ("ddp", 1, "tp", 3),
    ],
)
def test_some_jobs_into_some_others(
    ranks: RankPool, sources: Sources, source: str, saved_on: int, target: str, loaded_on: int
) -> None:
    check(ranks, [sources(source, saved_on)] * 2, target, loaded_on, trains=True)


@pytest.mark.slow
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_job_into_every_other(ranks: RankPool, sources: Sources, source: str, target: str, world_size: int) -> None:
    """Each case loads checkpoints of all world sizes."""
    check(ranks, [sources(source, world) for world in WORLD_SIZES], target, world_size, trains=False)
