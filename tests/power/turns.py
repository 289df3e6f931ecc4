# SPDX-License-Identifier: Apache-2.0
"""Several ranks in one process that take turns at each system call, in an order that a seed decides: the same at each run."""

from __future__ import annotations

import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from shardckpt.coordinate import Coordinator

_PATIENCE: Final = 120.0


class Turns:
    """Lets one of its tasks run at a time; in other threads its methods do nothing."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._mine = threading.local()
        self._changed = threading.Condition()
        self._ready: dict[int, Callable[[], bool]] = {}
        self._turn: int | None = None

    def run(self, tasks: Sequence[Callable[[], object]]) -> None:
        """Run the tasks, each in a thread of its own; raises the first error of one."""
        self._ready = {number: lambda: True for number in range(len(tasks))}
        self._choose()
        with ThreadPoolExecutor(len(tasks)) as pool:
            running = [pool.submit(self._run, number, task) for number, task in enumerate(tasks)]
        for future in running:
            future.result()

    def pass_on(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let another task run, or this one again; not before ``until`` says yes."""
        number = getattr(self._mine, "number", None)
        if number is not None:
            with self._changed:
                self._ready[number] = until
                self._choose()
                self._await_turn(number)

    def _run(self, number: int, task: Callable[[], object]) -> None:
        self._mine.number = number
        with self._changed:
            self._await_turn(number)
        try:
            task()
        finally:
            with self._changed:
                del self._ready[number]
                self._choose()

    def _choose(self) -> None:
        able = [number for number, is_ready in sorted(self._ready.items()) if is_ready()]
        # none: all that are left wait for one that has failed, and fail too
        self._turn = self._chance.choice(able) if able else None
        with self._changed:
            self._changed.notify_all()

    def _await_turn(self, number: int) -> None:
        def is_decided() -> bool:
            return self._turn == number or self._turn is None

        if not self._changed.wait_for(is_decided, _PATIENCE) or self._turn is None:
            raise RuntimeError(f"task {number} waits for one that does not come")


class Together(Coordinator):
    """The coordinator of a rank in this process: rounds by way of a table that all ranks share."""

    def __init__(self, rank: int, world_size: int, table: defaultdict[str, dict[int, bytes]], turns: Turns) -> None:
        self.rank = rank
        self.world_size = world_size
        self.hosts = ("here",) * world_size
        self._table = table
        self._turns = turns
        self._rounds = itertools.count()

    def round(
        self,
        label: str,
        produce: Callable[[], bytes] = bytes,
        decide: Callable[[list[bytes]], bytes] = lambda payloads: b"",
        **ignored: Any,
    ) -> bytes:
        key = f"{next(self._rounds)} {label}"
        posted, verdict = self._table[key], self._table[f"{key}: verdict"]
        posted[self.rank] = produce()
        if self.rank == 0:
            self._turns.pass_on(lambda: len(posted) == self.world_size)
            verdict[0] = decide([posted[rank] for rank in range(self.world_size)])
        else:
            self._turns.pass_on(lambda: bool(verdict))
        return verdict[0]


def coordinators(count: int, turns: Turns) -> list[Coordinator]:
    """One for each rank."""
    table: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
    return [Together(rank, count, table, turns) for rank in range(count)]
