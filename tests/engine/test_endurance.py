# SPDX-License-Identifier: Apache-2.0
"""Many saves in a row take no more from the system than a few: memory, descriptors, threads, processes, shared memory.

Nor is anything left behind by what fails, is closed, is forgotten, or is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardckpt
from shardckpt.errors import StoreError, UnsupportedLeaf
from shardckpt.journal import DIRECTORY
from shardckpt.manifest import step_directory
from tests.engine.usage import MARK, Usage, usage, usage_when_as_low_as, wait_until_ended
from tests.ranks import RankDied, RankPool, meet
from tests.style.source import ROOT

pytestmark = pytest.mark.slow

Background = Literal["thread", "process"]
Stage = Literal["eager", "lazy"]

WARM_UP = 20
OBJECTS_PER_SAVE = 5
"""Less than a handle, or any other trace of a save, takes."""
NOISE = 16 << 20
"""Bytes by which memory may grow in all; the state of each rank has 1.5 MB, and is staged in 4 MiB."""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one, because these tests are about what a disk takes no part in."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path / "run"
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="endurance-") as directory:
        yield Path(directory) / "run"


class Training:
    """A model and its optimizer, equal on all ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(512, 256)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "rng": shardckpt.RNGState(), "step": 0}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 512)).square().sum().backward()
        self.optimizer.step()
        self.state["step"] += 1


def options(background: Background, stage: Stage, timeout: float = 60) -> shardckpt.Options:
    return shardckpt.Options(background=background, stage=stage, timeout=timeout)


def kill_children() -> None:
    """Kill the background process, if there is one."""
    for process in psutil.Process().children():
        process.kill()
        process.wait()


# ---- saves in a row


def use_once(root: str, chosen: shardckpt.Options, training: Training) -> None:
    """Have everything loaded that stays for good."""
    with shardckpt.Checkpointer(root, keep_last=1, options=chosen) as ckpt:
        for step in range(2):
            training.step()
            ckpt.save(step, training.state)
    dist.barrier()


def save_in_a_row(root: str, background: Background, stage: Stage, saves: int) -> list[Usage]:
    """Usage before the first save, after a few, after all, and when all is closed."""
    training, chosen = Training(), options(background, stage)
    use_once(f"{root}/once", chosen, training)
    found = [usage()]
    ckpt = shardckpt.Checkpointer(f"{root}/run", keep_last=2, options=chosen)
    for step in range(saves):
        training.step()
        handle = ckpt.save(step, training.state)
        if step + 1 in (WARM_UP, saves):
            handle.result()
            ckpt.wait()
            found.append(usage() if step + 1 == WARM_UP else usage_when_as_low_as(found[-1]))
            dist.barrier()
    ckpt.close()
    found.append(usage_when_as_low_as(found[0]))
    dist.barrier()
    return found


@pytest.mark.parametrize(
    ("background", "stage"),
    [
        ("thread", "eager"),
        ("thread", "lazy"),
        ("process", "eager"),
        ("process", "lazy"),
    ],
)
def test_two_hundred_saves_in_a_row(ranks: RankPool, root: Path, background: Background, stage: Stage) -> None:
    saves, names = 200, set(os.listdir("/dev/shm"))
    for before, first, last, closed in ranks.run(
        2, save_in_a_row, str(root), background, stage, saves, timeout=240, fresh=True
    ):
        assert first.processes == (1 if background == "thread" else 2)
        assert not last.growth(first)
        assert last.objects - first.objects < OBJECTS_PER_SAVE * (saves - WARM_UP)
        assert last.resident - first.resident < NOISE
        assert not closed.growth(before)
    assert {name for name in os.listdir("/dev/shm") if "shardckpt" in name} <= names
    assert sorted(path.name for path in (root / "run").iterdir()) == [step_directory(saves - 2), step_directory(saves - 1)]


# ---- saves that fail, processes that are killed, Checkpointers that are closed


