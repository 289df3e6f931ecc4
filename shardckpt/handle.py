# SPDX-License-Identifier: Apache-2.0
"""`SaveHandle`: what became of a save that was asked for."""

from __future__ import annotations

from typing import Literal

from .changes import Changes
from .errors import CheckpointError, SavePending
from .saving import Saved

SaveState = Literal["requested", "staged", "durable", "failed"]


class SaveHandle:
    """A save that was asked for. Any thread may use it."""

    def __init__(self, step: int) -> None:
        self.step = step
        """Number of the training step."""
        self._state: SaveState = "requested"
        self._saved: Saved | None = None
        self._error: CheckpointError | None = None
        self._seen = False
        self._stall = 0.0
        self._changed = Changes()

    @property
    def state(self) -> SaveState:
        """``requested``; ``staged``: the state may be changed, and a background process finishes even if this one dies;
        ``durable``: nothing can undo it; or ``failed``."""
        return self._state

    @property
    def error(self) -> CheckpointError | None:
        """Why it failed."""
        return self._error

    @property
    def stall(self) -> float:
        """Seconds that training was held: by the call of save, and by waits for staging."""
        return self._stall

    def done(self) -> bool:
        """Whether it is durable or has failed."""
        return self._state in ("durable", "failed")

    def wait_staged(self, timeout: float | None = None) -> None:
        """Return when the state may be changed. Raises `SavePending` after ``timeout`` seconds."""
        self._wait("staged", "requested", timeout)

    def result(self, timeout: float | None = None) -> Saved:
        """The committed checkpoint, when it is durable.

        Raises `SavePending` after ``timeout`` seconds, and what made the save fail.
        """
        self._wait("durable", "staged", timeout)
        if self._error is not None:
            self._seen = True
            raise self._error
        assert self._saved is not None
        return self._saved

    def _wait(self, wanted: SaveState, latest: SaveState, timeout: float | None) -> None:
        pending = ("requested",) if latest == "requested" else ("requested", "staged")
        if not self._changed.wait_for(lambda: self._state not in pending, timeout):
            raise SavePending(
                f"the save of step {self.step} is {self._state} and not {wanted} after {timeout:g} s; it goes on",
                step=self.step,
                state=self._state,
            )

    # ---- for the engine

    def _to_staged(self) -> None:
        with self._changed.lock:
            if self._state == "requested":
                self._state = "staged"
            self._changed.notify_all()

    def _to_durable(self, saved: Saved) -> None:
        with self._changed.lock:
            self._state, self._saved = "durable", saved
            self._changed.notify_all()

    def _to_failed(self, error: CheckpointError) -> None:
        with self._changed.lock:
            self._state, self._error = "failed", error
            self._changed.notify_all()

    def _add_stall(self, seconds: float) -> None:
        with self._changed.lock:
            self._stall += seconds

    def _take_error(self) -> CheckpointError | None:
        """The error, the first time that it is asked for and unless `result` has raised it."""
        seen, self._seen = self._seen, True
        return None if seen else self._error
