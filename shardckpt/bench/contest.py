# SPDX-License-Identifier: Apache-2.0
"""The contest on one rank: contestants take turns, round after round, and their data is checked after each turn.

Time is taken from a barrier to when the slowest rank has finished. Before each turn the file system is at rest and the page
cache is as it should be; everything is overwritten before each load, so that what is right afterwards was loaded.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
import torch.distributed as dist

from .contestants import Contestant, Engine, Peer, Raw, Traffic
from .disk import drop_from_cache, empty, read_into_cache, takes_direct
from .launch import BenchmarkFailed, OnProgress, Progress
from .raw import MAX_THREADS, Way
from .shapes import GPTShape
from .spec import Cache
from .workload import Workload

_TRIAL_BYTES = 512 << 20
"""Per rank; how much is moved to find out which way is the fastest."""
_TRIALS = 2


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


def save_rounds(report: OnProgress, job: Job) -> Outcome:
    """Time saves; each is loaded again and checked."""
    contest = _Contest(report, job, steps=1 + 3 * job.rounds)
    return contest.run(contest.time_saves)


def save_once(report: OnProgress, job: Job) -> Outcome:
    """Leave one checkpoint of each contestant for others to load."""
    contest = _Contest(report, job, steps=1 + 3)
    return contest.run(contest.leave_checkpoints)


def load_rounds(report: OnProgress, job: Job) -> Outcome:
    """Time loads of what `save_once` has left, whatever its world size, and check them."""
    contest = _Contest(report, job, steps=1 + 3 * job.rounds * len(job.caches))
    return contest.run(contest.time_loads)


class _Contest:
    def __init__(self, report: OnProgress, job: Job, steps: int) -> None:
        self._report = report
        self._job = job
        self._steps = steps
        self._done = -1
        self._step("building the state")
        self._workload = Workload(GPTShape.of_size(job.nbytes), job.dim)
        folders = [os.path.join(job.folder, kind.name) for kind in (Engine, Peer, Raw)]
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        self._raw = Raw(folders[2], self._workload.nbytes)
        self._engine = Engine(folders[0], self._workload)
        self._contestants = [self._engine, Peer(folders[1], self._workload), self._raw]
        self._outcome = Outcome(self._sum(self._workload.nbytes), self._workload.num_tensors)

    def run(self, work: Callable[[], None]) -> Outcome:
        work()
        self._step("done")
        self._engine.close()
        return self._outcome

    def time_saves(self) -> None:
        direct = takes_direct(self._job.folder)
        ways = [Way(threads, direct) for threads in range(1, MAX_THREADS + 1)]
        self._raw.write_way = self._fastest("write", ways, lambda way: self._raw.disk.write(0, way, self._trial_bytes))
        self._on_one_rank(lambda: empty(self._raw.folder))
        for number in range(1, self._job.rounds + 1):
            for contestant in self._contestants:
                self._step(f"round {number}: {contestant.name} saves")
                self._time_save(contestant, number)

    def _time_save(self, contestant: Contestant, number: int) -> None:
        seconds = self._time(lambda: contestant.save(number))
        self._outcome.samples.append(Sample(contestant.name, "", seconds))
        if contestant.places_data:
            self._set_cache(contestant, "cold")
            self._workload.poison()
            contestant.load(number, warm=False)
            self._check(contestant)
        self._on_one_rank(lambda: empty(contestant.folder))

    def leave_checkpoints(self) -> None:
        self._raw.write_way = Way(1, takes_direct(self._job.folder))
        for contestant in self._contestants:
            self._step(f"{contestant.name} saves")
            contestant.save(0)

    def time_loads(self) -> None:
        self._calibrate_reads()
        for number in range(1, self._job.rounds + 1):
            for cache in self._job.caches:
                for contestant in self._contestants:
                    self._step(f"round {number}: {contestant.name} loads, {cache} cache")
                    self._time_load(contestant, cache)

    def _time_load(self, contestant: Contestant, cache: Cache) -> None:
        if contestant.places_data:
            self._workload.poison()
        self._set_cache(contestant, cache)
        seconds = self._time(lambda: contestant.load(0, warm=cache == "warm"))
        self._outcome.samples.append(Sample(contestant.name, cache, seconds, contestant.traffic()))
        if contestant.places_data:
            self._check(contestant)
        self._set_cache(contestant, "cold")

    def _calibrate_reads(self) -> None:
        direct = (False, True) if takes_direct(self._job.folder) else (False,)
        threads = range(1, MAX_THREADS + 1)

        def read(way: Way) -> None:
            self._raw.disk.read(0, way, self._trial_bytes)

        if "cold" in self._job.caches:
            ways = [Way(count, flag) for flag in direct for count in threads]
            self._raw.cold_way = self._fastest("cold read", ways, read, "cold")
        if "warm" in self._job.caches:
            ways = [Way(count, False) for count in threads]
            self._raw.warm_way = self._fastest("warm read", ways, read, "warm")

    @property
    def _trial_bytes(self) -> int:
        return min(_TRIAL_BYTES, self._workload.nbytes)

    def _fastest(self, what: str, ways: Iterable[Way], move: Callable[[Way], None], cache: Cache | None = None) -> Way:
        """The way that is the fastest here; all are tried in turns."""
        self._step(f"finding the fastest raw {what}", advance=False)
        best: dict[Way, float] = {}
        for _ in range(_TRIALS):
            for way in ways:
                if cache is not None:
                    self._set_cache(self._raw, cache)
                best[way] = min(self._time(partial(move, way)), best.get(way, float("inf")))
        fastest = min(best, key=lambda way: best[way])
        self._outcome.ways[what.replace(" ", "_")] = str(fastest)
        return fastest

    # ---- what all ranks do together

    def _time(self, action: Callable[[], None]) -> float:
        """Seconds until the slowest rank has done it."""
        gc.collect()
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
        change = drop_from_cache if cache == "cold" else read_into_cache
        self._on_one_rank(lambda: change(contestant.folder))

    def _on_one_rank(self, action: Callable[[], None]) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()

    def _sum(self, number: int) -> int:
        total = torch.tensor([number])
        dist.all_reduce(total)
        return int(total.item())

    def _step(self, doing: str, *, advance: bool = True) -> None:
        self._done += advance
        self._report(Progress(self._done, self._steps, doing))
