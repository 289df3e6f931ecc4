# SPDX-License-Identifier: Apache-2.0
"""Runs test functions on real ranks: a pool of processes with torch.distributed (gloo) that outlives single tests.

::

    def total(factor):                       # at module level: it travels by name
        value = torch.tensor([dist.get_rank() * factor])
        dist.all_reduce(value)
        return value.item()

    def test_total(ranks):
        assert ranks.run(4, total, 10) == [60, 60, 60, 60]

Importing torch takes seconds, so the processes are forked from one server that has imported it, and are used again by the
next case. Every case gets a process group, a store prefix and environment variables (RANK, WORLD_SIZE, ...) of its own. The
store lives in the pytest process, as torchrun's lives in its agent, so that rank 0 may die in a test. A rank that dies, or a
case that hangs, costs new processes, never a wrong next case.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MAX_RANKS = 8
# Forked ranks start with these in memory; anything a test module imports on top is paid once per process.
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.debug",
    "torch.distributed.checkpoint.state_dict",
    "shardckpt.checkpointer",
    "tests.models",
]
_MANY_THREADS, _TOO_MANY_THREADS = 8, 64
_PR_SET_PDEATHSIG = 1
_STACK_DUMP_SECONDS = 1.0


class RankErrors(Exception):
    """At least one rank of a case raised; ``outcomes`` holds each rank's result or exception."""

    def __init__(self, message: str, outcomes: list[Any]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class RankDied(Exception):
    """The process of this rank ended in the middle of a case; ``exitcode`` is negative for a signal."""

    def __init__(self, exitcode: int | None, log: str) -> None:
        super().__init__(f"the rank's process ended with exit code {exitcode}; its last output:\n{log}")
        self.exitcode = exitcode


class CannotRun(Exception):
    """What a rank raises to skip the test, with the reason; pytest's own exception cannot be pickled."""


class RanksHung(Exception):
    """A case did not finish in time; the message holds the stacks of all its processes, which were killed."""


class RemoteTraceback(Exception):
    """The traceback of an exception as text; the cause of an exception that came from a rank."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


@dataclasses.dataclass(frozen=True)
class _Case:
    """What one rank needs to take part in one case."""

    number: int
    rank: int
    world_size: int
    call: bytes
    timeout: float


class RankPool:
    """Up to eight rank processes, started when a case first needs them."""

    def __init__(self) -> None:
        # Both ends of a TCPStore look up the name of ::ffff:127.0.0.1 at each connection; one lost DNS packet costs 5 s.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-", ignore_cleanup_errors=True)
        self._workers: list[_Worker] = []
        self._cases = itertools.count()
        self._store: Any = None

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, fresh: bool = False) -> list[Any]:
        """Call ``fn(*args)`` on ranks 0 to ``world_size - 1`` and return the results by rank.

        ``fn`` is a module-level function; arguments and results are pickled. With ``fresh`` the case gets processes that
        no case has used before, and they end with it. Raises `RankErrors` with every failing rank's traceback, `RanksHung`
        after ``timeout`` seconds.
        """
        outcomes = self.run_expecting_errors(world_size, fn, *args, timeout=timeout, fresh=fresh)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)}
        if failed:
            report = "\n".join(f"--- rank {rank}: {_describe(error)}" for rank, error in failed.items())
            raise RankErrors(f"{len(failed)} of {world_size} ranks failed in {fn.__name__}:\n{report}", outcomes)
        return outcomes

    def run_expecting_errors(
        self, world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, fresh: bool = False
    ) -> list[Any]:
        """As `run`, but the exceptions of ranks stand in the returned list, a `RankDied` for a process that ended.

        The test is skipped when a rank raises `CannotRun`.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size must be 1 to {MAX_RANKS}, got {world_size}")
        call = pickle.dumps((fn, args))
        with self._borrow(world_size, fresh) as workers:
            number = next(self._cases)
            cases = [_Case(number, rank, world_size, call, timeout) for rank in range(world_size)]
            outcomes = _run_case(workers, cases, fn.__name__, timeout)
        for outcome in outcomes:
            if isinstance(outcome, CannotRun):
                pytest.skip(str(outcome))
        return outcomes

    @contextlib.contextmanager
    def _borrow(self, count: int, fresh: bool) -> Iterator[list[_Worker]]:
        pool = [] if fresh else self._workers
        if self._store is None:
            self._store = _connect(0, is_master=True)
        for rank in range(count):
            # each in its place: a process keeps its rank, which torch has in its plans for equal meshes of later cases
            if not (rank < len(pool) and pool[rank].process.is_alive()):
                pool[rank : rank + 1] = [_Worker(Path(self._scratch.name), self._store.port)]
        workers = pool[:count]
        try:
            yield workers
        except BaseException:
            # Nobody knows what these ranks are doing now (a hang, or Ctrl-C in pytest): they must not get another case.
            for worker in workers:
                worker.kill()
            raise
        finally:
            # all or none: torch counts groups, and names them by that
            if fresh or any(worker.threads() > _TOO_MANY_THREADS for worker in workers):
                for worker in pool:
                    worker.kill()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._store = None
        self._scratch.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The parent's end of one rank process."""

    def __init__(self, scratch: Path, port: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, __name__])
        descriptor, log = tempfile.mkstemp(dir=scratch, suffix=".log")
        os.close(descriptor)
        self.log = Path(log)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, port, log, sys.path), daemon=True)
        self.process.start()
        theirs.close()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-20_000:]

    def threads(self) -> int:
        """How many it has by now: those of gloo's groups wake up a hundred times a second, and DeepSpeed keeps its groups."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task"))
        except FileNotFoundError:
            return 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _run_case(workers: list[_Worker], cases: list[_Case], name: str, timeout: float) -> list[Any]:
    for worker, case in zip(workers, cases, strict=True):
        worker.connection.send_bytes(pickle.dumps(case))
    outcomes = _hear(workers, name, timeout)
    left = [worker for worker, outcome in zip(workers, outcomes, strict=True) if not isinstance(outcome, RankDied)]
    for worker in left:
        with contextlib.suppress(ConnectionError):
            worker.connection.send_bytes(b"leave")
    _hear(left, f"the end of {name}", timeout)
    return outcomes


def _hear(workers: list[_Worker], name: str, timeout: float) -> list[Any]:
    """The next word of each."""
    deadline = time.monotonic() + timeout
    heard: list[Any] = [None] * len(workers)
    running: dict[Any, int] = {worker.connection: rank for rank, worker in enumerate(workers)}
    while running:
        ready = multiprocessing.connection.wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksHung(_describe_hang(workers, heard, sorted(running.values()), name, timeout))
        for connection in ready:
            rank = running.pop(connection)
            heard[rank] = _receive(workers[rank])
    return heard


def _receive(worker: _Worker) -> Any:
    try:
        value, trace = pickle.loads(worker.connection.recv_bytes())
    except (EOFError, ConnectionError):
        worker.process.join(5)
        return RankDied(worker.process.exitcode, worker.tail())
    if trace:
        value.__cause__ = RemoteTraceback(trace)
    return value


def _describe_hang(workers: list[_Worker], heard: list[Any], running: list[int], name: str, timeout: float) -> str:
    before = [worker.log.stat().st_size for worker in workers]
    # one after the other: while it writes the stacks, a process does not notice the second one
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            if worker.process.pid is not None and worker.process.is_alive():
                # to its main thread, which another one's signal would not wake
                ctypes.CDLL(None).tgkill(worker.process.pid, worker.process.pid, number)
        time.sleep(_STACK_DUMP_SECONDS)
    parts = [f"{name} did not finish in {timeout} s; still running: ranks {running}"]
    # the others may wait for one that failed
    parts += [f"--- rank {rank}: {_describe(error)}" for rank, error in enumerate(heard) if isinstance(error, BaseException)]
    for rank, worker in enumerate(workers):
        dump = worker.log.read_bytes()[before[rank] :].decode(errors="replace")
        parts.append(f"--- rank {rank}, exit code {worker.process.exitcode}, stacks:\n{dump}")
    return "\n".join(parts)


def _describe(error: BaseException) -> str:
    return f"{error!r}{error.__cause__ or ''}"


def _connect(port: int, *, is_master: bool) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore("127.0.0.1", port, None, is_master, datetime.timedelta(seconds=60), wait_for_workers=False)


# What follows runs in the rank processes.


def meet(place: str) -> None:
    """Return when every rank of the case has called it, whatever becomes of the others by then.

    For cases that kill ranks: a rank whose peer dies just behind a ``dist.barrier()`` may not come out of it. Each ``place`` is
    good for one meeting.
    """
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    deadline = time.monotonic() + 60.0
    store.add(place, 1)
    while store.add(place, 0) < dist.get_world_size():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all ranks came to {place!r}")
        time.sleep(0.002)


def _serve(connection: multiprocessing.connection.Connection, port: int, log: str, path: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    signal.signal(signal.SIGUSR2, _show_error)
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.default_int_handler)

    import torch

    torch.set_num_threads(1)
    store = _connect(port, is_master=False)
    # what is loaded stays, and need not be looked at each time that garbage is collected
    gc.freeze()
    threads = _MANY_THREADS
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            _play(pickle.loads(connection.recv_bytes()), store, connection)
            if _count_threads() > threads:
                # modules of FSDP are in cycles with their groups
                gc.collect()
                threads = max(_MANY_THREADS, _count_threads())
            connection.send_bytes(pickle.dumps((None, None)))


def _show_error(*_: object) -> None:
    """Print what the main thread is about to fail with: while it leaves a ``with``, its stack does not tell."""
    if sys.exc_info()[1] is not None:
        traceback.print_exc()


def _count_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _play(case: _Case, store: Any, connection: multiprocessing.connection.Connection) -> None:
    """Take part in one case, tell the outcome, and leave the group when all ranks have told theirs."""
    before = dict(os.environ)
    rank, size = str(case.rank), str(case.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    try:
        connection.send_bytes(_outcome(case, store))
        # who left now could take away what another rank has not received yet
        connection.recv_bytes()
    finally:
        _leave_group()
        os.environ.clear()
        os.environ.update(before)


def _outcome(case: _Case, store: Any) -> bytes:
    """What the case's function returns on this rank, or raises, pickled."""
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    try:
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=PrefixStore(f"case-{case.number}", store),
            rank=case.rank,
            world_size=case.world_size,
            timeout=datetime.timedelta(seconds=case.timeout),
        )
        # a rank that has nothing to say to the others could be gone while one of them still connects
        meet("begin")
        fn, args = pickle.loads(case.call)
        return pickle.dumps((fn(*args), None))
    except BaseException as error:
        outcome = _pickle_error(error)
    # the others may wait for what this rank is not going to say
    _leave_group()
    return outcome


def _leave_group() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    with contextlib.suppress(ImportError):  # old versions of torch have no such function
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        # a mesh of the next case may equal one of this case, and would be served with the groups of this one
        _clear_sharding_prop_cache()


def _pickle_error(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        data = pickle.dumps((error, trace))
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return data
