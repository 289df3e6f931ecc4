# SPDX-License-Identifier: Apache-2.0
"""Staging: the copy of any part of any tensor, or of a rank's file, into host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .buffer import Buffer
from .errors import StateChanged
from .plan import FilePiece
from .ravel import copy_range, flat_bytes


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8] | None:
    """The memory of a contiguous CPU tensor as a flat array of bytes, without a copy; None for any other tensor."""
    if tensor.device.type != "cpu":
        return None
    flat = flat_bytes(tensor)
    return None if flat is None else flat.numpy()


def wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what was queued on the tensors' devices is done, so that other threads and streams read final values."""
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        torch.accelerator.synchronize(device)


def gather(tensor: torch.Tensor, start: int, stop: int, buffer: Buffer, position: int) -> None:
    """Copy elements ``[start, stop)`` of the ravel of ``tensor`` to byte ``position`` of ``buffer``.

    Any device and any strides; no more memory than the buffer is used.
    """
    size = tensor.itemsize
    if tensor.is_cpu and tensor.is_contiguous():
        # gives up the GIL, starts no threads of its own, and costs a small tensor a fifth of what a view by numpy does
        source = tensor.data_ptr()
        if not source and start < stop:
            raise StateChanged("the memory of a tensor was given back while a save still needed it: save with stage='eager'")
        ctypes.memmove(buffer.address + position, source + start * size, (stop - start) * size)
        return
    target = buffer.tensor[position : position + (stop - start) * size].view(tensor.dtype)
    if tensor.is_contiguous():
        target.copy_(tensor.detach().reshape(-1)[start:stop])
    else:
        copy_range(tensor, start, stop, target)


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one tensor that lie together in a rank's file."""

    name: str
    """Of the tensor."""
    start: int
    """First element of the raveled local tensor."""
    stop: int
    """Behind the last one."""
    offset: int
    """First byte in the data region of the file."""


class FileMap:
    """Where the tensors of one rank lie in the data region of its file; the same for all saves of one plan."""

    def __init__(self, pieces: Sequence[FilePiece]) -> None:
        self.nbytes = pieces[-1].offset + pieces[-1].nbytes if pieces else 0
        """Length of the region."""
        self.names = frozenset(piece.tensor.name for piece in pieces)
        """Names of the tensors."""
        self._pieces = pieces
        self._cut: dict[int, tuple[tuple[Part, ...], ...]] = {}

    def cut(self, chunk: int) -> tuple[tuple[Part, ...], ...]:
        """What each chunk of ``chunk`` bytes (a multiple of all items' sizes) consists of, in order."""
        known = self._cut.get(chunk)
        if known is None:
            chunks: list[list[Part]] = [[] for _ in range(0, self.nbytes, chunk)]
            for piece in self._pieces:
                for low in range(piece.offset - piece.offset % chunk, piece.offset + piece.nbytes, chunk):
                    chunks[low // chunk].append(_part(piece, low, low + chunk))
            known = self._cut[chunk] = tuple(map(tuple, chunks))
        return known


def _part(piece: FilePiece, start: int, stop: int) -> Part:
    """What bytes ``[start, stop)`` of the region have of a piece."""
    low, high = max(start, piece.offset), min(stop, piece.offset + piece.nbytes)
    size = piece.tensor.itemsize
    first = piece.local[0] + (low - piece.offset) // size
    return Part(piece.tensor.name, first, first + (high - low) // size, low)


class FileData:
    """The data region of one rank's file, as the plan cuts it out of the rank's tensors."""

    def __init__(self, where: FileMap, tensors: Mapping[str, torch.Tensor]) -> None:
        self.where = where
        """What lies where."""
        self.tensors = tensors
        """This rank's local tensors by name."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.where.nbytes

    def copy(self, part: Part, buffer: Buffer, position: int) -> None:
        """Copy a part to byte ``position`` of ``buffer``."""
        gather(self.tensors[part.name], part.start, part.stop, buffer, position)
