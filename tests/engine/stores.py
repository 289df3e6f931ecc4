# SPDX-License-Identifier: Apache-2.0
"""Checkpointers whose storage fails or waits when told to, and states for them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import torch

import shardckpt
from shardckpt.maintain.digest import digest_content
from shardckpt.maintain.stored import open_checkpoint
from shardckpt.manifest import step_directory
from shardckpt.store import LocalStore, Store
from tests.engine.waiting import PATIENCE, until
from tests.store.faults import FaultyFileSystem

CHUNK = 4 << 20
"""Bytes that are staged and written in one go."""


class Gate(FaultyFileSystem):
    """A file system on which no rank can begin to write its file while the gate is closed."""

    def __init__(self, *, is_open: bool = True) -> None:
        super().__init__()
        self._is_open = threading.Event()
        self._waiting = 0
        if is_open:
            self.lift()

    def lift(self) -> None:
        """Open it."""
        self._is_open.set()

    def lower(self) -> None:
        """Close it."""
        self._is_open.clear()

    def until_reached(self) -> None:
        """Return when somebody waits in front of it."""
        until(lambda: self._waiting)

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        if flags & os.O_CREAT and Path(path).name.startswith("rank-"):
            self.pass_through()
        return super().open(path, flags, mode)

    def pass_through(self) -> None:
        """Wait until it is open."""
        with self._lock:
            self._waiting += 1
        if not self._is_open.wait(PATIENCE):
            raise TimeoutError("nobody opened the gate")
        with self._lock:
            self._waiting -= 1


class SlowDisk(Gate):
    """The gate is in front of each chunk of data, and not of the file."""

    def open(self, path: str, flags: int, mode: int = 0o666) -> int:
        return FaultyFileSystem.open(self, path, flags, mode)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if offset and buffer.nbytes >= CHUNK // 2:
            self.pass_through()
        return super().pwrite(fd, buffer, offset)


def checkpointer(root: Path | str, fs: FaultyFileSystem, **options: Any) -> shardckpt.Checkpointer:
    """A checkpointer of which this rank's storage is ``fs``; ``keep_last`` is its own, all else are `shardckpt.Options`."""

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _open_store(url: str | os.PathLike[str]) -> Store:
            return LocalStore(url, fs)

    keep_last = options.pop("keep_last", None)
    return Injected(root, keep_last=keep_last, options=shardckpt.Options(**{"timeout": PATIENCE} | options))


def a_state(step: int, **more: Any) -> dict[str, Any]:
    """Small, and another one at each step."""
    return {"t": torch.full((3, 5), float(step)), "own": shardckpt.PerRank({"step": step}), "step": step, **more}


def large(chunks: float, seed: int = 0) -> dict[str, Any]:
    """A state of one rank of so many chunks, in tensors that do not end where chunks do."""
    generator = torch.Generator().manual_seed(seed)
    count = int(chunks * CHUNK / 3 / 4)
    return {name: torch.randn(count, generator=generator) for name in "abc"} | {"seed": seed}


def loaded(root: Path | str, step: int) -> dict[str, Any]:
    """The state that was saved as ``step``."""
    return dict(shardckpt.load(Path(root) / step_directory(step)).state)


def equal(a: Any, b: Any) -> bool:
    """Whether two plain states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def content(root: Path | str, step: int) -> str:
    """A digest of all that was saved as ``step``, what ranks have for themselves included."""
    stored = open_checkpoint(LocalStore(root), f"{step_directory(step)}/")
    return digest_content(stored, per_rank=True).digest


def files(root: Path | str) -> list[str]:
    """Everything below a root but the journal of saves."""
    found = (str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())
    return sorted(name for name in found if name.startswith("step-"))
