# SPDX-License-Identifier: Apache-2.0
"""Training that is disturbed by saves, on one rank: contestants take turns, and what they saved is checked after each turn.

A turn is: steps without any checkpoints, which are what the turn is compared with; one save without training, which tells of
memory only, because processes are started and memory is touched for the first time; then cycles of one save, a number of steps,
and as many more as it takes until the save is durable on all ranks. At the end each checkpoint is loaded, and compared bit for
bit with what the state was when its save was called. Garbage is collected and the file system is at rest before each save.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist

from .async_contestants import NOBODY, Entrant, Flight, Saver
from .async_entrants import choose
from .copying import plain_copies
from .disk import empty
from .launch import OnProgress, Progress
from .memory import MemoryWatch, give_back_free_memory, memory_now
from .shapes import GPTShape
from .training import Training

_NAMED = 4
"""Tensors that are named when more are wrong."""
_COPIES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncJob:
    """What a group of ranks has to do."""

    folder: str
    """Where contestants have their folders, which are emptied after each turn."""
    nbytes: int
    """Size of the state of all ranks together."""
    rounds: int
    """Turns of each contestant."""
    saves: int
    """Saves of a turn that count."""
    steps: int
    """Training steps for each save, at least; twice as many before the first one."""
    samples: int
    """Rows of tokens per rank and step."""
    contestants: Sequence[str]
    """Patterns of their names; none for all."""
    device: str
    """``cpu`` or ``cuda``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """One save, and training meanwhile. Times are in seconds, of the slowest rank."""

    stall: float
    """How long training was held: by the call, before the optimizer's step, and in hooks."""
    call: float
    """The part of it that is the call."""
    durable: float
    """From the call until the checkpoint was durable."""
    steps: tuple[float, ...]
    """Duration of each step; the first one includes the call."""


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn of one contestant. Times are in seconds, of the slowest rank."""

    contestant: str
    """Name."""
    alone: tuple[float, ...]
    """Duration of each step before the contestant came."""
    cycles: list[Cycle] = field(default_factory=list)
    """The saves, of which the first one does not count."""
    memory: int = 0
    """Most bytes that a rank and its child processes held in the first save and after the last one, beyond those before."""
    checked: int = 0
    """Checkpoints that were loaded and compared."""
    wrong: list[str] = field(default_factory=list)
    """What was not as it had been at the call."""
    problem: str = ""
    """Why it could not end its turn."""


@dataclass(slots=True, kw_only=True)
class AsyncOutcome:
    """What a group of ranks has to say of a job."""

    nbytes: int
    """Bytes of the state on all ranks together."""
    shard: int
    """Bytes on the rank that has most."""
    num_tensors: int
    """Tensors on each rank."""
    copies: dict[str, list[float]] = field(default_factory=dict)
    """By what made them: seconds of plain copies of the state, by all ranks at once."""
    turns: list[Turn] = field(default_factory=list)
    """All turns, in order."""


def async_rounds(report: OnProgress, job: AsyncJob) -> AsyncOutcome:
    """Train, and let the contestants save meanwhile."""
    return AsyncContest(report, job, choose(job.contestants, cuda=job.device == "cuda")).run()


class AsyncContest:
    """One job on one rank; all methods are collective."""

    def __init__(self, report: OnProgress, job: AsyncJob, entrants: Sequence[Entrant]) -> None:
        self._report = report
        self._job = job
        self._entrants = entrants
        self._done, self._steps = -1, 1 + (len(entrants) + 1) * job.rounds
        self._step("building the model")
        self._training = Training(GPTShape.of_size(job.nbytes), job.samples, job.device)

    def run(self) -> AsyncOutcome:
        """Let everybody have their turns."""
        mine, tensors = self._training.nbytes, len(self._training.digests())
        outcome = AsyncOutcome(nbytes=_sum(mine), shard=int(_slowest([mine])[0]), num_tensors=tensors)
        for number in range(1, self._job.rounds + 1):
            self._step(f"round {number}: plain copies")
            self._copy(mine, outcome)
            for entrant in self._entrants:
                self._step(f"round {number}: {entrant.name}")
                outcome.turns.append(self._take_turn(entrant))
        self._step("done")
        return outcome

    def _copy(self, nbytes: int, outcome: AsyncOutcome) -> None:
        self._rest()
        for name, copy in plain_copies(nbytes, self._training.device).items():
            outcome.copies.setdefault(name, []).extend(_time(copy) for _ in range(_COPIES))

    def _take_turn(self, entrant: Entrant) -> Turn:
        folder = os.path.join(self._job.folder, entrant.name)
        self._on_one_rank(lambda: os.makedirs(folder, exist_ok=True))
        self._warm_up()
        turn = Turn(contestant=entrant.name, alone=tuple(_slowest([self._train() for _ in range(2 * self._job.steps)])))
        before = _memory_in_use()
        saver: Saver | None = None
        try:
            with MemoryWatch() as watch:
                with _all_or_none():
                    saver = entrant.open(folder, self._training)
                snapshots = [self._save(saver, 0, turn, beside=0)]
            self._warm_up()
            for number in range(1, 1 + self._job.saves):
                snapshots.append(self._save(saver, number, turn, beside=self._job.steps))
            turn.memory = int(_slowest([max(watch.peak, _memory_in_use()) - before])[0])
            if entrant.side != NOBODY:
                for number, snapshot in enumerate(snapshots):
                    self._check(saver, number, snapshot, turn)
        except Failed as problem:
            turn.problem = str(problem)
            self._training.restart()
        if saver is not None:
            saver.close()
        self._on_one_rank(partial(empty, folder))
        return turn

    def _warm_up(self) -> None:
        """Let a step that is not measured get the memory again which was given back."""
        self._training.step()
        self._rest()

    def _train(self) -> float:
        begun = perf_counter()
        self._training.step()
        return perf_counter() - begun

    def _save(self, saver: Saver, number: int, turn: Turn, *, beside: int) -> dict[str, int]:
        """Save, take ``beside`` steps and more until that is durable, or none for 0; returns digests as of the call."""
        snapshot = self._training.digests()
        self._rest()
        waited = 0.0
        steps: list[float] = []
        last = begun = perf_counter()
        with _all_or_none():
            flight = saver.save(number)
            call = perf_counter() - begun
            lookout = _Lookout(flight)

        def before_update() -> None:
            nonlocal waited
            before = perf_counter()
            flight.before_update()
            waited += perf_counter() - before

        while len(steps) < beside or (beside and _sum(not lookout.is_over)):
            self._training.step(before_update)
            steps.append(perf_counter() - last)
            last += steps[-1]
        with _all_or_none():
            durable = lookout.ended_at() - begun
        stall, call, durable, *steps = _slowest([call + waited + flight.hooks(), call, durable, *steps])
        turn.cycles.append(Cycle(stall=stall, call=call, durable=durable, steps=tuple(steps)))
        return snapshot

    def _check(self, saver: Saver, number: int, snapshot: dict[str, int], turn: Turn) -> None:
        self._training.poison()
        with _all_or_none():
            saver.load(number)
        loaded = self._training.digests()
        wrong = [name for name, digest in snapshot.items() if loaded.get(name) != digest]
        turn.checked += 1
        if _sum(len(wrong)):
            named = ", ".join(wrong[:_NAMED]) or "nothing on rank 0"
            turn.wrong.append(f"save {number}: {named} ({_sum(len(wrong))} tensors in all)")
            self._training.restart()

    # ---- what all ranks do together

    def _rest(self) -> None:
        """Begin what is measured with nothing left to do for the garbage collector and the file system."""
        gc.collect()
        self._on_one_rank(os.sync)

    def _on_one_rank(self, action: Callable[[], None]) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    def _step(self, doing: str) -> None:
        self._done += 1
        self._report(Progress(self._done, self._steps, doing))


class Failed(Exception):
    """A contestant raised an error on some rank; raised on all."""


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Raise `Failed` on all ranks when the block has raised on any."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if _sum(error is not None):
        raise Failed(f"{type(error).__name__}: {error}" if error else "it failed on another rank") from error


class _Lookout:
    """Waits for a save in a thread of its own, and remembers when it was durable."""

    def __init__(self, flight: Flight) -> None:
        self._flight = flight
        self._ended_at = 0.0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, name="bench-lookout", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether it is durable or has failed."""
        return not self._thread.is_alive()

    def ended_at(self) -> float:
        """When it was durable; raises its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._ended_at

    def _wait(self) -> None:
        try:
            self._flight.wait()
        except BaseException as error:
            self._error = error
        self._ended_at = perf_counter()


def _memory_in_use() -> int:
    gc.collect()
    give_back_free_memory()
    return memory_now()


def _time(action: Callable[[], object]) -> float:
    """Seconds that the slowest rank takes."""
    dist.barrier()
    begun = perf_counter()
    action()
    return _slowest([perf_counter() - begun])[0]


def _slowest(seconds: Sequence[float]) -> list[float]:
    """The greatest of each number on any rank."""
    values = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [float(value) for value in values.tolist()]


def _sum(number: int) -> int:
    total = torch.tensor([int(number)])
    dist.all_reduce(total)
    return int(total.item())
