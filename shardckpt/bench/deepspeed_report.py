# SPDX-License-Identifier: Apache-2.0
"""What was found beside DeepSpeed, as data. The field names are the keys of ``--json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .async_report import Bar
from .deepspeed_contest import FLUSHED, OURS, THEIRS, EngineOutcome
from .machine import Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLine:
    """All turns of one contestant at one task. What was not measured is None."""

    what: str
    """The task."""
    who: str
    """The contestant."""
    seconds: tuple[float, ...]
    """Each turn's wall time, of the slowest rank."""
    median_s: float
    """Median of these."""
    read_bytes: int | None = None
    """Bytes that the rank that read most has asked the system for: the median."""
    times_ideal: float | None = None
    """That divided by the bytes of masters and moments that the rank holds."""
    memory_bytes: int | None = None
    """Most memory that the command and its children held, pages of files left out: the median."""
    extra_disk: float | None = None
    """Most bytes that lay in the destination, divided by those of the source."""
    wrong: tuple[str, ...] = ()
    """What was not given back as it was saved."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One run of a command that converts what DeepSpeed has saved."""

    who: str
    """Whose command."""
    seconds: float
    """Wall time of the whole command."""
    memory: int
    """Most bytes of memory that it held."""
    disk: float
    """Most bytes in the destination, divided by those of the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """Saves, resumes and imports beside DeepSpeed."""

    benchmark: str = "deepspeed"
    """Always ``deepspeed``."""
    machine: Machine
    """Where it ran."""
    deepspeed: str
    """Version."""
    parameters: int
    """Of the model."""
    bytes: int
    """Of masters and moments on all ranks together."""
    ranks: int
    """Ranks that save."""
    to_ranks: int
    """Ranks that resume."""
    rounds: int
    """Turns that each contestant took."""
    results: Sequence[EngineLine]
    """Tasks in the order in which they were done."""
    bars: Sequence[Bar]
    """What is to be reached, and what was found."""


def lines_of_saves(stage: int, outcome: EngineOutcome) -> list[EngineLine]:
    """One stage's saves."""
    times = {who: tuple(turn.seconds for turn in outcome.turns if turn.who == who) for who in (OURS, THEIRS, FLUSHED)}
    return [
        EngineLine(what=f"save, stage {stage}", who=who, seconds=seconds, median_s=median(seconds))
        for who, seconds in times.items()
    ]


def lines_of_loads(ranks: int, outcome: EngineOutcome) -> list[EngineLine]:
    """Loads at stage 3 on one number of ranks."""
    lines = []
    for who in (OURS, THEIRS):
        turns = [turn for turn in outcome.turns if turn.who == who]
        seconds, read = tuple(turn.seconds for turn in turns), int(median([turn.read for turn in turns]))
        lines.append(
            EngineLine(
                what=f"load on {ranks}",
                who=who,
                seconds=seconds,
                median_s=median(seconds),
                read_bytes=read,
                times_ideal=read / outcome.nbytes,
                wrong=next((turn.wrong for turn in turns if turn.wrong), ()),
            )
        )
    return lines


def lines_of_conversions(conversions: Sequence[Conversion]) -> list[EngineLine]:
    """DeepSpeed's conversion, and our import."""
    lines = []
    for who, what in ((OURS, "import"), (THEIRS, "ds_to_universal")):
        runs = [run for run in conversions if run.who == who]
        seconds = tuple(run.seconds for run in runs)
        lines.append(
            EngineLine(
                what=what,
                who=who,
                seconds=seconds,
                median_s=median(seconds),
                memory_bytes=int(median([run.memory for run in runs])),
                extra_disk=max(run.disk for run in runs),
            )
        )
    return lines


def compare(lines: Sequence[EngineLine], ranks: int, to_ranks: int) -> list[Bar]:
    """The figures that are to be reached."""
    found = {(line.what, line.who): line for line in lines}
    bars = [Bar(f"s to resume at stage 3, {ranks} to {to_ranks} ranks", OURS, found[f"load on {to_ranks}", OURS].median_s, 1.5)]
    theirs = found[f"load on {to_ranks}", THEIRS].median_s + found["ds_to_universal", THEIRS].median_s
    bars.append(Bar(f"s to resume at stage 3, {ranks} to {to_ranks} ranks", f"{THEIRS}, converted first", theirs, None))
    for number in sorted({ranks, to_ranks}, reverse=True):
        for who, most in ((OURS, 1.05), (THEIRS, None)):
            times = found[f"load on {number}", who].times_ideal
            if times is not None:
                bars.append(Bar(f"bytes read per rank / ideal, {number} ranks", who, times, most))
    for stage in (1, 2, 3):
        what = f"save, stage {stage}"
        ours = found[what, OURS].median_s
        bars.append(Bar(f"durable save / {THEIRS}'s, stage {stage}", OURS, ours / found[what, THEIRS].median_s, 0.6))
        bars.append(Bar(f"durable save / {FLUSHED}, stage {stage}", OURS, ours / found[what, FLUSHED].median_s, None))
    for what, who, limits in (("import", OURS, (0.5, 1.0)), ("ds_to_universal", THEIRS, (None, None))):
        line = found[what, who]
        if line.memory_bytes is not None and line.extra_disk is not None:
            bars.append(Bar(f"{what}: GB of memory", who, line.memory_bytes / 1e9, limits[0]))
            bars.append(Bar(f"{what}: extra disk / source", who, line.extra_disk, limits[1]))
    return bars
