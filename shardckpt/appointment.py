# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on when to do something together, while they train and without a word in any step before.

Every rank counts its calls of `Appointment.arrive`, one per training step, in step with the others. Any rank may ask for an
appointment at any moment. Then rank 0 asks all, a thread of each answers with the number of calls made so far, and from there
on the next call waits for the verdict: the first call that no rank has made yet. Nobody waits for training, so that takes
milliseconds, wherever each rank is in its step.

Threads sleep in the store, each on a key that it can be woken by: rank 0 on ``bell``, rung when ``wanted`` is set, when
all answers are there, and when a rank leaves (``closed``); the others on the next message of rank 0, ``inbox/<rank>/<number>``,
which are a question and a verdict in turns. Question ``n`` has ``answer/<n>/<rank>``, and their count in ``answers/<n>``.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from .coordinate import Coordinator
from .diary import LABEL, Answer, Diary, Reason, Verdict, decide
from .errors import CheckpointerClosed, CoordinationError, RankTimeout
from .failure import Failure, describe
from .meeting import GRACE_SECONDS, late_ranks
from .wire import Store, copy_to_all, fetch, name_ranks, put, wait_for

logger = logging.getLogger("shardckpt")

SIGNAL_SECONDS = 10.0
"""How long a rank may take to answer when one that is to stop asks. Launchers kill that after 30 s, as torchrun does."""
# Torch prints a warning when a wait ends without what it waited for.
_SLEEP_SECONDS = 7 * 86400.0
_encode = msgspec.msgpack.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The ranks that make appointments, seen from one of them."""

    rank: int = 0
    """This rank."""
    world_size: int = 1
    """How many there are."""
    hosts: Sequence[str] = ()
    """Host name of each rank, by rank."""
    dial: Callable[[], Store] = lambda: None
    """Makes a connection to the store that they share; a single rank needs none."""
    timeout: float = 600.0
    """Seconds that a rank may take to answer."""

    @classmethod
    def of(cls, coordinator: Coordinator, timeout: float) -> Peers:
        """The ranks that ``coordinator`` has brought together; its store outlives the appointments."""
        return cls(
            rank=coordinator.rank,
            world_size=coordinator.world_size,
            hosts=coordinator.hosts,
            dial=lambda: coordinator.connection("appointments"),
            timeout=timeout,
        )


class Appointment:
    """Lets any rank ask for something to be done on all ranks in the same call of `arrive`.

    Every rank makes one, and calls `arrive` as often as the others. Costs two threads and two connections per rank, all asleep
    until somebody asks; a single rank needs neither.
    """

    def __init__(self, peers: Peers, lost: Callable[[Failure], None] = lambda _: None) -> None:
        """``lost`` is told, in a thread, when no appointment can be made because ranks do not answer."""
        self._peers = peers
        self._lost = lost
        self._diary = Diary()
        # The one way to hand something over that a signal handler may take at any moment.
        self._requests: queue.SimpleQueue[Reason | None] = queue.SimpleQueue()
        self._inbox = "bell"
        self._closing = False
        self._threads: list[threading.Thread] = []
        if peers.world_size > 1:
            jobs = {
                "shardckpt-appointment": self._lead if peers.rank == 0 else self._follow,
                "shardckpt-request": self._pass_on,
            }
            self._threads = [threading.Thread(target=job, name=name, daemon=True) for name, job in jobs.items()]
            for thread in self._threads:
                thread.start()
            # A thread that wakes in C++ while the interpreter goes down would abort the process.
            atexit.register(self.close)

    def request(self, what: str, signum: int = 0) -> None:
        """Ask for an appointment; it stands until one is kept. From any thread, or a signal handler; returns at once."""
        self._requests.put(Reason(what, signum, self._peers.rank))

    def arrive(self) -> list[Reason]:
        """Count one call; returns the reasons if all ranks agreed on this one, else nothing.

        Every rank has to call it in step with the others. Waits only while an agreement is under way. Raises `RankTimeout`
        with the ranks that did not answer, on every rank; what was asked for is then asked for again.
        """
        if not self._threads:
            self._agree_alone()
        try:
            return self._diary.arrive(self._peers.timeout + GRACE_SECONDS)
        except CoordinationError:
            for reason in self._diary.take_back():
                self._requests.put(reason)
            raise

    def close(self) -> None:
        """Take no part any more; a call that waits raises `CheckpointerClosed`. Not collective, a second call does nothing."""
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        self._diary.give_up(describe(CheckpointerClosed(f"{LABEL!r}: the Checkpointer was closed")))
        self._requests.put(None)
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def _agree_alone(self) -> None:
        with contextlib.suppress(queue.Empty):
            while (reason := self._requests.get_nowait()) is not None:
                self._diary.want(reason)
        self._diary.settle(decide([self._diary.answer()]))

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Have the next call raise what ends a thread."""
        try:
            yield
        except RuntimeError as error:
            failure = CoordinationError(f"rank 0 cannot use the store that it hosts: {error}", rank=0)
            if self._peers.rank != 0:
                gone = f"{name_ranks([0], self._peers.hosts)} is gone; rank {self._peers.rank} lost its connection to it"
                failure = RankTimeout(f"{gone}: {error}", ranks=[0])
            self._diary.give_up(describe(failure))
            self._tell(describe(failure))

    def _tell(self, failure: Failure | None) -> None:
        if failure is not None and failure.kind == RankTimeout.__name__ and not self._closing:
            self._lost(failure)

    # --- the thread that asks

    def _pass_on(self) -> None:
        with self._reporting():
            store = self._peers.dial()
            while (reason := self._requests.get()) is not None:
                logger.info("%s: asking all ranks for a step to save", reason)
                self._diary.want(reason)
                self._ring(store, "wanted")
            self._ring(store, "closed")
            store.set(self._inbox, b"")

    def _ring(self, store: Store, why: str) -> None:
        store.set(why, str(self._peers.rank))
        store.set("bell", b"")

    # --- the thread that answers, on rank 0

    def _lead(self) -> None:
        with self._reporting():
            store = self._peers.dial()
            number = 0
            while not self._closing:
                # A wish that comes from here on either sets the key again, or is in an answer.
                if store.delete_key("wanted"):
                    self._hold(store, number)
                    number += 1
                else:
                    _sleep(store, "bell")
                    store.delete_key("bell")

    def _hold(self, store: Store, number: int) -> None:
        others = range(1, self._peers.world_size)
        answer = self._diary.answer()
        copy_to_all(store, [_inbox(rank, 2 * number) for rank in others], _encode(None))
        try:
            verdict = decide([answer, *self._collect(store, number, self._patience(answer))])
        except CoordinationError as error:
            verdict = Verdict(0, [], describe(error))
        copy_to_all(store, [_inbox(rank, 2 * number + 1) for rank in others], _encode(verdict))
        self._diary.settle(verdict)
        self._tell(verdict.failure)

    def _patience(self, answer: Answer) -> float:
        is_to_stop = any(reason.signum for reason in answer.reasons)
        return min(SIGNAL_SECONDS, self._peers.timeout) if is_to_stop else self._peers.timeout

    def _collect(self, store: Store, number: int, seconds: float) -> list[Answer]:
        """The answers of all others; raises `RankTimeout` when one does not come, `CoordinationError` when a rank has left."""
        count, keys = f"answers/{number}", [f"answer/{number}/{rank}" for rank in range(1, self._peers.world_size)]
        deadline = time.monotonic() + seconds
        while store.add(count, 0) < len(keys):
            if store.check(["closed"]):
                left = name_ranks([int(store.get("closed"))], self._peers.hosts)
                raise CoordinationError(f"{LABEL!r}: {left} has closed its Checkpointer")
            if not wait_for(store, ["bell"], deadline - time.monotonic()):
                late = [rank for rank, key in enumerate(keys, 1) if not store.check([key])]
                raise late_ranks(LABEL, late, self._peers.hosts, seconds)
            store.delete_key("bell")
        store.delete_key(count)
        return [msgspec.msgpack.decode(data, type=Answer) for data in fetch(store, keys)]

    # --- the thread that answers, on other ranks

    def _follow(self) -> None:
        with self._reporting():
            store = self._peers.dial()
            for number in itertools.count():
                self._inbox = _inbox(self._peers.rank, number)
                # Who closes sets the flag before it looks which message to overwrite.
                if self._closing:
                    return
                _sleep(store, self._inbox)
                message = store.get(self._inbox)
                if not message:
                    return
                store.delete_key(self._inbox)
                self._read(store, number // 2, msgspec.msgpack.decode(message, type=Verdict | None))

    def _read(self, store: Store, number: int, verdict: Verdict | None) -> None:
        key = f"answer/{number}/{self._peers.rank}"
        if verdict is not None:
            self._diary.settle(verdict)
            store.delete_key(key)
            self._tell(verdict.failure)
            return
        put(store, key, _encode(self._diary.answer()))
        if store.add(f"answers/{number}", 1) == self._peers.world_size - 1:
            store.set("bell", b"")


def _inbox(rank: int, number: int) -> str:
    return f"inbox/{rank}/{number}"


def _sleep(store: Store, key: str) -> None:
    """Return when the key is there."""
    while not wait_for(store, [key], _SLEEP_SECONDS):
        pass
