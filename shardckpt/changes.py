# SPDX-License-Identifier: Apache-2.0
"""Waiting for what other threads do, in a way that Ctrl-C cannot break.

What the handler of a signal raises comes out between any two steps of the main thread's Python code. In the midst of
`threading.Condition` that leaves a lock held for ever, or lets go of one that another thread has taken, and somebody hangs.
Here each step that takes something is a single call into C, which has happened or has not.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

_LOOK_SECONDS = 1.0


class Changes:
    """A lock for what threads share, and news of its changes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Guards what is shared. It is taken by ``with changes.lock``: a method that did so could be interrupted after it."""
        self._waiting: set[queue.SimpleQueue[None]] = set()

    def notify_all(self) -> None:
        """Wake all who wait, so that they look again; with the lock held."""
        for waiter in self._waiting:
            waiter.put(None)

    def wait_for(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Return True when ``condition()``, which is asked with the lock held, is true; False after ``timeout`` seconds."""
        deadline = math.inf if timeout is None else monotonic() + timeout
        waiter: queue.SimpleQueue[None] = queue.SimpleQueue()
        while True:
            with self.lock:
                if condition():
                    self._waiting.discard(waiter)
                    return True
                self._waiting.add(waiter)
                left = deadline - monotonic()
                if left <= 0:
                    self._waiting.discard(waiter)
                    return False
            with suppress(queue.Empty):
                # not for longer: who made the change may have been interrupted before it told of it
                waiter.get(timeout=min(left, _LOOK_SECONDS))
