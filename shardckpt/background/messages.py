# SPDX-License-Identifier: Apache-2.0
"""What a trainer and its background process tell each other: msgpack, one message after the other, over a pair of sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Generic, TypeAlias, TypeVar

import msgspec

from shardckpt.events import Phase
from shardckpt.failure import Failure
from shardckpt.feed import Failed, Filled, Staged, Written
from shardckpt.finish import Job

_LOOK_SECONDS = 2.0
"""How often to look whether the other end is still there."""

Snapshot: TypeAlias = dict[Phase, tuple[float, int]]


class Setup(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message to a background process."""

    url: str
    """Of the store."""
    trainer: int
    """Its process id."""
    rank: int
    world_size: int
    hosts: tuple[str, ...]
    """By rank."""
    timeout: float
    """Seconds, as in `Options`."""
    workers: int
    """Threads that hash and write."""
    parity: int | None = None
    """How many ranks share a parity at most; none is written without."""


class Listening(msgspec.Struct, frozen=True, tag=True):
    """Rank 0's process has a store for the next save, where the processes of all ranks meet."""

    port: int


class Begin(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A save; news of how far it is staged follows."""

    job: Job
    nbytes: int
    """Of the data region."""
    chunk: int
    """Bytes."""
    memory: int
    """Bytes of shared memory; none when the feed had failed before there was any."""
    meeting: tuple[str, int]
    """Host and port of the store where the processes meet for this save."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End when nothing is left to do."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The save is durable."""

    digest: str
    timings: Snapshot


class Protected(msgspec.Struct, frozen=True, tag=True):
    """The parity of a durable save is there, or was given up. Comes after `Done` when there is to be one."""


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The save has failed on all ranks."""

    error: Failure
    timings: Snapshot


class Gone(msgspec.Struct, frozen=True, tag=True):
    """The other end is closed. Never sent."""


Order: TypeAlias = Setup | Begin | Filled | Staged | Failed | Stop
Report: TypeAlias = Listening | Written | Done | Protected | Broken
_Heard = TypeVar("_Heard", Order, Report)


class Line(Generic[_Heard]):
    """One end of a pair of sockets. Any thread may send, one may listen."""

    def __init__(self, connection: Connection, kind: object) -> None:
        """``kind`` is what is heard here: `Order` or `Report`."""
        self._connection = connection
        self._decoder: msgspec.msgpack.Decoder[_Heard] = msgspec.msgpack.Decoder(kind)
        self._lock = threading.Lock()

    def send(self, message: Order | Report) -> None:
        """Send a message. When the other end is gone, it is lost: `receive` tells."""
        data = msgspec.msgpack.encode(message)
        with self._lock, suppress(OSError):
            self._connection.send_bytes(data)

    def receive(self, is_there: Callable[[], bool] = lambda: True) -> _Heard | Gone:
        """The next message; `Gone` when there is none, and ``is_there`` says that the other end has nobody to send one.

        A process that the other end has forked may hold its socket open for longer than it lives itself.
        """
        try:
            while not self._connection.poll(_LOOK_SECONDS):
                if not is_there():
                    return Gone()
            data = self._connection.recv_bytes()
        except (EOFError, OSError):
            return Gone()
        return self._decoder.decode(data)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()
