# SPDX-License-Identifier: Apache-2.0
"""What a save or load spent its time on: phases with seconds and bytes, on each rank, and the callback that hears of them.

They overlap, because threads work on different chunks at once, and so need not add up to the whole.

========  ==================================================================================================================
capture   save: walk the state and describe its layout
exchange  save: tell the other ranks of the layout; load: tell them what is wanted, and pass on what was read for them
plan      save: work out who writes what; load: the same from the manifest, open the target, work out what to read
stage     save: copy tensors to host memory
hash      save: digests of what is written
write     save: hand data to the storage
fsync     save: make it durable there
readback  save: read it back from there and compare, if that is asked for
receipts  save: wait until the other ranks have done that; on other ranks than 0, also until the checkpoint is committed
commit    save: look at the files, build and publish the manifest; on rank 0
read      load: get data from the storage
verify    load: compare it with its digests
place     load: put it into the tensors, and values into their places
========  ==================================================================================================================
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, get_args

from .errors import ConfigError

logger = logging.getLogger("shardckpt")

Operation = Literal["save", "load"]
Phase = Literal[
    "capture",
    "exchange",
    "plan",
    "stage",
    "hash",
    "write",
    "fsync",
    "readback",
    "receipts",
    "commit",
    "read",
    "verify",
    "place",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""All phases, in the order in which they begin."""


@dataclass(frozen=True, slots=True)
class Event:
    """One phase of a save or load that is over on one rank."""

    operation: Operation
    """Which of the two."""
    phase: Phase
    """What was done."""
    step: int
    """Number of the training step that is saved or loaded."""
    rank: int
    """The rank that did it."""
    seconds: float
    """Wall time during which this rank was at it, with one thread or several."""
    bytes: int
    """Bytes that went through it; 0 where that means nothing."""


class Timings:
    """Adds up the phases of one save or load on one rank; any thread may add."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._totals: dict[Phase, tuple[float, int]] = {}
        self._running: dict[Phase, tuple[int, float]] = {}

    def add(self, phase: Phase, seconds: float, nbytes: int = 0) -> None:
        """Add what was measured elsewhere. From several threads at once take `measure`, which counts a moment only once."""
        with self._lock:
            self._add(phase, seconds, nbytes)

    @contextmanager
    def measure(self, phase: Phase, nbytes: int = 0) -> Iterator[None]:
        """Add the time of a ``with`` block, or of each call of a function that this decorates.

        While several threads are in blocks of one phase, time counts once, not each.
        """
        with self._lock:
            threads, since = self._running.get(phase, (0, 0.0))
            self._running[phase] = (threads + 1, since if threads else self._clock())
        try:
            yield
        finally:
            with self._lock:
                threads, since = self._running[phase]
                self._running[phase] = (threads - 1, since)
                self._add(phase, 0.0 if threads > 1 else self._clock() - since, nbytes)

    def _add(self, phase: Phase, seconds: float, nbytes: int) -> None:
        before = self._totals.get(phase, (0.0, 0))
        self._totals[phase] = (before[0] + seconds, before[1] + nbytes)

    def __str__(self) -> str:
        return ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())

    @property
    def seconds(self) -> dict[Phase, float]:
        """Seconds by phase, so far, in the order of `PHASES`."""
        return {phase: seconds for phase, (seconds, _) in self.snapshot().items()}

    @property
    def bytes(self) -> dict[Phase, int]:
        """Bytes by phase, so far, in the order of `PHASES`."""
        return {phase: nbytes for phase, (_, nbytes) in self.snapshot().items()}

    def snapshot(self) -> dict[Phase, tuple[float, int]]:
        """(seconds, bytes) by phase, so far, in the order of `PHASES`: plain values to send to another process."""
        with self._lock:
            return {phase: self._totals[phase] for phase in PHASES if phase in self._totals}

    def merge(self, snapshot: Mapping[Phase, tuple[float, int]]) -> None:
        """Add what another process has measured."""
        for phase, (seconds, nbytes) in snapshot.items():
            self.add(phase, seconds, nbytes)


class Sink:
    """The user's callback. What it raises is logged, the first time with its traceback, and never reaches the engine."""

    def __init__(self, on_event: Callable[[Event], object] | None = None) -> None:
        if on_event is not None and not callable(on_event):
            raise ConfigError(f"on_event={on_event!r} cannot be called; pass a function of one Event")
        self._on_event = on_event
        self._has_failed = False

    def report(self, operation: Operation, step: int, rank: int, timings: Timings) -> None:
        """Call back once for each phase of an operation that is over on this rank, in the order of `PHASES`."""
        if self._on_event is not None:
            for phase, (seconds, nbytes) in timings.snapshot().items():
                self._call(self._on_event, Event(operation, phase, step, rank, seconds, nbytes))

    def _call(self, on_event: Callable[[Event], object], event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            if not self._has_failed:
                logger.exception("on_event raised at %s; it goes on being called, and more errors are not logged", event)
            self._has_failed = True
