# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a process to stop: handlers that only pass the word on.

Launchers signal process groups, and cluster managers whatever is in the job, so the worker processes of data loaders get these
signals too. They would die of it, and training with them, before there is a last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

from .errors import ConfigError

_LOADER = "torch.utils.data._utils.worker"


def check_signals(signals: Sequence[int]) -> None:
    """Raise `ConfigError` unless this thread may handle all these."""
    if not signals:
        raise ConfigError("on_signal needs at least one signal, such as signal.SIGTERM")
    for signum in signals:
        if not isinstance(signum, int) or signum not in signal.valid_signals():
            raise ConfigError(f"{signum!r} is not a signal; the signal module has their names, such as signal.SIGTERM")
        if signum in (signal.SIGKILL, signal.SIGSTOP):
            raise ConfigError(f"no process can handle {signal.Signals(signum).name}; SIGTERM is what asks a process to stop")
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("Python lets only the main thread handle signals: call on_signal there")


class Signals:
    """Calls ``tell`` with the first signal that comes; those after it change nothing.

    ``tell`` has to be fit for a signal handler. Whatever handled the signals before does so again after `restore`. Workers of
    data loaders that are forked in between heed only their parent's.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._told = False
        self._owner = os.getpid()
        self._restored = False
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int] = {}

    def install(self, signals: Sequence[int]) -> None:
        """Handle these from now on; they have passed `check_signals`."""
        if not self._previous:
            multiprocessing.util.register_after_fork(self, Signals._shield_loader)
        for signum in signals:
            if signum not in self._previous:
                # A handler that was set outside of Python is None, which cannot be set again.
                self._previous[signum] = signal.getsignal(signum) or signal.SIG_DFL
                signal.signal(signum, self._handle)

    def restore(self) -> None:
        """Put back what was there before, unless somebody else has set a handler since."""
        self._restored = True
        if threading.current_thread() is threading.main_thread():
            for signum, previous in self._previous.items():
                if signal.getsignal(signum) == self._handle:
                    signal.signal(signum, previous)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self._restored or os.getpid() != self._owner:
            # Closed outside of the main thread, or in a forked process, which has nobody to tell.
            signal.signal(signum, self._previous[signum])
            signal.raise_signal(signum)
        elif not self._told:
            self._told = True
            self._tell(signum)

    def _shield_loader(self) -> None:
        """In each process that `multiprocessing` forks off this one."""
        target = getattr(multiprocessing.current_process(), "_target", None)
        if not self._restored and getattr(target, "__module__", None) == _LOADER:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)
            threading.Thread(target=_obey, args=(os.getppid(), list(self._previous)), daemon=True).start()


def _obey(parent: int, signals: Iterable[int]) -> None:
    """Take signals that are blocked, and end the process when its parent terminates it, as torch's own handler does."""
    while True:
        taken = signal.sigwaitinfo(signals)
        if taken.si_signo == signal.SIGTERM and taken.si_pid == parent:
            os._exit(0)
