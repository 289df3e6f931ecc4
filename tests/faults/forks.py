# SPDX-License-Identifier: Apache-2.0
"""Real processes that cost milliseconds: forks of a process which has torch loaded, to be killed at any call."""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from shardckpt.coordinate import Coordinator
from shardckpt.meeting import serve
from shardckpt.wire import tcp_store

PATIENCE: Final = 120.0
"""Seconds; used up only by what hangs."""
LONGEST: Final = 600.0
"""Seconds for all of the faults of a test together, on a busy machine."""
DIED: Final = "killed by SIGKILL"
"""In place of what a job would have returned."""
_PR_SET_PDEATHSIG: Final = 1
_PORT_DIGITS: Final = 6

Job = Callable[[], Any]


def run_worlds(worlds: Sequence[Sequence[Job]], *, together: bool = False, at_once: int = 8) -> list[list[Any]]:
    """Run each job of each world in a forked process; what they return, or `DIED`, by world and rank.

    With ``together`` the rest of a world is killed when one of it was, as launchers do. Raises what a job has raised, and
    `TimeoutError` when one does not end.
    """
    outcomes = []
    for start in range(0, len(worlds), at_once):
        outcomes += _Batch(worlds[start : start + at_once], together).run()
    return outcomes


class Meeting:
    """Where the forked ranks of one world meet; made before they are forked."""

    def __init__(self, patience: Sequence[float]) -> None:
        """``patience`` is that of each rank, in seconds."""
        self._patience = patience
        self._pipe = os.pipe()

    @contextmanager
    def attend(self, rank: int) -> Iterator[Coordinator]:
        """The coordinator of ``rank``."""
        read, write = self._pipe
        server = serve(PATIENCE) if rank == 0 else None
        if server is not None:
            others = len(self._patience) - 1
            os.write(write, f"{server.port:0{_PORT_DIGITS}}".encode() * others)
        port = int(os.read(read, _PORT_DIGITS)) if server is None else server.port

        def dial() -> Any:
            return tcp_store("localhost", port, PATIENCE)

        with Coordinator(rank, len(self._patience), self._patience[rank], dial, server) as coordinator:
            coordinator._introduce(PATIENCE)
            yield coordinator

    def close(self) -> None:
        for end in self._pipe:
            os.close(end)


class _Batch:
    """Worlds that run at the same time."""

    def __init__(self, worlds: Sequence[Sequence[Job]], together: bool) -> None:
        self._together = together
        self._worlds: list[list[int]] = []
        self._ends: dict[int, int] = {}
        self._written: dict[int, bytes] = {}
        for jobs in worlds:
            self._worlds.append([])
            for job in jobs:
                pid, end = _fork(job)
                self._worlds[-1].append(pid)
                self._ends[end] = pid
                self._written[pid] = b""

    def run(self) -> list[list[Any]]:
        try:
            self._read()
        finally:
            # of a process that has ended by itself, the status stays what it was
            statuses = {pid: _end(pid) for pid in self._written}
        return [[_judge(self._written[pid], statuses[pid]) for pid in world] for world in self._worlds]

    def _read(self) -> None:
        """Take what comes out of each process until it ends."""
        deadline = time.monotonic() + LONGEST
        with selectors.DefaultSelector() as selector:
            for end in self._ends:
                selector.register(end, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"{len(selector.get_map())} of {len(self._ends)} processes do not end")
                for key, _ in ready:
                    pid, data = self._ends[key.fd], os.read(key.fd, 1 << 16)
                    self._written[pid] += data
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        self._ended(pid)

    def _ended(self, pid: int) -> None:
        if self._together and not self._written[pid]:
            for other in next(world for world in self._worlds if pid in world):
                os.kill(other, signal.SIGKILL)


def _fork(job: Job) -> tuple[int, int]:
    """The process that does the job, and where its outcome can be read."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            outcome = job()
        except BaseException as error:
            outcome = error
        with open(write, "wb") as pipe:
            pipe.write(pickle.dumps(outcome))
    finally:
        os._exit(0)


def _end(pid: int) -> int:
    """Make sure that it is gone; its status."""
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def _judge(written: bytes, status: int) -> Any:
    if not written:
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return DIED
        raise RuntimeError(f"a process ended with status {status} and without an outcome")
    outcome = pickle.loads(written)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
