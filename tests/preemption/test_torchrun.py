# SPDX-License-Identifier: Apache-2.0
"""SIGTERM to one worker, or to all by torchrun: one agreed step is committed, ranks leave as promised, the next job goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardckpt
from tests.preemption.train import DEADLINE

TRAIN = Path(__file__).with_name("train.py")
# Tells the exit status of each rank, and is itself deaf to what torchrun sends to process groups.
WRAPPER = 'trap "" TERM; "$@"; status=$?; echo $status > "$STATUSES/$RANK"; exit $status'


class Job:
    """A torchrun of the training script, and what it has printed."""

    def __init__(self, ranks: int, root: Path, *options: str) -> None:
        self.ranks = ranks
        self.root = root
        self.statuses = root.parent / "statuses"
        self.statuses.mkdir(exist_ok=True)
        self.log = ""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--no-python"]
        command += ["sh", "-c", WRAPPER, "sh", sys.executable, str(TRAIN), f"--root={root}", *options]
        names = {"RES_OPTIONS": "timeout:1 attempts:1", "STATUSES": str(self.statuses)}
        self.launcher = subprocess.Popen(
            command,
            env={**os.environ, **names},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read on to the first line that matches."""
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self.log += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line matches {pattern!r} in:\n{self.log}")

    def end(self) -> dict[int, int]:
        """Read the rest, and return the exit status of each rank."""
        assert self.launcher.stdout is not None
        self.log += self.launcher.stdout.read()
        self.launcher.wait(DEADLINE)
        return {int(file.name): int(file.read_text()) for file in self.statuses.iterdir()}

    def only_step(self) -> int:
        """The step that was committed."""
        steps = committed(self.root)
        assert len(steps) == 1, f"{steps} are committed; {self.log}"
        return steps[0]

    @property
    def pids(self) -> dict[int, int]:
        return {int(rank): int(pid) for rank, pid in re.findall(r"rank (\d+) begins at \d+, pid (\d+)", self.log)}

    @property
    def saves(self) -> list[list[int]]:
        """The steps saved by each rank."""
        return [[int(step) for step in re.findall(rf"rank {rank} saves (\d+)", self.log)] for rank in range(self.ranks)]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"


def committed(root: Path) -> list[int]:
    with shardckpt.Checkpointer(root) as ckpt:
        return ckpt.steps()


def resume(job: Job) -> None:
    """One more step from the newest checkpoint, on another number of ranks."""
    last = committed(job.root)[-1]
    after = Job(2 if job.ranks > 2 else 1, job.root, f"--steps={last + 1}")
    assert after.end()[0] == 0, after.log
    assert f"rank 0 begins at {last + 1}," in after.log
    assert f"rank 0 step {last + 1}" in after.log


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (4, 2)])
def test_a_signal_to_one_worker_ends_all_at_one_step(root: Path, ranks: int, victim: int) -> None:
    job = Job(ranks, root)
    job.read_until("rank 0 step 20$")
    os.kill(job.pids[victim], signal.SIGTERM)
    statuses = job.end()
    step = job.only_step()
    assert step >= 20
    assert statuses == dict.fromkeys(range(ranks), 128 + signal.SIGTERM), job.log
    assert job.saves == [[step]] * ranks
    assert f"saving step {step}: signal 15 on rank {victim}" in job.log
    assert job.launcher.returncode == 1
    resume(job)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (4, 0)])
def test_a_signal_to_torchrun_ends_all_at_one_step(root: Path, ranks: int, workers: int) -> None:
    """It sends SIGTERM to all process groups; data loaders that live in them do not die of it."""
    job = Job(ranks, root, f"--workers={workers}")
    job.read_until("rank 0 step 20$")
    job.launcher.send_signal(signal.SIGTERM)
    statuses = job.end()
    step = job.only_step()
    assert statuses == dict.fromkeys(range(ranks), 128 + signal.SIGTERM), job.log
    assert job.saves == [[step]] * ranks
    assert job.launcher.returncode == 1
    resume(job)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_can_save_no_more_as_another_is_gone_do_not_wait_to_be_killed(root: Path, ranks: int) -> None:
    """Torchrun sends them SIGTERM when one has died, and SIGKILL after 30 s; only then could it start them again."""
    job = Job(ranks, root, "--hang-at=5")
    for _ in range(ranks - 1):
        job.read_until(r"rank \d hangs$")
    os.kill(job.pids[1], signal.SIGKILL)
    statuses = job.end()
    assert statuses == {rank: 128 + (signal.SIGKILL if rank == 1 else signal.SIGTERM) for rank in range(ranks)}, job.log
    assert "signal 15: there is no last save, as not all ranks can be asked for it: " in job.log
    assert "rank 1 (" in job.log
    assert committed(root) == []


@pytest.mark.slow
def test_ranks_of_unequal_speed_save_the_same_steps_by_the_clock(root: Path) -> None:
    job = Job(4, root, "--every-seconds=0.5", "--steps=150", "--pause=0.005")
    assert job.end() == dict.fromkeys(range(4), 0), job.log
    assert job.saves == [committed(root)] * 4
    assert len(job.saves[0]) >= 3
