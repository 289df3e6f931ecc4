# SPDX-License-Identifier: Apache-2.0
"""Measures how long a job that has lost a process takes to train again, beside one that keeps no checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from .async_report import Bar
from .launch import BenchmarkFailed, OnProgress, Progress
from .machine import Machine, describe_machine
from .measure import ignore_progress, scratch_folder
from .restart_marks import SAVED, Mark
from .spec import RestartSpec

OURS, THEIRS = "shardckpt", "torchrun"
_PATIENCE_SECONDS = 600.0
_BEYOND = 2.0
"""Seconds that a restore may add to a restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartLine:
    """All turns of one contestant."""

    who: str
    """``shardckpt``: `shardckpt run`, and a restore; ``torchrun``: a script that begins anew."""
    seconds: tuple[float, ...]
    """Each turn's time from SIGKILL to the end of the first step after it, of the slowest rank."""
    median_s: float
    """Median of these."""
    joined_s: float
    """Median of the seconds until the new processes have met."""
    restored_s: float | None
    """Median of the seconds until they have restored their state; None without checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartReport:
    """Restarts beside those without checkpoints."""

    benchmark: str = "restart"
    """Always ``restart``."""
    machine: Machine
    """Where it ran."""
    bytes: int
    """Of the state of all ranks together."""
    ranks: int
    """World size, before and after."""
    rounds: int
    """Turns that each contestant took."""
    results: Sequence[RestartLine]
    """One of each contestant."""
    bars: Sequence[Bar]
    """What is to be reached, and what was found."""


def measure_restart(spec: RestartSpec, folder: str = ".", on_progress: OnProgress = ignore_progress) -> RestartReport:
    """Kill one rank of a job of torchrun, and time what comes until the next training step, with a restore and without.

    Files go under ``folder``, and are removed. Raises `BenchmarkFailed` when a job fails, or goes on with another step.
    """
    with scratch_folder(folder, 3 * spec.nbytes) as scratch:
        turns: dict[str, list[Turn]] = {OURS: [], THEIRS: []}
        for number in range(spec.rounds):
            for at, (who, taken) in enumerate(turns.items()):
                on_progress(Progress(2 * number + at, 2 * spec.rounds, f"round {number + 1}: {who}"))
                place = Path(scratch, f"{number}-{who}")
                place.mkdir()
                taken.append(_restart(spec, who, place))
        lines = [summarize_restarts(who, taken) for who, taken in turns.items()]
        return RestartReport(
            machine=describe_machine(scratch),
            bytes=spec.nbytes,
            ranks=spec.ranks,
            rounds=spec.rounds,
            results=lines,
            bars=[Bar("s beyond torchrun's own restart", OURS, lines[0].median_s - lines[1].median_s, _BEYOND)],
        )


@dataclass(frozen=True, slots=True)
class Turn:
    """Seconds after the kill, of the slowest rank."""

    joined: float
    restored: float | None
    stepped: float


def _restart(spec: RestartSpec, who: str, place: Path) -> Turn:
    launcher = ["shardckpt", "run"] if who == OURS else ["torch.distributed.run"]
    options = ["--standalone", f"--nproc-per-node={spec.ranks}", "--max-restarts=1"]
    script = [
        "-m",
        "shardckpt.bench.restart_job",
        str(place),
        str(spec.nbytes),
        *([str(place / "root")] if who == OURS else []),
    ]
    command = [sys.executable, "-m", *launcher, *options, *(["--"] if who == OURS else []), *script]
    # without the second one, restarts fail now and then under plain torchrun 2.13
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=_PATIENCE_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise BenchmarkFailed(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    marks = [msgspec.json.decode(line, type=Mark) for file in place.glob("rank-*") for line in file.read_bytes().splitlines()]
    return judge_marks(marks, spec.ranks, SAVED if who == OURS else None)


def judge_marks(marks: Sequence[Mark], ranks: int, saved: int | None) -> Turn:
    """What the ranks of one job have written down; raises `BenchmarkFailed` unless each has gone on behind step ``saved``."""
    kills = [mark.at for mark in marks if mark.what == "kill"]
    second = {
        what: [mark for mark in marks if mark.start == 1 and mark.what == what] for what in ("joined", "restored", "step")
    }
    steps = [mark.step for mark in second["step"]]
    if len(kills) != 1 or len(second["joined"]) != ranks or steps != [1 if saved is None else saved + 1] * ranks:
        raise BenchmarkFailed(
            f"{len(kills)} ranks were killed, and {len(steps)} of {ranks} went on with steps {steps} in the second start"
        )

    def last(what: str) -> float:
        return max(mark.at for mark in second[what]) - kills[0]

    return Turn(last("joined"), None if saved is None else last("restored"), last("step"))


def summarize_restarts(who: str, turns: Sequence[Turn]) -> RestartLine:
    """One contestant's turns."""
    restored = [turn.restored for turn in turns if turn.restored is not None]
    seconds = tuple(turn.stepped for turn in turns)
    return RestartLine(
        who=who,
        seconds=seconds,
        median_s=median(seconds),
        joined_s=median(turn.joined for turn in turns),
        restored_s=median(restored) if restored else None,
    )
