# SPDX-License-Identifier: Apache-2.0
"""A stream, played by a list of work that is done some day; and a GPU in host memory, for saves to stage from."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

import shardckpt
from shardckpt.device_staging import DeviceStaging
from shardckpt.gpu import DeviceCopier
from tests.engine.waiting import PATIENCE


class Lazy:
    """A stream that does nothing until somebody waits, as a GPU may, and a mark in it."""

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.log: list[str] = []
        self.work: list[Callable[[], Any]] = []
        self.allocated = 0

    def follow_current(self) -> None:
        self.log.append("follow")

    def enqueue(self, work: Callable[[], Any]) -> None:
        self.log.append("to host" if "non_blocking" in getattr(work, "keywords", {}) else "gather")
        self.work.append(work)

    def allocate(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.memory:
            raise torch.OutOfMemoryError(f"{nbytes} bytes of {self.memory}")
        self.allocated += nbytes
        return torch.full((nbytes,), 0xAA, dtype=torch.uint8)

    def mark(self) -> Any:
        self.log.append("mark")
        return self

    def wait_on_current_stream(self) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()


class Gpu(Lazy):
    """A GPU at its slowest: nothing is copied before training goes on to change it, or asks for it.

    What is done on its current stream is done by the thread that trains, so work that has to come before is done there, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        """How often training has gone on and left the waiting to the GPU."""
        self.broken: Exception | None = None

    def mark(self) -> Mark:
        return Mark(self)


class Mark:
    """A point in the work of a GPU."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._asker = threading.get_ident()
        self._work, gpu.work = gpu.work, []
        self._lock = threading.Lock()
        self._reached = threading.Event()

    def wait_on_current_stream(self) -> None:
        self._gpu.waits += 1
        self._do()

    def synchronize(self) -> None:
        if threading.get_ident() == self._asker:
            self._do()
        if not self._reached.wait(PATIENCE):
            raise TimeoutError("training never went on")
        if self._gpu.broken is not None:
            raise self._gpu.broken

    def _do(self) -> None:
        with self._lock:
            while self._work:
                work = self._work.pop(0)
                if self._gpu.broken is None:
                    work()
            self._reached.set()


def with_gpu(gpu: Gpu) -> type[shardckpt.Checkpointer]:
    """A `Checkpointer` for whose saves all tensors of floating point lie on ``gpu``."""

    class Injected(shardckpt.Checkpointer):
        @staticmethod
        def _make_device_staging() -> DeviceStaging:
            # sizes small enough for both kinds of transfers
            return DeviceStaging(torch.is_floating_point, lambda device: DeviceCopier(device, gpu, scratch=1 << 16, small=64))

    return Injected