def fail_in_a_row(root: str, background: Background) -> tuple[Usage, Usage, int]:
    """Usage before and after many saves that cannot be written or are refused, and how many of them failed."""
    training = Training()
    ckpt = shardckpt.Checkpointer(root, keep_last=2, options=options(background, "eager"))
    failures = 0
    for step in range(60):
        training.step()
        # a file larger than that cannot be written from the second save on, by whoever writes it
        limit = -1 if step == 0 else 64 << 10
        for process in (psutil.Process(), *psutil.Process().children()):
            process.rlimit(psutil.RLIMIT_FSIZE, (limit, -1))
        handle = ckpt.save(step, training.state)
        with pytest.raises(UnsupportedLeaf):
            ckpt.save(10**6, {"no": object()})
        ckpt.wait()
        failures += isinstance(handle.error, StoreError)
        if step == 10:
            first = usage()
    last = usage_when_as_low_as(first)
    ckpt.close()
    return first, last, failures


@pytest.mark.parametrize("background", ["thread", "process"])
def test_saves_that_fail_in_a_row(ranks: RankPool, root: Path, background: Background) -> None:
    for first, last, failures in ranks.run(2, fail_in_a_row, str(root), background, timeout=240, fresh=True):
        assert failures == 59
        assert not last.growth(first)
        assert last.objects - first.objects < 2 * OBJECTS_PER_SAVE * 49
        assert last.resident - first.resident < NOISE
    assert shardckpt.load(root).step == 0
    assert [path.name for path in root.iterdir() if path.name != DIRECTORY] == [step_directory(0)]


def close_in_a_row(root: str, background: Background, times: int) -> tuple[Usage, Usage]:
    training, chosen = Training(), options(background, "lazy")
    use_once(f"{root}/once", chosen, training)
    before = usage()
    closed = []
    for number in range(times):
        closed.append(shardckpt.Checkpointer(f"{root}/{number}", options=chosen))
        closed[-1].save(number, training.state)
        closed[-1].close()
    after = usage_when_as_low_as(before)
    dist.barrier()
    return before, after


@pytest.mark.parametrize(("background", "times"), [("thread", 20), ("process", 3)])
def test_closed_ones_hold_nothing(ranks: RankPool, root: Path, background: Background, times: int) -> None:
    for before, after in ranks.run(2, close_in_a_row, str(root), background, times, timeout=240, fresh=True):
        assert not after.growth(before)
        assert after.resident - before.resident < NOISE


def close_a_large_one(root: str, background: Background) -> tuple[Usage, Usage, Usage]:
    """Usage before, with a large state staged, and when that is closed but not forgotten."""
    use_once(f"{root}/once", options(background, "eager"), Training())
    state = {"large": torch.ones(16 << 20)}
    before = usage()
    ckpt = shardckpt.Checkpointer(f"{root}/run", options=options(background, "eager"))
    ckpt.save(1, state).result()
    ckpt.wait()
    during = usage()
    ckpt.close()
    return before, during, usage_when_as_low_as(before)


@pytest.mark.parametrize("background", ["thread", "process"])
def test_memory_returns_after_close(ranks: RankPool, root: Path, background: Background) -> None:
    ((before, during, after),) = ranks.run(1, close_a_large_one, str(root), background, timeout=120, fresh=True)
    assert during.resident - before.resident > 64 << 20
    assert after.resident - before.resident < NOISE
    assert not after.growth(before)


def kill_in_a_row(root: str) -> tuple[Usage, Usage, list[str]]:
    """Usage with the first background process, and with the one after many were killed; how the saves went."""
    training = Training()
    ckpt = shardckpt.Checkpointer(root, options=options("process", "eager"))
    ckpt.save(0, training.state).result()
    ckpt.wait()
    first = usage()
    went: list[str] = []
    for step in range(1, 5):
        if step % 2:
            kill_children()
        handle = ckpt.save(step, training.state)
        if step % 2 == 0:
            kill_children()
        ckpt.wait()
        went.append(handle.state)
    ckpt.save(5, training.state).result()
    ckpt.wait()
    last = usage_when_as_low_as(first)
    ckpt.close()
    return first, last, went


