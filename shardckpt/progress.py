# SPDX-License-Identifier: Apache-2.0
"""What becomes of one save, told to everybody who wants to know: the handle, the journal, the log, and the user's callback."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TypeAlias

from .errors import CheckpointError
from .events import Sink, Timings
from .handle import SaveHandle
from .journal import Journal
from .saving import Saved

logger = logging.getLogger("shardckpt")

Outcome: TypeAlias = Saved | CheckpointError


class Progress:
    """One save on one rank. All methods but `staged` take as long as the storage does, so training must not wait for them."""

    def __init__(
        self, handle: SaveHandle, url: str, rank: int, sink: Sink, journal: Journal | None, on_durable: Callable[[], None]
    ) -> None:
        """``journal`` is rank 0's. ``on_durable`` is called before the handle tells that the save is durable."""
        self.handle = handle
        self.timings = Timings()
        self._url = url
        self._rank = rank
        self._sink = sink
        self._journal = journal
        self._on_durable = on_durable
        self._attempt = secrets.token_hex(8)
        self.is_noted = False
        """Whether the journal was told that all ranks have agreed on the save."""

    def staged(self) -> None:
        """The save no longer depends on the state."""
        self.handle._to_staged()

    def note_requested(self, attempt: str) -> None:
        """Write down that all ranks have agreed on the save."""
        self._attempt, self.is_noted = attempt, True
        if self._journal is not None:
            self._journal.requested(self.handle.step, attempt)

    def note_staged(self, attempt: str) -> None:
        """Write down that this rank, for one, has staged its part."""
        self._attempt, self.is_noted = attempt, True
        if self._journal is not None:
            self._journal.staged(self.handle.step, attempt)

    def ended(self, outcome: Outcome) -> None:
        """The save is over. To be called once."""
        step = self.handle.step
        if isinstance(outcome, CheckpointError):
            logger.error("the save of step %d in %s failed: %s: %s", step, self._url, type(outcome).__name__, outcome)
            if self._journal is not None:
                self._journal.failed(step, self._attempt, outcome)
            self.handle._to_failed(outcome)
        else:
            self._on_durable()
            if self._journal is not None:
                self._journal.durable(step, self._attempt)
            self.handle._to_durable(outcome)
        self._sink.report("save", step, self._rank, self.timings)
