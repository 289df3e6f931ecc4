# SPDX-License-Identifier: Apache-2.0
"""Starts rank processes with torch.distributed (gloo), runs one function on all of them, and collects what they return.

Importing torch takes seconds, so ranks are forked from one server process that has imported it. They end when the function
does, when one of them fails, or when this process dies.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import CheckpointError

T = TypeVar("T")
R = TypeVar("R")

logger = logging.getLogger("shardckpt")
_PRELOAD = [
    *("torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint.state_dict"),
    "shardckpt.bench.contest",
]
_RENDEZVOUS_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


class BenchmarkFailed(CheckpointError):
    """A contestant raised, died, or did not give back what was saved."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a benchmark has come."""

    done: int
    """Steps that are done."""
    total: int
    """Steps in all."""
    doing: str
    """What is being done now."""


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class _Seat:
    """What one rank process needs to know to take part."""

    rank: int
    world_size: int
    port: int
    backend: str


def run_ranks(
    world_size: int,
    work: Callable[[OnProgress, T], R],
    argument: T,
    on_progress: OnProgress,
    *,
    backend: str = "gloo",
) -> list[R]:
    """Call ``work(report, argument)`` on ranks 0 to ``world_size - 1`` of a new process group; returns the results by rank.

    ``work`` is a module-level function. What rank 0 reports goes to ``on_progress``. Raises `BenchmarkFailed` with
    the error of the first rank that failed, whose traceback has been logged.
    """
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, None, True, datetime.timedelta(seconds=_RENDEZVOUS_SECONDS), wait_for_workers=False
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    processes: list[BaseProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            seat = _Seat(rank, world_size, store.port, backend)
            # no daemon: those may not have processes of their own, which some contestants start
            process: BaseProcess = context.Process(target=_serve, args=(theirs, seat, work, argument))
            with _ranks_environment(world_size):
                process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        return _collect(processes, connections, on_progress)
    finally:
        for started in processes:
            started.kill()
            started.join()
        for connection in connections:
            connection.close()


@contextmanager
def _ranks_environment(world_size: int) -> Iterator[None]:
    """What libraries look at when the fork server loads them: threads as torchrun would give them to a rank."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(world_size)))
    # a TCPStore looks up the name of its peer's address; a lost packet would cost 5 s
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _threads(world_size: int) -> int:
    return max(1, (os.cpu_count() or 1) // world_size)


def _collect(processes: list[BaseProcess], connections: list[Connection], on_progress: OnProgress) -> list[Any]:
    results: dict[int, Any] = {}
    running = {id(connection): rank for rank, connection in enumerate(connections)}
    while running:
        for ready in wait([connections[rank] for rank in running.values()]):
            rank = running[id(ready)]
            try:
                kind, value = connections[rank].recv()
            except (EOFError, ConnectionError):
                processes[rank].join(5)
                kind, value = "failed", f"its process ended with exit code {processes[rank].exitcode}"
            if kind == "progress":
                on_progress(value)
            elif kind == "failed":
                raise BenchmarkFailed(f"rank {rank} of {len(processes)} failed: {value}", rank=rank)
            else:
                results[rank] = value
                del running[id(ready)]
    return [results[rank] for rank in range(len(processes))]


def _serve(connection: Connection, seat: _Seat, work: Callable[[OnProgress, Any], Any], argument: Any) -> None:
    """The life of a rank process."""
    if os.name == "posix" and os.uname().sysname == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole terminal; the process that started the ranks ends them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(_threads(seat.world_size))
    rank, size, port = str(seat.rank), str(seat.world_size), str(seat.port)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True")

    def report(progress: Progress) -> None:
        if seat.rank == 0:
            connection.send(("progress", progress))

    try:
        dist.init_process_group(seat.backend, rank=seat.rank, world_size=seat.world_size)
        outcome = ("done", work(report, argument))
        dist.destroy_process_group()
    except BaseException as error:
        logger.error("rank %d failed:\n%s", seat.rank, traceback.format_exc())
        outcome = ("failed", f"{type(error).__name__}: {error}")
    connection.send(outcome)
