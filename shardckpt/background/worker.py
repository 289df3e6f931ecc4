# SPDX-License-Identifier: Apache-2.0
"""The background process: writes and commits what its trainer has staged in shared memory, and outlives the trainer for that.

It has a session of its own, because launchers kill whole process groups, and a low priority. It ends when its trainer lets go
of it and the save that is under way is over; a state that was not wholly staged by then is given up, on all ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from multiprocessing.connection import Connection

from shardckpt.buffer import Buffer
from shardckpt.errors import BackgroundDied, CheckpointError
from shardckpt.events import Timings
from shardckpt.failure import describe
from shardckpt.feed import Failed, Feed, Filled, Staged
from shardckpt.finish import finish_save
from shardckpt.keystore import KeyServer
from shardckpt.protect import Committed, protect
from shardckpt.store import Store, open_store

from .meet import meet
from .messages import Begin, Broken, Done, Gone, Line, Listening, Order, Protected, Setup, Stop

_NICENESS = 10
"""Added to the trainer's; on Linux the priority of input and output follows."""


class Worker:
    """Carries out one save after the other."""

    def __init__(self, line: Line[Order], memory_fd: int, setup: Setup, store: Store) -> None:
        self._line = line
        self._memory_fd = memory_fd
        self._setup = setup
        self._store = store
        self._memory: Buffer | None = None
        self._feed: Feed | None = None
        self._thread: threading.Thread | None = None
        self._server: KeyServer | None = None

    def run(self) -> None:
        """Follow the trainer's orders until it lets go."""
        self._listen()
        while not isinstance(order := self._line.receive(self._has_trainer), Stop | Gone):
            if isinstance(order, Begin):
                self._join()
                self._begin(order)
            elif self._feed is not None and isinstance(order, Filled | Staged | Failed):
                self._feed.hear(order)
        if self._feed is not None:
            message = f"the trainer of rank {self._setup.rank} ended before it had staged its state"
            self._feed.hear(Failed(describe(BackgroundDied(message, rank=self._setup.rank))))
        self._join()

    def _has_trainer(self) -> bool:
        return os.getppid() == self._setup.trainer

    def _listen(self) -> None:
        """Make the store where all ranks will meet for the next save, on rank 0."""
        if self._setup.rank == 0 and self._setup.world_size > 1:
            self._server = KeyServer()
            self._line.send(Listening(self._server.port))

    def _begin(self, begin: Begin) -> None:
        self._feed = Feed(self._map(begin), begin.nbytes, begin.chunk, self._line.send)
        server, self._server = self._server, None
        self._thread = threading.Thread(target=self._finish, args=(begin, self._feed, server), name="shardckpt-save")
        self._thread.start()
        self._listen()

    def _map(self, begin: Begin) -> Buffer:
        if not begin.memory:
            return Buffer(begin.chunk)
        if self._memory is None or self._memory.size != begin.memory:
            self._memory = Buffer(begin.memory, self._memory_fd)
        return self._memory

    def _finish(self, begin: Begin, feed: Feed, server: KeyServer | None) -> None:
        setup, timings = self._setup, Timings()
        with contextlib.closing(server) if server else contextlib.nullcontext(), meet(setup, begin.meeting) as coordinator:
            try:
                coordinator.greet()
                digest = finish_save(begin.job, feed, self._store, coordinator, workers=setup.workers, timings=timings)
                self._line.send(Done(digest, timings.snapshot()))
                if setup.parity is not None:
                    committed = Committed(begin.job.prefix, begin.job.attempt, digest)
                    source = None if feed.is_ring else feed
                    protect(coordinator, self._store, committed, setup.parity, workers=setup.workers, source=source)
                    self._line.send(Protected())
            except BaseException as error:
                self._line.send(Broken(describe(error), timings.snapshot()))
                if not isinstance(error, CheckpointError):
                    raise

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def main(connection_fd: int, memory_fd: int) -> None:
    """Run the process whose line to the trainer and whose shared memory have these descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # meant for the trainer, which decides what is to be saved before the end
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    line: Line[Order] = Line(Connection(connection_fd), Order)
    setup = line.receive()
    if isinstance(setup, Setup):
        logging.basicConfig(format=f"%(asctime)s shardckpt, background of rank {setup.rank}: %(message)s")
        Worker(line, memory_fd, setup, open_store(setup.url)).run()
