# SPDX-License-Identifier: Apache-2.0
"""What travels between ranks, and the calls that carry it: values and errors through a store of torch, within a time limit."""

from __future__ import annotations

import datetime
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeAlias, TypeVar

from .failure import Failure
from .keystore import NotInTime

# TCPStore drops the connection of a client that sends more than 8 MiB in one value.
_CHUNK_BYTES = 4 << 20
_HEAD_BYTES = 4
# 16,384 values of 2 KB take 0.05 s in requests of this size, and 3 s in one request.
_KEYS_AT_ONCE = 256
_MOST_RANKS_NAMED = 16

_T = TypeVar("_T")
_Task: TypeAlias = "tuple[Future[Any], Callable[[Store], Any]] | None"
# torch's annotations of stores say ``str`` where they take bytes.
Store: TypeAlias = Any


class Lost(Exception):
    """A store did not answer."""


class Wire:
    """Calls a store so that no call outlasts its limit.

    Store calls block inside of C++, deaf to signals and, when the server's machine is frozen, to their own timeouts. They
    run on a thread that the caller can leave behind.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._tasks: queue.SimpleQueue[_Task] | None = None
        self._broken: str | None = None
        self.is_used = False
        """Whether there was any call."""

    def call(self, seconds: float, job: Callable[[Store], _T]) -> _T:
        """The result of ``job(store)``; raises `Lost` after ``seconds``, or when the connection breaks."""
        self.is_used = True
        if self._broken is not None:
            raise Lost(self._broken)
        if self._tasks is None:
            self._tasks = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._connect, self._tasks), name="shardckpt-store", daemon=True).start()
        future: Future[_T] = Future()
        self._tasks.put((future, job))
        try:
            return future.result(seconds)
        except FutureTimeout:
            self.close()
            raise Lost(f"no answer within {seconds:g} s") from None
        except RuntimeError as error:
            self._broken = str(error)
            raise Lost(self._broken) from None
        except BaseException:
            # Ctrl-C: the thread may wait for long, so the next call gets a thread and a connection of its own.
            self.close()
            raise

    def close(self) -> None:
        """Let go of the connection; a later call makes a new one."""
        if self._tasks is not None:
            self._tasks.put(None)
            self._tasks = None

    __del__ = close


def _work(connect: Callable[[], Store], tasks: queue.SimpleQueue[_Task]) -> None:
    store = None
    while (task := tasks.get()) is not None:
        future, job = task
        try:
            store = store or connect()
            future.set_result(job(store))
        except BaseException as error:
            future.set_exception(error)
        # What the last call carried must not live on until the next one.
        del task, future, job


def tcp_store(host: str, port: int, timeout: float, *, is_master: bool = False) -> Store:
    """A connection to the store at ``host:port``; ``is_master`` also makes that store here, where port 0 is any free port."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # absent where torch has no distributed

    patience = datetime.timedelta(seconds=timeout)
    return TCPStore(host, port, is_master=is_master, timeout=patience, wait_for_workers=False)


def prefix_store(prefix: str, store: Store) -> Store:
    """The same store, with keys of its own."""
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(prefix, store)


def wait_for(store: Store, keys: Sequence[str], seconds: float) -> bool:
    """Whether all keys were there within ``seconds``."""
    try:
        # A timeout of zero would mean none.
        store.wait(keys, datetime.timedelta(seconds=max(seconds, 0.001)))
    except RuntimeError as error:
        if not _tells_of_time(error):
            raise
        return False
    return True


def _tells_of_time(error: RuntimeError) -> bool:
    # only a process that has loaded torch can have an error of its
    dist = sys.modules.get("torch.distributed")
    return isinstance(error, NotInTime) or (dist is not None and isinstance(error, dist.DistStoreError))


def put(store: Store, key: str, data: bytes) -> list[str]:
    """Store bytes of any length under ``key`` and return all keys that it took; ``key`` itself comes last."""
    chunks = [data[start : start + _CHUNK_BYTES] for start in range(0, len(data), _CHUNK_BYTES)]
    keys = [key] + [f"{key}/{index}" for index in range(1, len(chunks))]
    for name, chunk in zip(keys[1:], chunks[1:], strict=True):
        store.set(name, chunk)
    store.set(key, len(chunks).to_bytes(_HEAD_BYTES, "little") + b"".join(chunks[:1]))
    return keys


def fetch(store: Store, keys: Sequence[str]) -> list[bytes]:
    """What `put` stored under each key; all have to be there."""
    heads = [head for at in range(0, len(keys), _KEYS_AT_ONCE) for head in store.multi_get(keys[at : at + _KEYS_AT_ONCE])]
    values = []
    for key, head in zip(keys, heads, strict=True):
        more = [f"{key}/{index}" for index in range(1, int.from_bytes(head[:_HEAD_BYTES], "little"))]
        values.append(b"".join([head[_HEAD_BYTES:], *(store.multi_get(more) if more else [])]))
    return values


def copy_to_all(store: Store, keys: Sequence[str], data: bytes) -> None:
    """Store the same few bytes under each key."""
    for at in range(0, len(keys), _KEYS_AT_ONCE):
        some = keys[at : at + _KEYS_AT_ONCE]
        store.multi_set(some, [data] * len(some))


def delete_all(store: Store, keys: Sequence[str]) -> None:
    """Delete the keys that are there."""
    for key in keys:
        store.delete_key(key)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """``ranks 1 (node-a), 3 (node-b)``, cut short when they are many; ``hosts`` is by rank."""
    names = [f"{rank} ({hosts[rank]})" if hosts else f"{rank}" for rank in ranks[:_MOST_RANKS_NAMED]]
    more = f" and {len(ranks) - len(names)} more" if len(ranks) > len(names) else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}{more}"


def blame(failure: Failure, rank: int) -> Failure:
    """The same failure, with the rank that it happened on."""
    return Failure(failure.kind, f"rank {rank}: {failure.message}", {**failure.details, "rank": rank})


def first_failure(failures: Mapping[int, Failure]) -> Failure:
    """The failure of the lowest rank, which mentions the others."""
    ranks = sorted(failures)
    failure = blame(failures[ranks[0]], ranks[0])
    if len(ranks) > 1:
        failure.message += f" (failed: {name_ranks(ranks)})"
        failure.details["failed"] = ranks
    return failure