def test_background_processes_that_are_killed(ranks: RankPool, root: Path) -> None:
    ((first, last, went),) = ranks.run(1, kill_in_a_row, str(root), timeout=240, fresh=True)
    assert not last.growth(first)
    assert last.resident - first.resident < NOISE
    assert set(went) <= {"durable", "failed"}
    committed = [0, *(step for step, state in enumerate(went, 1) if state == "durable"), 5]
    with shardckpt.Checkpointer(root) as ckpt:
        assert ckpt.steps() == committed


# ---- trainers that are killed, or end in other ways


def die_while_saving(root: str, background: Background, stage: Stage, mark: str, victims: list[int]) -> str:
    """Save, and be killed as soon as all ranks have staged the second save; what the others hear of it."""
    os.environ[MARK] = mark
    training = Training()
    # a survivor waits that long for what only the other trainer could do
    timeout = 10 if background == "thread" else 60
    with shardckpt.Checkpointer(root, options=options(background, stage, timeout)) as ckpt:
        ckpt.save(1, training.state).result()
        handle = ckpt.save(2, training.state)
        handle.wait_staged()
        meet("staged")
        if dist.get_rank() in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        ckpt.wait()
        return handle.state


@pytest.mark.parametrize(
    ("background", "stage", "victims"),
    [
        ("process", "eager", [0, 1]),
        ("process", "eager", [1]),
        ("process", "lazy", [0, 1]),
        ("process", "lazy", [1]),
        ("thread", "lazy", [0, 1]),
        ("thread", "lazy", [1]),
    ],
)
def test_killed_trainers_leave_nothing(
    ranks: RankPool, root: Path, background: Background, stage: Stage, victims: list[int]
) -> None:
    mark = uuid.uuid4().hex
    names = set(os.listdir("/dev/shm"))
    outcomes = ranks.run_expecting_errors(
        2, die_while_saving, str(root), background, stage, mark, victims, timeout=200, fresh=True
    )
    assert [rank for rank, outcome in enumerate(outcomes) if isinstance(outcome, RankDied)] == victims, outcomes
    assert wait_until_ended(mark) == []
    assert {name for name in os.listdir("/dev/shm") if "shardckpt" in name} <= names
    step = shardckpt.load(root).step
    assert step == 2 if background == "process" else step in (1, 2)
    if victims == [1]:
        assert outcomes[0] == ("durable" if step == 2 else "failed")


ENDING = """
import os, sys, torch, shardckpt
ckpt = shardckpt.Checkpointer(sys.argv[1], options=shardckpt.Options(background=sys.argv[2]))
handle = ckpt.save(1, {"t": torch.ones(1 << 20)})
if sys.argv[3] == "raises":
    raise KeyError("on purpose")
handle.wait_staged()
if sys.argv[3] == "exits at once":
    os._exit(0)
if sys.argv[3] == "is replaced":
    os.execv("/bin/true", ["true"])
"""


@pytest.mark.parametrize(
    ("background", "how"),
    [
        *(("thread", how) for how in ("ends", "raises")),
        *(("process", how) for how in ("ends", "raises", "exits at once", "is replaced")),
    ],
)
def test_a_trainer_that_ends_without_closing_leaves_nothing(root: Path, background: str, how: str) -> None:
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", ENDING, str(root), background, how]
    done = subprocess.run(command, env={**os.environ, MARK: mark}, cwd=ROOT, timeout=120, stderr=subprocess.PIPE, text=True)
    assert done.returncode == (1 if how == "raises" else 0), done.stderr
    assert wait_until_ended(mark) == []
    assert shardckpt.load(root).step == 1
