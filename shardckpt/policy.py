# SPDX-License-Identifier: Apache-2.0
"""When to save: by step, by time, or because a process was told to stop; the same answer on all ranks in the same step."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from .appointment import Appointment, Peers
from .diary import Reason
from .errors import ConfigError
from .failure import Failure
from .options import Schedule
from .pacing import Pacer, Save
from .preemption import Signals, check_signals

logger = logging.getLogger("shardckpt")

_LAST_SECONDS = 2.0
"""For training to end by itself, when it cannot save any more and is told to stop."""


class SavePolicy:
    """What stands behind `Checkpointer.should_save` and `Checkpointer.on_signal`, on one rank."""

    def __init__(self, schedule: Schedule, peers: Peers, clock: Callable[[], float] = time.monotonic) -> None:
        self._schedule = schedule
        self._peers = peers
        # Steps need no talk; rank 0's clock is everybody's.
        self._appointment = Appointment(peers, self._leave_without) if schedule.timed else None
        self._pacer = Pacer(schedule, clock) if schedule.timed and peers.rank == 0 else None
        self._signals = Signals(self._hear)
        self._statuses: dict[int, int | None] = {}
        self._preemption: Reason | None = None
        self._heard: int | None = None
        self._closed = threading.Event()

    @property
    def preempted(self) -> bool:
        """Whether ranks have agreed, in a call of `should_save` that is over, to save because one of them is to stop."""
        return self._preemption is not None

    def should_save(self, step: int) -> bool:
        """Whether to save now. Once per step on every rank; raises what keeps the ranks from agreeing."""
        every = self._schedule.every_steps
        due = every is not None and step % every == 0
        if self._appointment is None:
            if every is None:
                raise ConfigError(
                    "should_save has nothing to go by: give the Checkpointer one of every_steps, every_seconds, continuous and "
                    "max_overhead, or call on_signal before"
                )
            return due
        if self._pacer is not None and (why := self._pacer.tick()) is not None:
            self._appointment.request(why)
        reasons = self._appointment.arrive()
        if reasons:
            self._keep(step, reasons)
        return due or bool(reasons)

    def on_signal(self, signals: Sequence[int], exit_status: int | None, leave: bool) -> None:
        """Ask all ranks for a last save when one of ``signals`` comes. On every rank; raises `ConfigError`."""
        check_signals(signals)
        if exit_status is not None and not leave:
            raise ConfigError(f"exit_status={exit_status!r} has no effect with leave=False: your code ends the process")
        if exit_status is not None and (type(exit_status) is not int or not 0 <= exit_status <= 255):
            raise ConfigError(
                f"exit_status={exit_status!r} is not an int from 0 to 255 (or None, for 128 + the signal's number)"
            )
        if self._appointment is None:
            self._appointment = Appointment(self._peers, self._leave_without)
        for signum in signals:
            self._statuses[signum] = (128 + signum if exit_status is None else exit_status) if leave else None
        self._signals.install(signals)

    def saved(self, save: Save) -> None:
        """A save was called for and has returned. Raises `SystemExit` when it was the last one and the process is to leave."""
        if self._pacer is not None:
            self._pacer.save_began(save)
        status = self._exit_status
        if status is not None:
            raise SystemExit(status)

    def close(self) -> None:
        """Take no part any more. A process that leaves stays deaf to signals, so that its exit status is the promised one."""
        self._closed.set()
        if self._exit_status is None:
            self._signals.restore()
        if self._appointment is not None:
            self._appointment.close()

    @property
    def _exit_status(self) -> int | None:
        if self._preemption is None:
            return None
        # Another rank's signal, which this one was not asked to handle.
        signum = self._preemption.signum
        return self._statuses.get(signum, 128 + signum)

    def _keep(self, step: int, reasons: Sequence[Reason]) -> None:
        calls_to_stop = [reason for reason in reasons if reason.signum]
        if calls_to_stop and self._preemption is None:
            self._preemption = calls_to_stop[0]
        if self._pacer is not None and len(calls_to_stop) < len(reasons):
            self._pacer.granted()
        if self._peers.rank == 0:
            level = logging.WARNING if calls_to_stop else logging.INFO
            logger.log(level, "saving step %d: %s", step, "; ".join(map(str, reasons)))

    def _hear(self, signum: int) -> None:
        self._heard = signum
        if self._appointment is not None:
            self._appointment.request(f"signal {signum}", signum)

    def _leave_without(self, failure: Failure) -> None:
        """End a process that was told to stop, when there can be no last save: others are gone, so that training most likely
        waits for them, and for ever. Without a handler, the signal would have ended it long before.
        """
        status = None if self._heard is None else self._statuses.get(self._heard)
        if status is None or self._closed.wait(_LAST_SECONDS):
            return
        logger.error("signal %d: there is no last save, as not all ranks can be asked for it: %s", self._heard, failure.message)
        os._exit(status)
