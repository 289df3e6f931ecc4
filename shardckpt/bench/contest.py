# SPDX-License-Identifier: Apache-2.0
"""The contest on one rank: contestants take turns, round after round, and their data is checked after each turn.

Time is taken from a barrier to when the slowest rank has finished. Before each turn the file system is at rest and the page
cache is as it should be; everything is overwritten before each load, so that what is right afterwards was loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist

from .contestants import Contestant, Raw, Traffic, make_contestants
from .disk import drop_from_cache, empty, read_into_cache
from .launch import BenchmarkFailed, OnProgress, Progress
from .shapes import GPTShape
from .spec import Cache
from .workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a group of ranks has to do."""

    folder: str
    """Where contestants have their folders."""
    nbytes: int
    """Size of the state of all ranks together."""
    rounds: int = 1
    """Times that each contestant takes its turn."""
    caches: tuple[Cache, ...] = ()
    """For loads: whether the files are in the page cache."""
    dim: int = 0
    """Dimension that the state is sharded on."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One turn of one contestant."""

    contestant: str
    """Name."""
    cache: str
    """``warm`` or ``cold``; of a save, empty."""
    seconds: float
    """Wall time of the slowest rank."""
    traffic: Traffic | None = None
    """What was read, if it was counted."""


@dataclass(slots=True)
class Outcome:
    """What a group of ranks has to say of a job."""

    nbytes: int
    """Bytes of the state on all ranks together."""
    num_tensors: int
    """Tensors on each rank."""
    samples: list[Sample] = field(default_factory=list)
    """All turns, in order."""
    ways: dict[str, str] = field(default_factory=dict)
    """How the raw bytes were moved."""
    cold_by: str = ""
    """How files were taken out of the page cache; empty on ranks other than 0, and when they were not."""


def save_rounds(report: OnProgress, job: Job) -> Outcome:
    """Time saves; each is loaded again and checked."""
    return Contest(report, job).time_saves()


def save_once(report: OnProgress, job: Job) -> Outcome:
    """Leave one checkpoint of each contestant for others to load."""
    return Contest(report, job).leave_checkpoints()


def load_rounds(report: OnProgress, job: Job) -> Outcome:
    """Time loads of what `save_once` has left, whatever its world size, and check them."""
    return Contest(report, job).time_loads()


class Contest:
    """One job on one rank; all methods are collective, and the first that is called is the last."""

    def __init__(
        self,
        report: OnProgress,
        job: Job,
        make: Callable[[str, Workload], Sequence[Contestant]] = make_contestants,
    ) -> None:
        self._report = report
        self._job = job
        self._done, self._steps = -1, 1
        self._step("building the state")
        self._workload = Workload(GPTShape.of_size(job.nbytes), job.dim)
        self._contestants = make(job.folder, self._workload)
        self._outcome = Outcome(self._sum(self._workload.nbytes), self._workload.num_tensors)

    def time_saves(self) -> Outcome:
        """Time every contestant's saves, check them by loading them again, and remove them."""
        self._steps = 1 + len(self._contestants) * self._job.rounds
        for contestant in self._contestants:
            if isinstance(contestant, Raw):
                self._outcome.ways["write"] = str(contestant.choose_write_way(self._time))
                self._on_one_rank(partial(empty, contestant.folder))
        for number in range(1, self._job.rounds + 1):
            for contestant in self._contestants:
                self._step(f"round {number}: {contestant.name} saves")
                self._time_save(contestant, number)
        return self._finish()

    def leave_checkpoints(self) -> Outcome:
        """Save once with every contestant."""
        self._steps = 1 + len(self._contestants)
        for contestant in self._contestants:
            self._step(f"{contestant.name} saves")
            contestant.save(0)
        return self._finish()

    def time_loads(self) -> Outcome:
        """Time every contestant's loads of what it has left, and check them."""
        self._steps = 1 + len(self._contestants) * self._job.rounds * len(self._job.caches)
        for contestant in self._contestants:
            if isinstance(contestant, Raw):
                for cache in self._job.caches:
                    self._choose_read_way(contestant, cache)
        for number in range(1, self._job.rounds + 1):
            for cache in self._job.caches:
                for contestant in self._contestants:
                    self._step(f"round {number}: {contestant.name} loads, {cache} cache")
                    self._time_load(contestant, cache)
        return self._finish()

    def _time_save(self, contestant: Contestant, number: int) -> None:
        gc.collect()
        seconds = self._time(lambda: contestant.save(number))
        self._outcome.samples.append(Sample(contestant.name, "", seconds))
        if contestant.places_data:
            self._set_cache(contestant, "cold")
            self._workload.poison()
            contestant.load(number, warm=False)
            self._check(contestant)
        self._on_one_rank(lambda: empty(contestant.folder))

    def _time_load(self, contestant: Contestant, cache: Cache) -> None:
        if contestant.places_data:
            self._workload.poison()
        self._set_cache(contestant, cache)
        gc.collect()
        seconds = self._time(lambda: contestant.load(0, warm=cache == "warm"))
        self._outcome.samples.append(Sample(contestant.name, cache, seconds, contestant.traffic()))
        if contestant.places_data:
            self._check(contestant)
        self._set_cache(contestant, "cold")

    def _choose_read_way(self, raw: Raw, cache: Cache) -> None:
        def time(action: Callable[[], None]) -> float:
            self._set_cache(raw, cache)
            return self._time(action)

        self._outcome.ways[f"{cache}_read"] = str(raw.choose_read_way(time, warm=cache == "warm"))

    def _finish(self) -> Outcome:
        self._step("done")
        for contestant in self._contestants:
            contestant.close()
        return self._outcome

    # ---- what all ranks do together

    def _time(self, action: Callable[[], None]) -> float:
        """Seconds until the slowest rank has done it."""
        dist.barrier()
        begun = perf_counter()
        action()
        seconds = torch.tensor([perf_counter() - begun], dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds.item())

    def _check(self, contestant: Contestant) -> None:
        wrong = self._workload.find_wrong()
        if self._sum(len(wrong)):
            problem = f"wrong on rank {dist.get_rank()}: {'; '.join(wrong[:4])}" if wrong else "wrong on other ranks"
            raise BenchmarkFailed(f"{contestant.name} did not give back what was saved; {problem}", contestant=contestant.name)

    def _set_cache(self, contestant: Contestant, cache: Cache) -> None:
        self._on_one_rank(partial(self._change_cache, contestant.folder, cache))

    def _change_cache(self, folder: str, cache: Cache) -> None:
        if cache == "cold":
            self._outcome.cold_by = max(self._outcome.cold_by, drop_from_cache(folder), key=len)
        else:
            read_into_cache(folder)

    def _on_one_rank(self, action: Callable[[], None]) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    def _sum(self, number: int) -> int:
        total = torch.tensor([number])
        dist.all_reduce(total)
        return int(total.item())

    def _step(self, doing: str) -> None:
        self._done += 1
        self._report(Progress(self._done, self._steps, doing))
