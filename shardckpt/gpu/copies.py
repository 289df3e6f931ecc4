# SPDX-License-Identifier: Apache-2.0
"""Copies from a GPU to host memory beside what the GPU computes: on a stream of their own, in few and large transfers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch

from ..ravel import copy_range, flat_bytes

logger = logging.getLogger("shardckpt")

SCRATCH = 32 << 20
"""Bytes of GPU memory in which small parts are put together, and strided ones made contiguous."""
LEAST_SCRATCH = 1 << 20
"""Bytes that have to be had when the GPU has little left."""
SMALL = 2 << 20
"""Bytes from which on a contiguous part is worth a transfer of its own."""


class Mark(Protocol):
    """A point in a stream of work."""

    def wait_on_current_stream(self) -> None:
        """What the current stream is given from now on starts after this point; the calling thread goes on at once."""

    def synchronize(self) -> None:
        """Return when this point is reached."""


class Streams(Protocol):
    """A stream of work beside the current one."""

    def follow_current(self) -> None:
        """What is enqueued from now on starts after all that the current stream has been given so far."""

    def enqueue(self, work: Callable[[], Any]) -> None:
        """Do ``work``, some day, after all that was enqueued before."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Memory for use by enqueued work alone. Raises `torch.OutOfMemoryError`."""

    def mark(self) -> Mark:
        """The point after all that was enqueued."""


class CudaStreams:
    """A stream of its own on a CUDA device, beside the one that is current in the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow_current(self) -> None:
        self._side.wait_stream(torch.cuda.current_stream(self._device))

    def enqueue(self, work: Callable[[], Any]) -> None:
        with self._on_side():
            work()

    def allocate(self, nbytes: int) -> torch.Tensor:
        # from the pool of the side stream: freed memory can only go to work that comes later on the same stream
        with self._on_side():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> CudaMark:
        # a thread that waits for it sleeps, and leaves its core to those that feed the GPU
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._side)
        return CudaMark(event, self._device)

    def _on_side(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._side)


class CudaMark:
    """An event that was recorded on a stream of ``device``."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait_on_current_stream(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


class PendingCopies:
    """Copies that have been asked for and may still be under way. Keeps their sources alive until they are known to be done."""

    def __init__(self, mark: Mark, sources: list[torch.Tensor]) -> None:
        self._mark = mark
        self._sources = sources

    def wait_on_current_stream(self) -> None:
        """Make what the current stream is given from now on wait for the copies, so that it may change the sources."""
        self._mark.wait_on_current_stream()

    def synchronize(self) -> None:
        """Return when everything is in host memory. Raises `RuntimeError` when the GPU has failed."""
        self._mark.synchronize()
        self._sources.clear()


class DeviceCopier:
    """Copies parts of tensors of one GPU into host memory; used by one thread at a time.

    `begin`, then `copy` for each part, then `finish`. The copies see the values as of `begin` in the stream that is current
    then, provided that nobody changes a source before what `finish` returns was waited for. Host memory is best page-locked
    (see `shardckpt.gpu.pinning`): then no call here waits for the GPU.
    """

    def __init__(
        self, device: torch.device, streams: Streams | None = None, *, scratch: int = SCRATCH, small: int = SMALL
    ) -> None:
        """``scratch`` and ``small`` are bytes; tests make them smaller."""
        self._device = device
        self._streams = CudaStreams(device) if streams is None else streams
        self._scratch_size = scratch
        self._small = small
        self._scratch: torch.Tensor | None = None
        self._sources: list[torch.Tensor] = []
        self._batch = _Batch()

    def begin(self) -> None:
        """Start: all that the current stream has been given so far happens before the copies."""
        self._streams.follow_current()

    def copy(self, tensor: torch.Tensor, start: int, stop: int, target: torch.Tensor, position: int) -> None:
        """Ask for elements ``[start, stop)`` of the ravel of ``tensor``, at byte ``position`` of ``target``, flat host memory.

        Any strides. Raises `torch.OutOfMemoryError` when the GPU has no memory left, not even for the least scratch.
        """
        if start == stop:
            return
        # not the tensor, which may be given other memory meanwhile: the memory
        tensor = tensor.detach()
        self._sources.append(tensor)
        size = tensor.element_size()
        source = flat_bytes(tensor)
        if source is None:
            self._copy_strided(tensor, start, stop, target, position)
        elif (stop - start) * size < self._small:
            self._collect(source[start * size : stop * size], target, position)
        else:
            self._to_host(source[start * size : stop * size], target, position)

    def finish(self) -> PendingCopies:
        """End: what to wait for before any source is changed, and before the host memory is read."""
        self._flush()
        sources, self._sources = self._sources, []
        return PendingCopies(self._streams.mark(), sources)

    def close(self) -> None:
        """Give the scratch memory back."""
        self._scratch = None

    def _collect(self, part: torch.Tensor, target: torch.Tensor, position: int) -> None:
        """Put a small part with others into one transfer."""
        room = self._get_scratch().numel()
        if part.numel() > room:
            self._to_host(part, target, position)
            return
        if self._batch.nbytes + part.numel() > room:
            self._flush()
        self._batch.add(part, target, position)

    def _flush(self) -> None:
        batch, self._batch = self._batch, _Batch()
        if batch.nbytes:
            scratch = self._get_scratch()[: batch.nbytes]
            self._streams.enqueue(partial(torch.cat, batch.parts, out=scratch))
            for run in batch.runs:
                self._to_host(scratch[run.start : run.stop], run.target, run.position)

    def _copy_strided(self, tensor: torch.Tensor, start: int, stop: int, target: torch.Tensor, position: int) -> None:
        self._flush()
        scratch = self._get_scratch()
        size = tensor.element_size()
        most = scratch.numel() // size
        for low in range(start, stop, most):
            high = min(low + most, stop)
            window = scratch[: (high - low) * size]
            self._streams.enqueue(partial(copy_range, tensor, low, high, window.view(tensor.dtype)))
            self._to_host(window, target, position + (low - start) * size)

    def _to_host(self, source: torch.Tensor, target: torch.Tensor, position: int) -> None:
        part = target[position : position + source.numel()]
        self._streams.enqueue(partial(part.copy_, source, non_blocking=True))

    def _get_scratch(self) -> torch.Tensor:
        """The scratch memory, which is made at first need; less of it when the GPU is full."""
        size = self._scratch_size
        while self._scratch is None:
            try:
                self._scratch = self._streams.allocate(size)
            except torch.OutOfMemoryError:
                size //= 2
                if size < min(LEAST_SCRATCH, self._scratch_size):
                    raise
                logger.info("%s is full: small tensors are staged with %d bytes of its memory", self._device, size)
        return self._scratch


class _Run:
    """Bytes ``[start, stop)`` of the scratch memory that go to one place."""

    def __init__(self, target: torch.Tensor, position: int, start: int) -> None:
        self.target = target
        self.position = position
        self.start = start
        self.stop = start


class _Batch:
    """Small parts that are put together on the GPU, and leave it in as few runs as their targets allow."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.parts: list[torch.Tensor] = []
        self.runs: list[_Run] = []

    def add(self, part: torch.Tensor, target: torch.Tensor, position: int) -> None:
        last = self.runs[-1] if self.runs else None
        if last is None or last.target is not target or last.position + last.stop - last.start != position:
            last = _Run(target, position, self.nbytes)
            self.runs.append(last)
        self.parts.append(part)
        self.nbytes += part.numel()
        last.stop = self.nbytes
