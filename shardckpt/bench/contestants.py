# SPDX-License-Identifier: Apache-2.0
"""Who is compared: the engine, torch.distributed.checkpoint, and the raw disk, behind one interface.

Connections are made, and state dicts are built, outside of the time that is measured: DCP gets ready-made state dicts, and
puts what it has loaded into the tensors of model and optimizer itself. The engine takes them as they are.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .. import Checkpointer, Restored
from .disk import bytes_read_by_process, takes_direct
from .raw import MAX_THREADS, RawDisk, Way
from .workload import Workload

Timer = Callable[[Callable[[], None]], float]
"""Carries something out on all ranks, and returns the seconds that the slowest one has taken."""
_TRIAL_BYTES = 512 << 20
"""Per rank; how much is moved to find out which way is the fastest."""
_TRIALS = 2
ENGINE, PEER, RAW = "shardckpt", "dcp", "raw"


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a load has read."""

    read: int
    """Bytes that all ranks together have read from files."""
    needed: int
    """Bytes of tensor data that all ranks together wanted."""


class Contestant(ABC):
    """Saves and loads the state of a workload, on all ranks; each has a folder of its own."""

    name: str
    """Name in reports."""
    places_data: bool = True
    """Whether a load gives back what was saved."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        """Where its files go."""

    @abstractmethod
    def save(self, number: int) -> None:
        """Make checkpoint ``number`` durable."""

    @abstractmethod
    def load(self, number: int, *, warm: bool) -> None:
        """Load checkpoint ``number``; ``warm`` tells whether its files are in the page cache."""

    def traffic(self) -> Traffic | None:
        """What the last load has read, if that is counted. Collective."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of connections. Collective."""


class Engine(Contestant):
    """shardckpt, with the options that users get."""

    name = ENGINE

    def __init__(self, folder: str, workload: Workload) -> None:
        super().__init__(folder)
        self._workload = workload
        self._checkpointer = Checkpointer(folder)
        self._restored: Restored | None = None

    def save(self, number: int) -> None:
        self._checkpointer.save(number, self._workload.state, wait=True)

    def load(self, number: int, *, warm: bool) -> None:
        self._restored = self._checkpointer.restore(self._workload.state, step=number)

    def traffic(self) -> Traffic | None:
        # the engine counts for all ranks together
        info = self._restored.info if self._restored else None
        return Traffic(info.bytes_read, info.bytes_needed) if info else None

    def close(self) -> None:
        self._checkpointer.close()


class Peer(Contestant):
    """torch.distributed.checkpoint with the options that users get, which are durable ones."""

    name = PEER

    def __init__(self, folder: str, workload: Workload) -> None:
        super().__init__(folder)
        model, optimizer = get_state_dict(workload.model, workload.optimizer)
        self._state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        self._nbytes = workload.nbytes
        self._read = 0

    def save(self, number: int) -> None:
        save(self._state, storage_writer=FileSystemWriter(self._path(number), sync_files=True))

    def load(self, number: int, *, warm: bool) -> None:
        before = bytes_read_by_process()
        load(self._state, storage_reader=FileSystemReader(self._path(number)))
        self._read = bytes_read_by_process() - before

    def traffic(self) -> Traffic | None:
        totals = torch.tensor([self._read, self._nbytes])
        dist.all_reduce(totals)
        read, needed = totals.tolist()
        return Traffic(read, needed) if read else None

    def close(self) -> None:
        self._state.clear()

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, str(number))


class Raw(Contestant):
    """The same number of bytes, and nothing else, in the way that is the fastest here."""

    name = RAW
    places_data = False

    def __init__(self, folder: str, nbytes: int) -> None:
        super().__init__(folder)
        self._disk = RawDisk(folder, nbytes)
        self._trial_bytes = min(_TRIAL_BYTES, nbytes)
        self._write_way = Way(threads=1, direct=takes_direct(folder))
        self._read_ways = {False: self._write_way, True: Way(threads=1, direct=False)}

    def choose_write_way(self, time: Timer) -> Way:
        """Find out which number of threads writes the fastest. Collective."""
        ways = [Way(threads, takes_direct(self.folder)) for threads in range(1, MAX_THREADS + 1)]
        self._write_way = _fastest(ways, lambda way: time(partial(self._disk.write, 0, way, self._trial_bytes)))
        return self._write_way

    def choose_read_way(self, time: Timer, *, warm: bool) -> Way:
        """Find out which number of threads, with or without O_DIRECT, reads the fastest. Collective."""
        direct = {False, takes_direct(self.folder) and not warm}
        ways = [Way(threads, flag) for flag in sorted(direct) for threads in range(1, MAX_THREADS + 1)]
        self._read_ways[warm] = _fastest(ways, lambda way: time(partial(self._disk.read, 0, way, self._trial_bytes)))
        return self._read_ways[warm]

    def save(self, number: int) -> None:
        self._disk.write(number, self._write_way)

    def load(self, number: int, *, warm: bool) -> None:
        self._disk.read(number, self._read_ways[warm])

    def close(self) -> None:
        self._disk.close()


def _fastest(ways: Sequence[Way], seconds: Callable[[Way], float]) -> Way:
    """The way with the shortest time; all are tried in turns."""
    times = [(seconds(way), number) for _ in range(_TRIALS) for number, way in enumerate(ways)]
    return ways[min(times)[1]]


def make_contestants(folder: str, workload: Workload) -> list[Contestant]:
    """All three, in the order of their turns, with folders in ``folder``."""
    folders = [os.path.join(folder, name) for name in (ENGINE, PEER, RAW)]
    for path in folders:
        os.makedirs(path, exist_ok=True)
    return [Engine(folders[0], workload), Peer(folders[1], workload), Raw(folders[2], workload.nbytes)]
