# SPDX-License-Identifier: Apache-2.0
"""Who saves while training goes on: the engine and torch.distributed.checkpoint (DCP), in each of their modes.

DCP gets ready-made state dicts, which training programs build anew for each save, and a process group of its own, without
which its collectives would meet those of training. The engine takes model and optimizer as they are.
"""

from __future__ import annotations

import fnmatch
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from .. import Checkpointer, Options, SaveHandle
from ..errors import ConfigError
from .training import Training

NOBODY, ENGINE, PEER = "no-checkpoints", "shardckpt", "dcp"
Copies = Literal["in the call", "later", "never"]
_STDERR = 2


class Flight(ABC):
    """A save that is under way."""

    def before_update(self) -> None:
        """Wait, as the contestant's users have to, before the optimizer changes the state."""
        return

    def hooks(self) -> float:
        """Seconds that training was held since the call by what the contestant itself has put into it."""
        return 0.0

    @abstractmethod
    def wait(self) -> None:
        """Return when the save is durable; raises its error. Called from a thread of its own."""


class Saver(ABC):
    """Saves the state of a training run, on all ranks; opened for one turn, in a folder of its own."""

    @abstractmethod
    def save(self, number: int) -> Flight:
        """Begin to save; what this takes is a stall."""

    @abstractmethod
    def load(self, number: int) -> None:
        """Load a checkpoint into the run."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant(ABC):
    """A contestant: how it saves, ready to be opened."""

    name: str
    """Name in reports."""

    @property
    @abstractmethod
    def how(self) -> str:
        """What a user would write."""

    @property
    def side(self) -> str:
        """``no-checkpoints``, ``shardckpt`` or ``dcp``."""
        return NOBODY

    @property
    def copies(self) -> Copies:
        """When the state is copied: in the call, while training goes on, or never; of blocking saves, never."""
        return "never"

    @property
    def blocking(self) -> bool:
        """Whether the call returns when the save is durable."""
        return False

    @abstractmethod
    def open(self, folder: str, training: Training) -> Saver:
        """Take a turn with files in ``folder``. Collective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nobody(Entrant):
    """Training without checkpoints: what noise looks like."""

    name: str = NOBODY

    @property
    def how(self) -> str:
        return "nothing is saved"

    def open(self, folder: str, training: Training) -> Saver:
        return _NobodySaver()


class _NobodySaver(Saver):
    def save(self, number: int) -> Flight:
        return _Done()

    def load(self, number: int) -> None:
        raise FileNotFoundError(number)

    def close(self) -> None:
        return


class _Done(Flight):
    def wait(self) -> None:
        return


# ---- the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine(Entrant):
    """shardckpt in one of its modes."""

    options: Options
    """What the user chooses."""
    wait: bool = False
    """Whether saves are blocking ones."""

    @property
    def how(self) -> str:
        chosen = f"stage={self.options.stage!r}, background={self.options.background!r}"
        return "save(..., wait=True)" if self.wait else f"save(...) with {chosen}"

    @property
    def side(self) -> str:
        return ENGINE

    @property
    def copies(self) -> Copies:
        if self.wait or self.options.stage == "none":
            return "never"
        return "in the call" if self.options.stage == "eager" else "later"

    @property
    def blocking(self) -> bool:
        return self.wait

    def open(self, folder: str, training: Training) -> Saver:
        return _EngineSaver(folder, training, self)


class _EngineSaver(Saver):
    def __init__(self, folder: str, training: Training, entrant: Engine) -> None:
        self._training = training
        self._entrant = entrant
        self._checkpointer = Checkpointer(folder, options=entrant.options)

    def save(self, number: int) -> Flight:
        handle = self._checkpointer.save(number, self._training.state, wait=self._entrant.wait)
        return _EngineFlight(handle, promised=self._entrant.options.stage == "none" and not self._entrant.wait)

    def load(self, number: int) -> None:
        self._checkpointer.restore(self._training.state, step=number)

    def close(self) -> None:
        self._checkpointer.close()


class _EngineFlight(Flight):
    def __init__(self, handle: SaveHandle, *, promised: bool) -> None:
        self._handle = handle
        self._promised = promised
        self._call = handle.stall

    def before_update(self) -> None:
        if self._promised:
            self._handle.wait_staged()

    def hooks(self) -> float:
        return self._handle.stall - self._call

    def wait(self) -> None:
        self._handle.result()


# ---- DCP


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer(Entrant):
    """DCP in one of its modes."""

    writer: AsyncCheckpointerType | None = AsyncCheckpointerType.THREAD
    """What writes; None for blocking saves."""
    staging: StagingOptions | None = None
    """How a stager that is kept for all saves copies; None leaves it to DCP, which then makes one for each save."""

    @property
    def how(self) -> str:
        if self.writer is None:
            return "save(...)"
        stager = "its own stager" if self.staging is None else f"DefaultStager({', '.join(self._chosen)})"
        return f"async_save(...) by a {self.writer.value}, {stager}"

    @property
    def _chosen(self) -> list[str]:
        return [f"{name}=True" for name, value in vars(self.staging).items() if value]

    @property
    def side(self) -> str:
        return PEER

    @property
    def copies(self) -> Copies:
        if self.writer is None:
            return "never"
        return "later" if self.staging is not None and self.staging.use_async_staging else "in the call"

    @property
    def blocking(self) -> bool:
        return self.writer is None

    def open(self, folder: str, training: Training) -> Saver:
        return _PeerSaver(folder, training, self)


