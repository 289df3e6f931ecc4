# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint (DCP) as it saves while training goes on. Older releases of torch cannot import this module.

DCP gets ready-made state dicts, which training programs build anew for each save, and a process group of its own, without
which its collectives would meet those of training.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save

from .async_contestants import PEER, Copies, Done, Entrant, Flight, Saver
from .training import Training

_STDERR = 2


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
            return Done()
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


def peers(*, cuda: bool) -> list[Entrant]:
    """DCP's modes, in the order of their turns; with ``cuda``, those that need a GPU as well."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    entrants: list[Entrant] = [
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


def _staging(**chosen: bool) -> StagingOptions:
    """DCP's options, of which only those are on that were chosen."""
    names = ("use_pinned_memory", "use_shared_memory", "use_async_staging", "use_non_blocking_copy")
    return StagingOptions(**{name: chosen.get(name, False) for name in names})
