# SPDX-License-Identifier: Apache-2.0
"""When the next save is due by the clock, and what the last one cost; only rank 0 asks, from its training thread."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from .options import Schedule

_STEPS_TO_COMPARE_WITH = 64
_FEWEST_STEPS_TO_COMPARE_WITH = 5
# A step that takes longer than so many usual ones (an evaluation, a compilation) says little about saves: it counts as so many.
_LONGEST_STEP = 4.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0


class Save(Protocol):
    """What is asked of a save that is under way."""

    @property
    def stall(self) -> float:
        """Seconds that it has kept training waiting so far."""

    @property
    def error(self) -> Exception | None:
        """Why it failed, if it has."""

    def done(self) -> bool:
        """Whether it is over."""


class Pacer:
    """Follows one save after the other by the time between calls of `tick`, one per training step."""

    def __init__(self, schedule: Schedule, clock: Callable[[], float] = time.monotonic) -> None:
        self._schedule = schedule
        self._clock = clock
        self._last_tick: float | None = None
        self._begun = 0.0
        self._asked = False
        self._save: Save | None = None
        self._failures = 0
        """Saves in a row that have failed before this one."""
        self._stall_seen = 0.0
        self._cost: float | None = None
        self._touched = False
        """Whether a save was under way at some time since the last tick."""
        self._usual: deque[float] = deque(maxlen=_STEPS_TO_COMPARE_WITH)
        """Seconds of steps with no save under way."""
        self._burdened: list[float] = []
        """Seconds of steps with this save under way, without its stall."""

    def tick(self) -> str | None:
        """Count one step; returns why a save is due now, once for each save."""
        now = self._clock()
        self._measure(now)
        if self._asked or (self._save is not None and not self._save.done()):
            return None
        reason = self._due(now - self._begun)
        self._asked = reason is not None
        return reason

    def granted(self) -> None:
        """All ranks have agreed to save now; if nothing is saved all the same, the time counts from here."""
        self._asked = False
        self._begun = self._clock()

    def save_began(self, save: Save) -> None:
        """``save`` was called for and has returned, whoever wanted it: the time to the next one counts from that call."""
        self._failures = self._failures_so_far()
        self._begun = self._clock() - save.stall
        self._save, self._stall_seen, self._cost = save, 0.0, None
        self._burdened = []
        self._touched = True

    def _measure(self, now: float) -> None:
        stall = self._save.stall if self._save is not None else 0.0
        if self._last_tick is None:
            self._begun = now
        else:
            step = now - self._last_tick - (stall - self._stall_seen)
            (self._burdened if self._touched else self._usual).append(step)
        self._last_tick, self._stall_seen = now, stall
        self._touched = self._save is not None and not self._save.done()

    def _due(self, seconds: float) -> str | None:
        schedule = self._schedule
        if schedule.every_seconds is not None:
            return f"a save every {schedule.every_seconds:g} s" if seconds >= schedule.every_seconds else None
        if seconds < self._pause():
            return None
        if schedule.continuous:
            return "continuous saves"
        if self._save is None:
            return "the first of saves with max_overhead"
        cost = self._cost_of_last()
        if schedule.max_overhead is None or cost is None or cost > schedule.max_overhead * seconds:
            return None
        return f"the last save cost {cost:.3g} s, {schedule.max_overhead:.3g} of the {seconds:.3g} s since it began"

    def _pause(self) -> float:
        """Seconds to leave between saves that fail at once, for example on a full disk: twice as long each time."""
        failures = self._failures_so_far()
        return min(_FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, 30), _LONGEST_PAUSE_SECONDS) if failures else 0.0

    def _failures_so_far(self) -> int:
        if self._save is None:
            return 0
        return self._failures + 1 if self._save.error is not None else 0

    def _cost_of_last(self) -> float | None:
        """Seconds that training lost; None as long as there are too few other steps to compare with."""
        if self._cost is None and self._save is not None and len(self._usual) >= _FEWEST_STEPS_TO_COMPARE_WITH:
            longest = _LONGEST_STEP * statistics.median(self._usual)

            def clipped(steps: Iterable[float]) -> list[float]:
                return [min(step, longest) for step in steps]

            # Both sides in the same way, so that what is unusual on both cancels out.
            usual = statistics.fmean(clipped(self._usual))
            slowdown = sum(clipped(self._burdened)) - usual * len(self._burdened)
            self._cost = self._save.stall + max(0.0, slowdown)
        return self._cost