class _PeerSaver(Saver):
    def __init__(self, folder: str, training: Training, entrant: Peer) -> None:
        model, optimizer = get_state_dict(training.model, training.optimizer)
        self._state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        self._folder = folder
        self._writer = entrant.writer
        self._group = dist.new_group(backend="gloo")
        self._stager = None if entrant.staging is None else DefaultStager(entrant.staging)
        self._stderr = os.dup(_STDERR)
        if self._writer is AsyncCheckpointerType.PROCESS:
            with open(os.devnull, "wb") as nowhere:
                # DCP's process tells there of every step that it takes
                os.dup2(nowhere.fileno(), _STDERR)

    def save(self, number: int) -> Flight:
        path = self._path(number)
        if self._writer is None:
            save(self._state, storage_writer=FileSystemWriter(path, sync_files=True), process_group=self._group)
            return _Done()
        # a FileSystemWriter that is passed without a stager would also stage, in the way of older versions; one that
        # DCP makes itself is durable too
        given: dict[str, Any] = {"checkpoint_id": path}
        if self._stager is not None:
            given = {"storage_writer": FileSystemWriter(path, sync_files=True), "async_stager": self._stager}
        return _PeerFlight(async_save(self._state, async_checkpointer_type=self._writer, process_group=self._group, **given))

    def load(self, number: int) -> None:
        load(self._state, storage_reader=FileSystemReader(self._path(number)), process_group=self._group)

    def close(self) -> None:
        # DCP's process would live as long as this one, and be counted as the next contestant's
        _async_process_executor._CHECKPOINT_PROCESS = None
        os.dup2(self._stderr, _STDERR)
        os.close(self._stderr)
        if self._stager is not None:
            self._stager.close()
        self._state.clear()
        dist.destroy_process_group(self._group)

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, str(number))


class _PeerFlight(Flight):
    def __init__(self, response: Future[Any] | AsyncSaveResponse) -> None:
        self._response = response

    def before_update(self) -> None:
        if isinstance(self._response, AsyncSaveResponse):
            self._response.staging_completion.result()

    def wait(self) -> None:
        if isinstance(self._response, AsyncSaveResponse):
            self._response.upload_completion.result()
        else:
            self._response.result()


# ---- all of them


def all_entrants(*, cuda: bool) -> list[Entrant]:
    """Every contestant that can take part, in the order of their turns; with ``cuda``, those that need a GPU as well."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    entrants: list[Entrant] = [
        Nobody(),
        Engine(name="shardckpt-blocking", options=Options(), wait=True),
        Engine(name="shardckpt-eager-thread", options=Options(stage="eager", background="thread")),
        Engine(name="shardckpt-eager-process", options=Options(stage="eager", background="process")),
        Engine(name="shardckpt-lazy-thread", options=Options(stage="lazy", background="thread")),
        Engine(name="shardckpt-lazy-process", options=Options(stage="lazy", background="process")),
        Engine(name="shardckpt-none-thread", options=Options(stage="none", background="thread")),
        Peer(name="dcp-blocking", writer=None),
        Peer(name="dcp-thread"),
        Peer(name="dcp-thread-kept", staging=_staging()),
        Peer(name="dcp-thread-lazy", staging=_staging(use_async_staging=True)),
        Peer(name="dcp-process", writer=process),
        Peer(name="dcp-process-kept", writer=process, staging=_staging(use_shared_memory=True)),
        Peer(name="dcp-process-lazy", writer=process, staging=_staging(use_shared_memory=True, use_async_staging=True)),
    ]
    if cuda:
        pinned = {"use_pinned_memory": True, "use_non_blocking_copy": True}
        shared = {**pinned, "use_shared_memory": True}
        entrants += [
            Peer(name="dcp-thread-pinned", writer=thread, staging=_staging(**pinned)),
            Peer(name="dcp-thread-pinned-lazy", writer=thread, staging=_staging(**pinned, use_async_staging=True)),
            Peer(name="dcp-process-pinned", writer=process, staging=_staging(**shared)),
            Peer(name="dcp-process-pinned-lazy", writer=process, staging=_staging(**shared, use_async_staging=True)),
        ]
    return entrants


def choose(patterns: Sequence[str], *, cuda: bool) -> list[Entrant]:
    """The contestants whose names match one of the patterns, all for none; raises `ConfigError` for one without a match."""
    entrants = all_entrants(cuda=cuda)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(entrant.name, pattern) for entrant in entrants):
            raise ConfigError(f"{pattern!r} matches no contestant; there are {', '.join(entrant.name for entrant in entrants)}")
    return [e for e in entrants if not patterns or any(fnmatch.fnmatchcase(e.name, pattern) for pattern in patterns)]


def _staging(**chosen: bool) -> StagingOptions:
    """DCP's options, of which only those are on that were chosen."""
    names = ("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy")
    return StagingOptions(**{name: chosen.get(name, False) for name in names})
