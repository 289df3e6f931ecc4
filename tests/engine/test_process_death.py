# SPDX-License-Identifier: Apache-2.0
"""Trainers that are killed: what all of them had staged is committed without them, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

import shardckpt
from shardckpt import Options
from shardckpt.device_staging import DeviceCopies, DeviceStaging
from shardckpt.errors import BackgroundDied, CheckpointError, RankTimeout
from tests.engine.stores import a_state, files, loaded
from tests.engine.test_process import Late, background_process, outcome
from tests.engine.usage import MARK, is_dead, marked_processes, wait_until_ended
from tests.engine.waiting import until
from tests.models import make_job
from tests.ranks import RankDied, RankPool, meet
from tests.style.source import ROOT

PATIENCE = 120.0
LONG = 600.0
"""Seconds that ranks wait for each other: much longer than the tests do."""


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


def a_part(step: int) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    return a_state(step, rank=shardckpt.PerRank(torch.full((1000,), 10 * step + rank)))


def part_of(found: dict[str, Any], rank: int) -> list[int]:
    values: list[int] = found["rank"][rank].unique().tolist()
    return values


def resume_all(mark: str) -> None:
    """Let suspended processes go on."""
    for process in marked_processes(mark):
        process.resume()


# ---- after staging


def stage_and_die(root: str, mark: str, victims: list[int]) -> CheckpointError | int | None:
    """Nothing of save 2 is written before the victims are dead: all background processes are suspended."""
    os.environ[MARK] = mark
    pids: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    with shardckpt.Checkpointer(root, options=Options(background="process", timeout=LONG)) as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        dist.barrier()
        background_process().suspend()
        try:
            handle = ckpt.save(2, a_part(2))
            handle.wait_staged(PATIENCE)
            meet("staged")
            if dist.get_rank() in victims:
                os.kill(os.getpid(), signal.SIGKILL)
            until(lambda: all(is_dead(pids[victim]) for victim in victims))
        finally:
            resume_all(mark)
        return outcome(handle) or handle.result().step


@pytest.mark.parametrize("victims", [[0, 1], *(pytest.param([rank], marks=pytest.mark.slow) for rank in (0, 1))])
def test_what_was_staged_is_committed(ranks: RankPool, tmp_path: Path, mark: str, victims: list[int]) -> None:
    outcomes = ranks.run_expecting_errors(2, stage_and_die, str(tmp_path), mark, victims, timeout=250, fresh=True)
    assert [rank for rank, found in enumerate(outcomes) if isinstance(found, RankDied)] == victims
    assert [found for found in outcomes if not isinstance(found, RankDied)] == [2] * (2 - len(victims))
    if len(victims) == 2:
        assert not list(tmp_path.glob("step-00000002/*"))
        resume_all(mark)
    assert wait_until_ended(mark) == []
    found = loaded(tmp_path, 2)
    assert [part_of(found, rank) for rank in (0, 1)] == [[20], [21]]
    assert len(files(tmp_path)) == 6


TORCHRUN = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {source!r})
import shardckpt, torch, torch.distributed as dist
from tests.engine.test_process_death import a_part, background_process
dist.init_process_group("gloo")
ckpt = shardckpt.Checkpointer({root!r}, options=shardckpt.Options(background="process"))
ckpt.save(1, a_part(1)).result()
dist.barrier()
background_process().suspend()
ckpt.save(2, a_part(2)).wait_staged()
Path({root!r}, f"ready-{{dist.get_rank()}}").touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_a_job_of_torchrun_that_is_killed_as_a_whole(tmp_path: Path, mark: str) -> None:
    """The agent first, then its workers, as schedulers do it at last."""
    script = tmp_path / "train.py"
    script.write_text(TORCHRUN.format(source=str(ROOT), root=str(tmp_path / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    agent = subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=True)
    try:
        until(lambda: all((tmp_path / "run" / f"ready-{rank}").exists() for rank in (0, 1)), patience=150)
        trainers = [child for child in psutil.Process(agent.pid).children() if str(script) in child.cmdline()]
        assert len(trainers) == 2
        for victim in (psutil.Process(agent.pid), *trainers):
            victim.kill()
        agent.wait(30)
        psutil.wait_procs(trainers, timeout=30)
        assert len(marked_processes(mark)) == 2
        assert not list(tmp_path.glob("run/step-00000002/*"))
        resume_all(mark)
        assert wait_until_ended(mark) == []
    finally:
        for process in marked_processes(mark):
            process.kill()
    found = loaded(tmp_path / "run", 2)
    assert [part_of(found, rank) for rank in (0, 1)] == [[20], [21]]


# ---- before staging


def die_before_staging(root: str, mark: str, victims: list[int]) -> list[CheckpointError | None]:
    """The victims' processes have begun with save 2, but do not have the state yet."""
    os.environ[MARK] = mark
    job, rank = make_job("fsdp2"), dist.get_rank()
    job.train(1)
    kind = Late if rank in victims else shardckpt.Checkpointer
    with kind(root, options=Options(background="process", stage="lazy", timeout=LONG)) as ckpt:
        ckpt.save(1, job.state(), wait=True)
        handle = ckpt.save(2, job.state())
        until(lambda: list(Path(root).glob(f"step-00000002/rank-{rank:05}-*")))
        meet("begun")
        if rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        return [outcome(handle)]


@pytest.mark.slow
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_what_was_not_staged_is_given_up_by_all(ranks: RankPool, tmp_path: Path, mark: str, victims: list[int]) -> None:
    """At once, and without a trace."""
    outcomes = ranks.run_expecting_errors(2, die_before_staging, str(tmp_path), mark, victims, timeout=250, fresh=True)
    for rank, found in enumerate(outcomes):
        if rank in victims:
            assert isinstance(found, RankDied)
        else:
            (error,) = found
            assert isinstance(error, BackgroundDied)
            (victim,) = victims
            assert error.message.startswith(f"rank {victim}: the trainer of rank {victim} ended before it had staged its state")
    assert wait_until_ended(mark) == []
    assert {name[:13] for name in files(tmp_path)} == {"step-00000001"}


class Deadly(DeviceStaging):
    """The process is killed while it copies the state."""

    is_armed = False

    def start(self, *args: Any, **options: Any) -> DeviceCopies:
        if self.is_armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().start(*args, **options)


def die_while_staging(root: str, mark: str) -> list[CheckpointError | None]:
    """Rank 1 is killed before its background process has heard of save 2."""
    os.environ[MARK] = mark
    staging = Deadly()

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _make_device_staging() -> DeviceStaging:
            return staging

    with Injected(root, options=Options(background="process", timeout=5.0)) as ckpt:
        ckpt.save(1, a_part(1)).result(PATIENCE)
        staging.is_armed = dist.get_rank() == 1
        return [outcome(ckpt.save(2, a_part(2)))]


@pytest.mark.slow
def test_who_is_killed_while_staging_is_waited_for_and_named(ranks: RankPool, tmp_path: Path, mark: str) -> None:
    """As long as ranks wait for each other in anything."""
    first, second = ranks.run_expecting_errors(2, die_while_staging, str(tmp_path), mark, timeout=250, fresh=True)
    assert isinstance(second, RankDied)
    (error,) = first
    assert isinstance(error, RankTimeout)
    assert error.ranks == [1]
    assert wait_until_ended(mark) == []
    assert {name[:13] for name in files(tmp_path)} == {"step-00000001"}
