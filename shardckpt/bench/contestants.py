# SPDX-License-Identifier: Apache-2.0
"""Who is compared: the engine, torch.distributed.checkpoint, and the raw disk, behind one interface.

Connections are made, and state dicts are built, outside of the time that is measured: DCP gets ready-made state dicts, and
puts what it has loaded into the tensors of model and optimizer itself. The engine takes them as they are.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from .. import Checkpointer, Restored
from .disk import bytes_read_by_process
from .raw import RawDisk, Way
from .workload import Workload

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


class Engine(Contestant):
    """shardckpt, with the options that users get."""

    name = ENGINE

    def __init__(self, folder: str, workload: Workload) -> None:
        super().__init__(folder)
        self._workload = workload
        self._checkpointer = Checkpointer(folder)
        self._restored: Restored | None = None

    def save(self, number: int) -> None:
        self._checkpointer.save(number, self._workload.state).result()

    def load(self, number: int, *, warm: bool) -> None:
        self._restored = self._checkpointer.restore(self._workload.state, step=number)

    def traffic(self) -> Traffic | None:
        # the engine counts for all ranks together
        info = self._restored.info if self._restored else None
        return Traffic(info.bytes_read, info.bytes_needed) if info else None

    def close(self) -> None:
        """Let go of connections."""
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

    def _path(self, number: int) -> str:
        return os.path.join(self.folder, str(number))


class Raw(Contestant):
    """The same number of bytes, and nothing else."""

    name = RAW
    places_data = False

    def __init__(self, folder: str, nbytes: int) -> None:
        super().__init__(folder)
        self.disk = RawDisk(folder, nbytes)
        """Does it."""
        self.write_way = self.cold_way = Way(threads=1, direct=False)
        self.warm_way = Way(threads=1, direct=False)

    def save(self, number: int) -> None:
        self.disk.write(number, self.write_way)

    def load(self, number: int, *, warm: bool) -> None:
        self.disk.read(number, self.warm_way if warm else self.cold_way)
