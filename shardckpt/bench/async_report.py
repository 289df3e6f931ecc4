# SPDX-License-Identifier: Apache-2.0
"""What saves beside training cost, as data. The field names are the keys of ``--json``.

What a save has *lost* is by how many seconds the training steps that it met, until it was durable, took longer than as many
steps of the same turn before it, without checkpoints. Less the seconds that training was held (the *stall*), and as a share of
the rest of the time until the save was durable, that is the *loss* of training's speed while a save is in flight, however
long a step is beside a save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from .async_contest import AsyncOutcome, Cycle, Turn
from .async_contestants import NOBODY, PEER, Engine, Entrant
from .machine import Machine
from .report import WorkloadFacts

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncLine:
    """All turns of one contestant. Times are in seconds, of the slowest rank; what was not measured is None."""

    contestant: str
    """Name."""
    how: str
    """What a user would write."""
    stalls: tuple[float, ...] = ()
    """How long each save has held training: its call, and waits for staging."""
    stall_s: float | None = None
    """Median of these."""
    stall_max_s: float | None = None
    """Greatest of these."""
    call_s: float | None = None
    """Median of the calls alone."""
    first_stall_s: float | None = None
    """Of the first saves after opening, when processes start and memory is touched for the first time: the median."""
    times_copy: float | None = None
    """Median stall divided by the time of a plain copy."""
    steps_per_s: float | None = None
    """Training steps per second without checkpoints, before the contestant came, at the median."""
    steps_per_s_in_flight: float | None = None
    """The same while a save is under way and does not hold training."""
    loss: float | None = None
    """By which share that is less: the median of the saves. What training without any saves shows here is noise."""
    lost_s: float | None = None
    """Seconds of training that a save takes in all, stall included: the median."""
    durable_s: float | None = None
    """From the call until the checkpoint is durable, while training goes on: the median."""
    times_blocking: float | None = None
    """That divided by the median time of a blocking save."""
    memory_bytes: int | None = None
    """Most that a rank and its child processes held while they saved, beyond what they held before, without training."""
    times_shard: float | None = None
    """That divided by the bytes that a rank saves."""
    checked: int = 0
    """Checkpoints that were loaded again and compared with what the state was at the call, bit for bit."""
    wrong: tuple[str, ...] = ()
    """Which of them were not equal, and where."""
    problem: str = ""
    """Why it could not end a turn."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that is to be reached."""

    name: str
    """Which figure."""
    contestant: str
    """Whose."""
    found: float
    """What was measured."""
    at_most: float | None
    """What it is to be, if anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncReport:
    """What saves cost training."""

    benchmark: str = "async"
    """Always ``async``."""
    machine: Machine
    """Where it ran."""
    device: str
    """``cpu`` or ``cuda``: where the model was trained."""
    workload: WorkloadFacts
    """What was saved."""
    shard_bytes: int
    """Bytes that a rank saves."""
    copy_s: float
    """Time of one plain copy of these bytes by all ranks at once, to memory that had been touched before: the median."""
    copied_by: str
    """What made that copy: the faster one of those that were tried."""
    results: Sequence[AsyncLine]
    """Contestants in the order of their turns."""
    bars: Sequence[Bar]
    """What is to be reached, and what was found."""


def summarize_async(
    outcome: AsyncOutcome, entrants: Sequence[Entrant], machine: Machine, workload: WorkloadFacts, device: str
) -> AsyncReport:
    """The report of what rank 0 has seen."""
    copied_by, copies = min(outcome.copies.items(), key=lambda item: median(item[1]))
    turns = {entrant.name: [turn for turn in outcome.turns if turn.contestant == entrant.name] for entrant in entrants}
    scales = _Scales(
        copy=median(copies),
        shard=outcome.shard,
        blocking={e.side: _middle(turns[e.name], _durable) for e in entrants if e.blocking},
    )
    lines = [_summarize(entrant, turns[entrant.name], scales) for entrant in entrants]
    return AsyncReport(
        machine=machine,
        device=device,
        workload=workload,
        shard_bytes=outcome.shard,
        copy_s=scales.copy,
        copied_by=copied_by,
        results=lines,
        bars=_compare(list(zip(entrants, lines, strict=True)), outcome.shard),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scales:
    """What all contestants are compared with."""

    copy: float
    shard: int
    blocking: dict[str, float | None]


def _summarize(entrant: Entrant, turns: Sequence[Turn], scales: _Scales) -> AsyncLine:
    ended = [turn for turn in turns if not turn.problem]
    alone = 1 / median([step for turn in turns for step in turn.alone])
    loss = None if entrant.blocking else _middle(ended, _noise if entrant.side == NOBODY else _loss)
    line = AsyncLine(
        contestant=entrant.name,
        how=entrant.how,
        steps_per_s=alone,
        steps_per_s_in_flight=None if loss is None else alone * (1 - loss),
        loss=loss,
        problem=next((turn.problem for turn in turns if turn.problem), ""),
    )
    if not ended:
        return line
    memory = int(median([turn.memory for turn in ended]))
    if entrant.side == NOBODY:
        return replace(line, memory_bytes=memory)
    stalls = tuple(cycle.stall for turn in ended for cycle in turn.cycles[1:])
    durable = _middle(ended, _durable)
    return replace(
        line,
        stalls=stalls,
        stall_s=median(stalls),
        stall_max_s=max(stalls),
        call_s=_middle(ended, lambda turn, cycle: cycle.call),
        first_stall_s=median([turn.cycles[0].stall for turn in ended]),
        times_copy=median(stalls) / scales.copy,
        lost_s=_middle(ended, _lost),
        durable_s=durable,
        times_blocking=_ratio(durable, scales.blocking.get(entrant.side)),
        memory_bytes=memory,
        times_shard=memory / scales.shard,
        checked=sum(turn.checked for turn in ended),
        wrong=tuple(wrong for turn in ended for wrong in turn.wrong),
    )


# ---- what one save tells


def _middle(turns: Sequence[Turn], measure: Callable[[Turn, Cycle], float | None]) -> float | None:
    """The median of the saves that count and have something to tell; None when there are none."""
    found = [measure(turn, cycle) for turn in turns for cycle in turn.cycles[1:]]
    known = [value for value in found if value is not None]
    return median(known) if known else None


def _durable(turn: Turn, cycle: Cycle) -> float:
    return cycle.durable


def _lost(turn: Turn, cycle: Cycle) -> float:
    """By how many seconds the steps that met the save took longer."""
    begun = [sum(cycle.steps[:at]) for at in range(len(cycle.steps))]
    met = sum(1 for at in begun if at < cycle.durable)
    return sum(cycle.steps[:met]) - met * median(turn.alone)


def _loss(turn: Turn, cycle: Cycle) -> float | None:
    """None when training was held until the save was durable."""
    flight = cycle.durable - cycle.stall
    return (_lost(turn, cycle) - cycle.stall) / flight if flight > 0 else None


def _noise(turn: Turn, cycle: Cycle) -> float:
    return 1 - len(cycle.steps) * median(turn.alone) / sum(cycle.steps)


def _ratio(value: float | None, scale: float | None) -> float | None:
    """None when one of them is not known, or when the scale is lost in noise."""
    return None if value is None or scale is None or scale <= 0 else value / scale


# ---- what is to be reached


def _compare(lines: Sequence[tuple[Entrant, AsyncLine]], shard: int) -> list[Bar]:
    """The figures of the engine's modes beside what they are to be."""
    peers = [(entrant, line) for entrant, line in lines if entrant.side == PEER and not entrant.blocking and not line.wrong]
    stalls = {
        copies: min((line.stall_s for entrant, line in peers if entrant.copies == copies and line.stall_s), default=None)
        for copies in ("in the call", "later")
    }
    loss = min((line.loss for _, line in peers if line.loss is not None), default=None)
    lost = min((line.lost_s for _, line in peers if line.lost_s is not None), default=None)
    engines = [(e, line) for e, line in lines if isinstance(e, Engine) and not e.blocking]
    eager = {entrant.options.background: line.stall_s for entrant, line in engines if entrant.options.stage == "eager"}
    bars: list[Bar] = []

    def add(name: str, line: AsyncLine, found: float | None, at_most: float | None) -> None:
        if found is not None:
            bars.append(Bar(name, line.contestant, found, at_most))

    for entrant, line in engines:
        if entrant.options.stage == "eager":
            add("stall / plain copy", line, line.times_copy, 1.25)
            add("stall / least of DCP's that copy in the call", line, _ratio(line.stall_s, stalls["in the call"]), 0.5)
        if entrant.options.stage == "lazy":
            add("stall / eager stall", line, _ratio(line.stall_s, eager.get(entrant.options.background)), 0.3)
            add("stall / least of DCP's that copy later", line, _ratio(line.stall_s, stalls["later"]), None)
        add("loss in flight / least of DCP's", line, _ratio(line.loss, loss), 2 / 3)
        add("lost in all / least of DCP's", line, _ratio(line.lost_s, lost), None)
        add("time until durable / blocking save", line, line.times_blocking, 1.3)
        if line.memory_bytes is not None:
            add("MiB of memory beyond the shard", line, (line.memory_bytes - shard) / _MIB, 64.0)
    return bars
