# SPDX-License-Identifier: Apache-2.0
"""Wait for conditions in tests, with a patience that only a broken engine uses up."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

from shardckpt import changes

PATIENCE = 90.0
"""Seconds; more than a case of ranks has, so that what hangs is shown where it does, and not where others gave it up."""
_LONGEST_PAUSE = 0.05

_Result = TypeVar("_Result")


def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Return when ``condition()`` is true; raises `TimeoutError` when it does not become so."""
    begin = time.monotonic()
    while not condition():
        waited = time.monotonic() - begin
        if waited > patience:
            raise TimeoutError(f"not so after {patience:g} s: {condition.__qualname__}")
        # in proportion, as many may wait for long, and looking costs time that others need
        time.sleep(min(0.001 + waited / 20, _LONGEST_PAUSE))


def until_blocked(thread: threading.Thread, function: Callable[..., object]) -> None:
    """Return when ``thread`` waits for something of `threading`, or for `Changes`, somewhere inside of ``function``."""

    def is_blocked() -> bool:
        if not thread.is_alive() and thread.ident is not None:
            raise AssertionError(f"{thread.name} has ended instead of waiting in {function.__qualname__}")
        frame: FrameType | None = sys._current_frames().get(thread.ident or 0)
        if frame is None or frame.f_code.co_filename not in (threading.__file__, changes.__file__):
            return False
        while frame is not None and frame.f_code is not getattr(function, "__code__", None):
            frame = frame.f_back
        return frame is not None

    until(is_blocked)


class InThread(threading.Thread, Generic[_Result]):
    """Calls a function in a thread of its own."""

    def __init__(self, function: Callable[[], _Result]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._returned: list[_Result] = []
        self._raised: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._returned.append(self._function())
        except BaseException as error:
            self._raised = error

    def result(self) -> _Result:
        """What the function returned, or raises what it raised."""
        error = self._wait()
        if error is not None:
            raise error
        return self._returned[0]

    def error(self) -> BaseException:
        """What the function raised."""
        error = self._wait()
        if error is None:
            raise AssertionError(f"{self._function} returned {self._returned[0]!r}")
        return error

    def _wait(self) -> BaseException | None:
        self.join(PATIENCE)
        if self.is_alive():
            raise TimeoutError(f"{self._function} does not come to its end")
        return self._raised
