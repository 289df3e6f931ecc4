# SPDX-License-Identifier: Apache-2.0
"""How ranks agree: rounds through a store of the engine's own, each with a deadline.

In a round every rank posts bytes or its error, rank 0 decides, and every rank returns the decision or raises. Collectives of
the training job are never used, so a background thread can hold rounds while the main thread trains; who is missing is known
by name; and one rank's error is raised on every rank.

Keys of round ``n``: ``n/<rank>`` is what a rank posted, ``n/verdict`` is what rank 0 decided, and ``n/closer`` is the rank that
may write the verdict: rank 0 from the moment that it arrives, or else the first rank that lost its patience with rank 0.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import msgspec

from .errors import CheckpointError, CoordinationError, RankTimeout
from .failure import Failure, describe, note_common, rebuild
from .meeting import (
    GRACE_SECONDS,
    Address,
    check_timeout,
    default_store,
    drop_group,
    late_ranks,
    make_group,
    my_place,
    network_name,
    public_host,
    require_same,
    serve,
    settle,
)
from .wire import Lost, Store, Wire, blame, delete_all, fetch, first_failure, name_ranks, prefix_store, put, tcp_store, wait_for

if TYPE_CHECKING:
    import torch.distributed as dist

_LARGEST_PAUSE_SECONDS = 0.25

_T = TypeVar("_T")


class _Entry(msgspec.Struct, array_like=True):
    """What one rank posts to a round."""

    label: str
    payload: bytes
    failure: Failure | None


class _Verdict(msgspec.Struct, array_like=True):
    """How a round ended, for all ranks."""

    payload: bytes
    failure: Failure | None


class Coordinator:
    """Lets all ranks of the default process group agree; every wait has a deadline.

    Made by `connect` on all ranks. Rounds have to be called in the same order on every rank; any thread may do so, one round at
    a time. Usable as a context manager.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, dial: Callable[[], Store], server: Store = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.hosts: tuple[str, ...] = (socket.gethostname(),) if world_size == 1 else ()
        """Host name of each rank, by rank."""
        self._timeout = timeout
        self._dial = dial
        self._wire = Wire(dial)
        self._server = server
        self._numbers = itertools.count()
        self._spent: list[str] = []
        self._lost: set[int] = set()
        self._group: dist.ProcessGroup | None = None
        self._lock = threading.Lock()
        self._inside: int | None = None
        self._closed = False

    @property
    def num_hosts(self) -> int:
        """The number of different hosts."""
        return len(set(self.hosts))

    @property
    def local_ranks(self) -> int:
        """The number of ranks on this rank's host."""
        return self.hosts.count(self.hosts[self.rank])

    @classmethod
    def connect(cls, *, timeout: float = 600.0) -> Coordinator:
        """Meet all ranks of the default process group; without one, the only rank is this process.

        Collective, but uses only the default group's store, and that only until it returns. ``timeout`` (seconds) is how long a
        rank may keep the others waiting, here and as the default of each round. Raises `RankTimeout` with the ranks that
        did not come.
        """
        check_timeout(timeout)
        rank, world_size = my_place()
        if world_size == 1:
            return cls(0, 1, timeout, default_store)
        with contextlib.closing(Wire(default_store)) as meeting:
            try:
                # Attempts are counted per rank in the store itself, so that a rank that comes late meets the attempt that
                # the others gave up, and fails with it, instead of a later one.
                attempt = meeting.call(timeout, lambda store: store.add(f"shardckpt/coordinator/{rank}", 1))
                key = f"shardckpt/coordinator/address/{attempt}"
                return cls._host(meeting, key, world_size, timeout) if rank == 0 else cls._join(meeting, key, timeout)
            except Lost as lost:
                message = f"rank {rank} cannot use the store of torch.distributed to meet the other ranks: {lost}"
                raise CoordinationError(message, rank=rank) from None

    @classmethod
    def _host(cls, meeting: Wire, key: str, world_size: int, timeout: float) -> Coordinator:
        coordinator = None
        try:
            port = (server := serve(timeout)).port
            settle(meeting, key, Address(network_name(), public_host(), port, None))
            coordinator = cls(0, world_size, timeout, lambda: tcp_store("localhost", port, timeout), server)
            coordinator._introduce(timeout)
        except BaseException as error:
            data = msgspec.msgpack.encode(Address("", "", 0, describe(error)))
            with contextlib.suppress(Lost):
                meeting.call(GRACE_SECONDS, lambda store: store.set(key, data))
            if coordinator is not None:
                coordinator.close()
            raise
        with contextlib.suppress(Lost):
            meeting.call(GRACE_SECONDS, lambda store: store.delete_key(key))
        return coordinator

    @classmethod
    def _join(cls, meeting: Wire, key: str, timeout: float) -> Coordinator:
        deadline = time.monotonic() + timeout
        pause = 0.001
        # Looks now and then instead of waiting in the store, which would keep other threads from using it.
        while not meeting.call(timeout, lambda store: store.check([key])) and time.monotonic() < deadline:
            time.sleep(pause)
            pause = min(pause * 1.5, _LARGEST_PAUSE_SECONDS)
        late = late_ranks("connect", [0], (), timeout)
        address = settle(meeting, key, Address("", "", 0, describe(late)))
        host = "localhost" if address.network == network_name() else address.host
        left = max(deadline - time.monotonic(), GRACE_SECONDS)
        coordinator = cls(*my_place(), timeout, lambda: tcp_store(host, address.port, left))
        try:
            coordinator._introduce(left)
        except BaseException:
            coordinator.close()
            raise
        return coordinator

    def _introduce(self, timeout: float) -> None:
        def count(names: list[bytes]) -> bytes:
            # Ranks of one host are neighbours, so this keeps the verdict, which goes to all ranks, short.
            return msgspec.msgpack.encode([(name, sum(1 for _ in same)) for name, same in itertools.groupby(names)])

        packed = self.round("connect", socket.gethostname().encode, count, timeout=timeout)
        runs = msgspec.msgpack.decode(packed, type=list[tuple[bytes, int]])
        self.hosts = tuple(name.decode() for name, length in runs for _ in range(length))

    def round(
        self,
        label: str,
        produce: Callable[[], bytes] = bytes,
        decide: Callable[[list[bytes]], bytes] = lambda payloads: b"",
        *,
        timeout: float | None = None,
        name: str | None = None,
    ) -> bytes:
        """Run ``produce`` on every rank, ``decide`` on rank 0 with all its results by rank, and return its result everywhere.

        Collective. If ``produce`` raises on some ranks, each of these raises its own exception, and all other ranks raise the
        lowest one's: of the same type if it is a `CheckpointError`, else `RankFailed`; with ``rank``, and ``failed`` if several
        did. If ``decide`` raises, every rank does. ``timeout`` (seconds, default: that of `connect`) counts from the
        moment that a rank has its own result; ranks that are not there by then are named by the `RankTimeout` that every rank
        raises. `CoordinationError` tells that ranks are in rounds of different labels.

        A round with a ``name``, which no other one has, does not count: ranks that leave it out are not out of step.
        """
        seconds = self._timeout if timeout is None else check_timeout(timeout)
        with self._turn(label):
            if self.world_size == 1:
                return decide([produce()])
            number = name or str(next(self._numbers))
            try:
                payload = produce()
            except Exception as error:
                try:
                    self._take_part(number, _Entry(label, b"", describe(error)), decide, seconds)
                except CheckpointError as told:
                    note_common(error, told)
                raise
            except BaseException as error:
                with contextlib.suppress(CheckpointError):
                    self._leave(number, _Entry(label, b"", describe(error)))
                raise
            return self._take_part(number, _Entry(label, payload, None), decide, seconds)

    def broadcast(self, label: str, produce: Callable[[], bytes], *, timeout: float | None = None) -> bytes:
        """Run ``produce`` on rank 0 and return its result on every rank. Collective; errors as for `round`."""
        return self.round(label, produce if self.rank == 0 else bytes, lambda payloads: payloads[0], timeout=timeout)

    def channel(self, name: str) -> Coordinator:
        """Another coordinator of the same ranks, whose rounds are independent of these: for another thread.

        Not collective, but every rank has to make the channels that it wants to use. Has to be closed before this one, whose
        store it shares, through a connection of its own.
        """
        channel = Coordinator(self.rank, self.world_size, self._timeout, lambda: self.connection(name))
        channel.hosts = self.hosts
        return channel

    def greet(self) -> None:
        """Connect to rank 0 now, and not when the first round is half over: so its end is noticed in that round at once.

        Raises `RankTimeout` when it is not there.
        """
        if self.world_size > 1:
            self.call(self._timeout + GRACE_SECONDS, lambda store: None)

    def connection(self, name: str) -> Store:
        """A connection to the store that all ranks share, with keys under ``name``: for a thread that may block in it.

        Must be dropped before this coordinator is closed. Raises torch's `RuntimeError` when rank 0 cannot be reached.
        """
        return prefix_store(name, self._dial())

    def exchange_group(self) -> dist.ProcessGroup | None:
        """A gloo group of all ranks for bulk data in CPU memory, made at first need; None when there is only one rank.

        The first call is collective and, like any ``new_group`` of torch, must not run beside another one. `close` destroys it.
        """
        if self.world_size > 1 and self._group is None:
            self.round("exchange group")
            try:
                self._group = make_group(self._timeout)
            except RuntimeError as error:
                raise CoordinationError(f"rank {self.rank} cannot join a gloo group of all ranks: {error}") from error
        return self._group

    def close(self) -> None:
        """Leave. Waits for a round that is under way; rank 0 then waits up to 5 s for the others, who may still be reading."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._group is not None:
                drop_group(self._group)
                self._group = None
            if self._wire.is_used:  # who never came has nobody to take leave of, and rank 0 may be gone
                with contextlib.suppress(Lost):
                    self._wire.call(2 * GRACE_SECONDS, self._say_farewell)
                self._wire.close()
                self._server = None

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _turn(self, label: str) -> Iterator[None]:
        if self._inside == threading.get_ident():
            raise CoordinationError(f"{label!r} cannot be agreed inside of another round; call it before or after", label=label)
        with self._lock:
            if self._closed:
                raise CoordinationError(f"{label!r} cannot be agreed: the coordinator is closed", label=label)
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._inside = None

    def call(self, seconds: float, job: Callable[[Store], _T]) -> _T:
        """``job(store)`` on the store that the ranks share, within ``seconds``; raises `RankTimeout` when rank 0 is gone."""
        try:
            return self._wire.call(seconds, job)
        except Lost as lost:
            if self.rank == 0:
                raise CoordinationError(f"rank 0 cannot use the store that it hosts: {lost}", rank=0) from None
            message = f"{name_ranks([0], self.hosts)} is gone or hangs; rank {self.rank} lost its connection to it: {lost}"
            raise RankTimeout(message, ranks=[0]) from None

    def _claim(self, number: str) -> bool:
        """Whether it is up to this rank to say how the round ends."""
        closer = self.call(GRACE_SECONDS, lambda store: store.compare_set(f"{number}/closer", "", str(self.rank)))
        return int(closer) == self.rank

    def _publish(self, number: str, verdict: _Verdict) -> None:
        data = msgspec.msgpack.encode(verdict)
        keys = self.call(self._timeout + GRACE_SECONDS, lambda store: put(store, f"{number}/verdict", data))
        if self.rank == 0:
            self._spent += [f"{number}/closer", *keys]

    def _leave(self, number: str, entry: _Entry) -> None:
        """Post why this process is being stopped, for the others' sake, and wait for nobody."""
        if self.rank != 0:
            data = msgspec.msgpack.encode(entry)
            self.call(GRACE_SECONDS, lambda store: put(store, f"{number}/{self.rank}", data))
        elif entry.failure is not None and self._claim(number):
            self._publish(number, _Verdict(b"", blame(entry.failure, 0)))

    def _take_part(self, number: str, entry: _Entry, decide: Callable[[list[bytes]], bytes], seconds: float) -> bytes:
        return self._lead(number, entry, decide, seconds) if self.rank == 0 else self._follow(number, entry, seconds)

    def _lead(self, number: str, entry: _Entry, decide: Callable[[list[bytes]], bytes], seconds: float) -> bytes:
        if not self._claim(number):
            return self._obey(number, entry.label, seconds)
        try:
            payload = decide(self._collect(number, entry, seconds))
        except BaseException as error:
            failure = describe(error)
            with contextlib.suppress(CoordinationError):
                # An error of the tree is about all ranks here, whatever else happened to rank 0 is its own.
                self._publish(number, _Verdict(b"", failure if isinstance(error, CheckpointError) else blame(failure, 0)))
            raise
        try:
            self._publish(number, _Verdict(payload, None))
        except CoordinationError as error:
            error.add("What it has decided is done, and the others do not know", outcome="unknown")
            raise
        return payload

    def _collect(self, number: str, own: _Entry, seconds: float) -> list[bytes]:
        """The payloads of all ranks; raises what there is to tell when one is late, failed, or in another round."""
        keys = {rank: f"{number}/{rank}" for rank in range(1, self.world_size)}

        def wait(store: Store) -> dict[int, bytes]:
            complete = wait_for(store, list(keys.values()), seconds)
            there = {rank: key for rank, key in keys.items() if complete or store.check([key])}
            return dict(zip(there, fetch(store, list(there.values())), strict=True)) if there else {}

        posted = self.call(seconds + GRACE_SECONDS, wait)
        entries = {0: own} | {rank: msgspec.msgpack.decode(data, type=_Entry) for rank, data in posted.items()}
        failures = {rank: entry.failure for rank, entry in entries.items() if entry.failure is not None}
        self._lost = set(keys) - set(posted)
        if self._lost:
            raise late_ranks(own.label, sorted(self._lost), self.hosts, seconds, failures)
        # Whoever posted to this round has read the verdict of the last one.
        spent, self._spent = self._spent, []
        self.call(seconds + GRACE_SECONDS, lambda store: delete_all(store, spent))
        require_same({rank: entry.label for rank, entry in entries.items()})
        if failures:
            raise rebuild(first_failure(failures))
        return [entries[rank].payload for rank in range(self.world_size)]

    def _follow(self, number: str, entry: _Entry, seconds: float) -> bytes:
        data = msgspec.msgpack.encode(entry)
        spent, self._spent = self._spent, []
        deadline = time.monotonic() + seconds

        def post(store: Store) -> tuple[list[str], bool]:
            keys = put(store, f"{number}/{self.rank}", data)
            delete_all(store, spent)
            return keys, wait_for(store, [f"{number}/verdict"], deadline - time.monotonic())

        keys, decided = self.call(seconds + GRACE_SECONDS, post)
        if decided:
            self._spent = keys
        elif self._claim(number):
            late = late_ranks(entry.label, [0], self.hosts, seconds)
            self._publish(number, _Verdict(b"", describe(late)))
            raise late
        # Without a verdict by now, rank 0 came after this rank and still gives the others their time.
        return self._obey(number, entry.label, seconds)

    def _obey(self, number: str, label: str, seconds: float) -> bytes:
        def take(store: Store) -> bytes | None:
            key = f"{number}/verdict"
            return fetch(store, [key])[0] if wait_for(store, [key], seconds) else None

        data = self.call(seconds + GRACE_SECONDS, take)
        if data is None:
            message = (
                f"{label!r}: {name_ranks([0], self.hosts)} came, but decided nothing within {seconds:g} s; it may still do so"
            )
            raise RankTimeout(message, ranks=[0], label=label, seconds=seconds)
        verdict = msgspec.msgpack.decode(data, type=_Verdict)
        if verdict.failure is not None:
            raise rebuild(verdict.failure)
        return verdict.payload

    def _say_farewell(self, store: Store) -> None:
        if self.rank != 0:
            store.set(f"farewell/{self.rank}", b"")
            return
        others = [f"farewell/{rank}" for rank in range(1, self.world_size) if rank not in self._lost]
        if others:
            wait_for(store, others, GRACE_SECONDS)
