# SPDX-License-Identifier: Apache-2.0
"""Saves in the background commit what blocking saves would have, however they are carried and staged, and tell of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Event, Options
from shardckpt.events import Phase
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.metrics import decode_columns
from shardckpt.store import LocalStore
from tests.engine.stores import CHUNK, a_state, content, equal, files, large, loaded
from tests.models import make_job
from tests.ranks import RankPool

Carrier = Literal["thread", "process"]
PATIENCE = 120.0
RECORDED: set[Phase] = {"capture", "exchange", "plan", "stage", "hash", "write", "fsync", "receipts"}


def save_while_training(root: str, kind: str, background: Carrier, stage: Literal["eager", "lazy"]) -> list[float]:
    """Save steps 1 to 3 in the background, and the same states as 11 to 13 blocking, before training goes on; the stalls."""
    job = make_job(kind)
    stalls = []
    options = Options(background=background, stage=stage, timeout=PATIENCE)
    with shardckpt.Checkpointer(root, options=options) as ckpt:
        for step in (1, 2, 3):
            job.train(1)
            ckpt.save(10 + step, job.state(), wait=True)
            handle = ckpt.save(step, job.state(), metadata={"step": step})
            stalls.append(handle.stall)
        job.train(1)
        assert handle.result(PATIENCE).step == 3
    return stalls


@pytest.mark.parametrize(
    ("world_size", "kind", "background", "stage"),
    [
        (1, "ddp", "thread", "eager"),
        (2, "fsdp2", "thread", "lazy"),
        (2, "fsdp2", "process", "eager"),
        pytest.param(2, "fsdp2", "process", "lazy", marks=pytest.mark.slow),
        pytest.param(3, "zero", "process", "lazy", marks=pytest.mark.slow),
        pytest.param(4, "fsdp2+tp", "thread", "eager", marks=pytest.mark.slow),
        pytest.param(4, "hsdp", "process", "eager", marks=pytest.mark.slow),
    ],
)
def test_what_is_saved_is_what_a_blocking_save_writes(
    ranks: RankPool, tmp_path: Path, world_size: int, kind: str, background: Carrier, stage: Literal["eager", "lazy"]
) -> None:
    for stalls in ranks.run(world_size, save_while_training, str(tmp_path), kind, background, stage, timeout=250):
        assert all(stall > 0 for stall in stalls)
    for step in (1, 2, 3):
        assert content(tmp_path, step) == content(tmp_path, 10 + step)
        assert len([name for name in files(tmp_path) if name.startswith(f"step-{step:08}/")]) == world_size + 1
    assert len({content(tmp_path, step) for step in (1, 2, 3)}) == 3
    assert open_checkpoint(LocalStore(tmp_path), "step-00000002/").checkpoint.manifest.metadata == {"step": 2}


STATES: list[dict[str, Any]] = [
    {"a": torch.ones(3)},
    large(2.5),
    {"a": torch.ones(4), "b": [torch.ones(2)]},
    {"b": 3},
    large(4.1, seed=1),
    large(4.1, seed=2),
    {"a": torch.ones(3)},
]


def save_all(root: str, background: Carrier) -> None:
    with shardckpt.Checkpointer(root, options=Options(background=background, timeout=PATIENCE)) as ckpt:
        for step, state in enumerate(STATES):
            ckpt.save(step, state | {"own": shardckpt.PerRank(dist.get_rank())})


@pytest.mark.parametrize("background", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_the_structure_may_change_between_saves(ranks: RankPool, tmp_path: Path, background: Carrier) -> None:
    """Memory grows with it, and holds nothing of what lay there before."""
    ranks.run(2, save_all, str(tmp_path), background, timeout=250)
    for step, state in enumerate(STATES):
        found = loaded(tmp_path, step)
        assert found.pop("own") == {0: 0, 1: 1}
        assert equal(found, state)


def save_unstaged(root: str) -> str:
    """Two saves of a state that lies still; how far the first one is when the state may be changed."""
    state = large(2.5, seed=dist.get_rank()) | {"seed": 0}
    own = {name: shardckpt.PerRank(value) for name, value in state.items()}
    with shardckpt.Checkpointer(root, options=Options(stage="none", timeout=PATIENCE)) as ckpt:
        handle = ckpt.save(1, own)
        handle.wait_staged(PATIENCE)
        found = handle.state
        state["a"] += 1
        ckpt.save(2, own).result(PATIENCE)
    return found


def test_a_state_that_lies_still_needs_no_copy(ranks: RankPool, tmp_path: Path) -> None:
    """It may be changed when it is durable, and not before."""
    assert ranks.run(2, save_unstaged, str(tmp_path)) == ["durable"] * 2
    for rank in (0, 1):
        first, second = loaded(tmp_path, 1), loaded(tmp_path, 2)
        expected = large(2.5, seed=rank)
        assert all(torch.equal(first[name][rank], expected[name]) for name in "abc")
        assert torch.equal(second["a"][rank], expected["a"] + 1)


# ---- what is told of it


@pytest.mark.parametrize("background", ["thread", "process"])
def test_the_manifest_and_the_events_tell_of_all_phases(tmp_path: Path, background: Carrier) -> None:
    """Of those too that another process than the one that commits was at."""
    heard: list[Event] = []
    options = Options(background=background, timeout=PATIENCE)
    with shardckpt.Checkpointer(tmp_path, on_event=heard.append, options=options) as ckpt:
        ckpt.save(7, large(1.5))
    record = open_checkpoint(LocalStore(tmp_path)).checkpoint.manifest.metrics
    assert record is not None
    seconds = decode_columns(record, 1)
    assert seconds.keys() == RECORDED
    assert all(seconds[phase][0] > 0 for phase in ("capture", "stage", "hash", "write"))
    assert {event.phase for event in heard} == RECORDED | {"commit"}
    assert len(heard) == len(RECORDED) + 1
    by_phase = {event.phase: event for event in heard}
    moved: set[Phase] = {"stage", "hash", "write"}
    for phase in moved:
        assert by_phase[phase].bytes == pytest.approx(1.5 * CHUNK, rel=0.01)
    measured_in_either: set[Phase] = {"capture", "stage", "hash"}
    for phase in measured_in_either:
        # once, although two processes have measured
        assert by_phase[phase].seconds == pytest.approx(seconds[phase][0], abs=2e-6)


def test_each_save_is_one_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "shardckpt"), shardckpt.Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, a_state(step))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for step, line in enumerate(lines, 1):
        assert line.startswith(f"saved {tmp_path}/step-{step:08}: 0.000 GB in ")


def test_a_restore_waits_for_the_save(tmp_path: Path) -> None:
    with shardckpt.Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, a_state(1))
        target = a_state(0)
        restored = ckpt.restore(target)
        assert restored is not None
        assert (restored.step, target["t"].unique().tolist()) == (1, [1.0])


def test_a_checkpointer_that_nobody_holds_finishes_its_save(tmp_path: Path) -> None:
    handle = shardckpt.Checkpointer(tmp_path).save(1, a_state(1))
    assert handle.result(PATIENCE).step == 1
