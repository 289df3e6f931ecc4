# SPDX-License-Identifier: Apache-2.0
"""How fast memory is copied here, in host memory and from GPUs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from time import perf_counter

import torch

from ..buffer import Buffer
from ..gpu import GPU, DeviceCopier, Link, Nvml, near, pin, unpin

STAGED_BYTES = 256 << 20
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Staging:
    """Copies from a GPU into host memory, made as saves make them."""

    bytes_per_second: float
    """The best of a few."""
    is_locked: bool
    """Whether the host memory was page-locked."""
    link: Link | None
    """The link while it was in use."""


def measure_copying(nbytes: int) -> float:
    """Bytes per second of one thread that copies ``nbytes`` bytes of host memory; the best of a few times."""
    source, target = Buffer(nbytes), Buffer(nbytes)
    # the first copy touches the pages
    ctypes.memset(source.address, 1, nbytes)
    return nbytes / min(_time_copy(source, target) for _ in range(_ROUNDS))


def _time_copy(source: Buffer, target: Buffer) -> float:
    begun = perf_counter()
    ctypes.memmove(target.address, source.address, target.size)
    return perf_counter() - begun


def measure_staging(gpu: GPU, nvml: Nvml) -> Staging:
    """Copy from ``gpu`` into host memory near it. Raises `RuntimeError` when the GPU has no room or does not work.

    Raises `OSError` when there is no host memory.
    """
    assert gpu.index is not None
    device = torch.device("cuda", gpu.index)
    with near(gpu):
        buffer = Buffer(STAGED_BYTES)
        is_locked = pin(buffer.address, buffer.size, "auto")
        try:
            source = torch.zeros(STAGED_BYTES, dtype=torch.uint8, device=device)
            copier = DeviceCopier(device)
            seconds = min(_time_staging(copier, source, buffer) for _ in range(_ROUNDS))
            link = _link_in_use(copier, source, buffer, gpu, nvml)
        finally:
            if is_locked:
                unpin(buffer.address)
    return Staging(STAGED_BYTES / seconds, is_locked, link)


def _time_staging(copier: DeviceCopier, source: torch.Tensor, buffer: Buffer) -> float:
    torch.cuda.synchronize(source.device)
    begun = perf_counter()
    copier.begin()
    copier.copy(source, 0, source.numel(), buffer.tensor, 0)
    copier.finish().synchronize()
    return perf_counter() - begun


def _link_in_use(copier: DeviceCopier, source: torch.Tensor, buffer: Buffer, gpu: GPU, nvml: Nvml) -> Link | None:
    copier.begin()
    for _ in range(_ROUNDS):
        copier.copy(source, 0, source.numel(), buffer.tensor, 0)
    pending = copier.finish()
    busy = nvml.describe(gpu.uuid, gpu.index)
    pending.synchronize()
    return None if busy is None else busy.link
