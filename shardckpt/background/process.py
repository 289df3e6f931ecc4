# SPDX-License-Identifier: Apache-2.0
"""The trainer's side of a background process: starts it, tells it what is staged, and finds out what became of a save."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from shardckpt.commit import find_committed
from shardckpt.coordinate import Coordinator
from shardckpt.errors import BackgroundDied, CheckpointError, CoordinationError, RankTimeout
from shardckpt.events import Timings
from shardckpt.failure import rebuild
from shardckpt.feed import Failed, Feed, Filled, News, Source, Staged, Written
from shardckpt.fencing import require_current
from shardckpt.finish import Job
from shardckpt.hostmemory import HostMemory
from shardckpt.protect import give_up
from shardckpt.store import Store

from .carrier import Carrier, make_feed
from .meet import announce, meet, understand
from .messages import Begin, Broken, Done, Gone, Line, Listening, Order, Protected, Report, Setup, Stop

logger = logging.getLogger("shardckpt")

_START_SECONDS = 120.0
_END_SECONDS = 10.0
_Item: TypeAlias = News | Report | Gone


class ProcessCarrier(Carrier):
    """Hands saves over to a process of their own, which is started at once and, when it was killed, again for the next save."""

    is_independent = True

    def __init__(
        self,
        coordinator: Coordinator,
        store: Store,
        memory: HostMemory,
        *,
        timeout: float,
        workers: int,
        parity: int | None = None,
    ) -> None:
        """``memory`` is shared; ``parity`` is the number of ranks that share one, at most."""
        self.memory = memory
        self._store = store
        self._coordinator = coordinator
        self._setup = Setup(
            url=store.url,
            trainer=os.getpid(),
            rank=coordinator.rank,
            world_size=coordinator.world_size,
            hosts=coordinator.hosts,
            timeout=timeout,
            workers=workers,
            parity=parity,
        )
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._on_staged: Callable[[], None] = lambda: None
        self._feed: Feed | None = None
        self._meeting = understand(b"")
        self._is_protecting = False
        self._process = BackgroundProcess(self._setup, self.memory)

    def notice(self) -> bytes:
        if self._setup.rank != 0 or self._setup.world_size == 1:
            return b""
        return announce(self._running().wait_for_port())

    def feed(self, nbytes: int, chunk: int, on_staged: Callable[[], None]) -> Feed:
        # a queue for each save, so that nothing that comes late is taken for news of the next one
        self._items, self._on_staged = queue.SimpleQueue(), on_staged
        self._feed = make_feed(self.memory, nbytes, chunk, self._items.put)
        return self._feed

    def carry(self, job: Job, source: Source, notice: bytes, timings: Timings) -> str:
        assert isinstance(source, Feed)
        if source is not self._feed:
            # one that has failed before it was asked for
            self.feed(0, source.chunk, lambda: None)
        # on rank 0 no other one than that of which the other ranks were told
        process = self._process if notice and self._setup.rank == 0 else self._running()
        self._meeting, self._is_protecting = understand(notice), False
        process.begin(job, source, self._meeting, self._items)
        while True:
            match item := self._items.get():
                case Filled() | Failed():
                    process.send(item)
                case Staged():
                    process.send(item)
                    self._on_staged()
                case Written():
                    source.hear(item)
                case Done(digest, snapshot):
                    timings.merge(snapshot)
                    self._is_protecting = self._setup.parity is not None
                    return digest
                case Broken(failure, snapshot):
                    timings.merge(snapshot)
                    return settle(self._store, job, rebuild(failure))
                case Gone():
                    return self._take_over(job, process.describe_end())

    def protect(self, job: Job, digest: str) -> None:
        while self._is_protecting:
            match self._items.get():
                case Protected():
                    self._is_protecting = False
                case Gone():
                    self._is_protecting = False
                    self._give_up_parity(job, self._died(job, self._process.describe_end()))

    def close(self) -> None:
        self._process.close()
        self._feed = None
        self.memory.close()

    def _running(self) -> BackgroundProcess:
        if not self._process.is_running:
            self._process.close()
            self._process = BackgroundProcess(self._setup, self.memory)
        return self._process

    def _died(self, job: Job, how: str) -> BackgroundDied:
        rank = self._setup.rank
        return BackgroundDied(f"the background process of rank {rank} {how} in the save of step {job.step}", rank=rank)

    def _take_over(self, job: Job, how: str) -> str:
        """Tell the other ranks in place of a process that has died, unless it had committed."""
        setup, error = self._setup, self._died(job, how)

        def fail() -> bytes:
            raise error

        if setup.rank != 0:
            with meet(setup, self._meeting) as stand_in, contextlib.suppress(CheckpointError):
                stand_in.round("save: write", fail)
        digest = settle(self._store, job, error)
        if setup.parity is not None:
            self._give_up_parity(job, error)
        return digest

    def _give_up_parity(self, job: Job, error: BackgroundDied) -> None:
        logger.warning("step %d is saved and durable, but has no parity: %s", job.step, error)
        if self._setup.rank != 0:
            with meet(self._setup, self._meeting) as stand_in:
                give_up(stand_in, job.attempt, error)


def settle(store: Store, job: Job, error: CheckpointError) -> str:
    """The digest of a save that is committed, although ``error`` is all that this rank was told; else raises it.

    A process may die after it has committed and before it has told so: its trainer, or, if it is rank 0's, the others. That of
    rank 0 may also lose the store by which it tells them.
    """
    is_left_open = isinstance(error, BackgroundDied) or (isinstance(error, RankTimeout) and 0 in error.details.get("ranks", ()))
    is_left_open |= isinstance(error, CoordinationError) and error.details.get("outcome") == "unknown"
    digest = find_committed(store, job.prefix, job.attempt) if is_left_open else None
    if digest is None:
        raise error
    if job.fence is not None:
        require_current(store, job.fence, job.step, published=True)
    return digest


class BackgroundProcess:
    """A running background process, and the line to it."""

    def __init__(self, setup: Setup, memory: HostMemory) -> None:
        ours, theirs = multiprocessing.Pipe()
        descriptors = (theirs.fileno(), memory.fd or 0)
        # what the trainer has found there and in that order, the process finds too
        path = os.pathsep.join(filter(None, (*map(str, sys.path), str(Path(__file__).parents[2]))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shardckpt.background", *map(str, descriptors)],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,
            # It never needs a GPU, and must not take memory of one.
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        theirs.close()
        self._line: Line[Report] = Line(ours, Report)
        self._line.send(setup)
        self._items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._port: int | None = None
        self._gone = False
        self._changed = threading.Condition()
        self._listener = threading.Thread(target=self._listen, name="shardckpt-reports", daemon=True)
        self._listener.start()

    @property
    def is_running(self) -> bool:
        """Whether it is there, as far as is known."""
        return not self._gone and self._process.poll() is None

    def _is_there(self) -> bool:
        return self._process.poll() is None

    def send(self, order: Order) -> None:
        """Tell it something."""
        self._line.send(order)

    def begin(self, job: Job, feed: Feed, meeting: tuple[str, int], items: queue.SimpleQueue[_Item]) -> None:
        """Hand over a save; what comes back is put into ``items``."""
        with self._changed:
            self._items, self._port = items, None
            if self._gone:
                items.put(Gone())
        memory = 0 if feed.failure is not None else feed.memory.size
        self._line.send(Begin(job=job, nbytes=feed.nbytes, chunk=feed.chunk, memory=memory, meeting=meeting))
        if feed.failure is not None:
            self._line.send(Failed(feed.failure))

    def wait_for_port(self) -> int:
        """The port where rank 0's process will meet the others for the next save."""
        with self._changed:
            self._changed.wait_for(lambda: self._gone or self._port is not None, _START_SECONDS)
            if self._port is None:
                raise BackgroundDied(f"the background process of rank 0 {self.describe_end()} before it was ready", rank=0)
            return self._port

    def describe_end(self) -> str:
        """How it ended, for a message."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "does not answer"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def close(self) -> None:
        """Let go of it, and wait until it has ended."""
        self._line.send(Stop())
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join()
        self._line.close()

    def _listen(self) -> None:
        while True:
            report = self._line.receive(self._is_there)
            with self._changed:
                if isinstance(report, Listening):
                    self._port = report.port
                else:
                    self._items.put(report)
                self._gone = isinstance(report, Gone)
                self._changed.notify_all()
                if self._gone:
                    return
