# SPDX-License-Identifier: Apache-2.0
"""Stored tensors as streams of bytes in their global row-major order, whatever layout they were saved in.

Tensors are read in batches that fit in a fixed amount of memory, in the order of the rank files, so that blocks are rarely
read twice. A tensor that is larger than the memory comes in several parts. When such a tensor was sharded on an inner
dimension over very many ranks, each part needs a few rows of every rank's piece, and blocks are read again for the next
part: more memory means fewer parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.errors import ConfigError
from shardckpt.layout import Ints, PerRankShapes, Piece
from shardckpt.plan import Plan, PlannedTensor
from shardckpt.read import CheckpointFiles, Destination, read_into
from shardckpt.reshard import Want, plan_reads

from .stored import WORKERS, StoredCheckpoint

MEMORY = 256 << 20
"""Bytes that are held at once, unless the caller says otherwise."""
LEAST_MEMORY = 1 << 20
_ALIGNMENT = 16
# Bits are compared and hashed, so tensors are read as integers: no operation is missing for them, as it is for some floats.
_BITS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A stored tensor, or what one rank stored under a per-rank name."""

    tensor: PlannedTensor
    """What is stored under the name."""
    rank: int | None = None
    """Whose, if the name is a per-rank one."""

    @property
    def shape(self) -> Ints:
        """Global shape, or that of the rank's own tensor."""
        layout = self.tensor.layout
        if isinstance(layout, PerRankShapes):
            return layout.shape_of(self.rank or 0) or ()
        return layout.shape

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return prod(self.shape) * self.tensor.itemsize


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``[start, stop)`` of a leaf in row-major order."""

    leaf: Leaf
    """Of what."""
    start: int
    """First element."""
    stop: int
    """One past the last."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return (self.stop - self.start) * self.leaf.tensor.itemsize

    @property
    def is_last(self) -> bool:
        """Whether no part of the leaf follows."""
        return self.stop * self.leaf.tensor.itemsize == self.leaf.nbytes


def list_leaves(plan: Plan, names: Iterable[str], *, per_rank: bool) -> list[Leaf]:
    """The leaves of the tensors called ``names``, in the order of the rank files; those of single ranks if ``per_rank``."""
    wanted = set(names)
    leaves = []
    for tensor in plan.tensors:
        if tensor.name not in wanted:
            continue
        if not isinstance(tensor.layout, PerRankShapes):
            leaves.append(Leaf(tensor))
        elif per_rank:
            leaves += [Leaf(tensor, rank) for rank in range(plan.world_size) if tensor.layout.shape_of(rank) is not None]
    return leaves


def cut_batches(leaves: Iterable[Leaf], memory: int) -> Iterator[list[Part]]:
    """Cut leaves into parts, and put as many parts together as fit in ``memory`` bytes.

    Every leaf has at least one part, an empty one too. A leaf that fits is never cut.
    """
    batch: list[Part] = []
    room = memory
    for leaf in leaves:
        numel, most = prod(leaf.shape), memory // leaf.tensor.itemsize
        for start in range(0, max(numel, 1), most):
            part = Part(leaf, start, min(start + most, numel))
            if _padded(part.nbytes) > room:
                yield batch
                batch, room = [], memory
            batch.append(part)
            room -= _padded(part.nbytes)
    if batch:
        yield batch


def check_memory(memory: int) -> int:
    """``memory`` as a number of bytes that batches can have; `ConfigError` when it is too small."""
    if memory < LEAST_MEMORY:
        raise ConfigError(f"memory={memory} bytes is less than {LEAST_MEMORY}, the least that tensors are read with")
    return memory - memory % _ALIGNMENT


class PartReader:
    """Reads batches of one checkpoint into one buffer, verified."""

    def __init__(self, stored: StoredCheckpoint, memory: int) -> None:
        self._plan = stored.checkpoint.plan
        self._files = CheckpointFiles(stored.store, stored.prefix, stored.checkpoint)
        self._memory = memory
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from storage so far."""
        return self._files.bytes_read

    def read(self, batch: Sequence[Part]) -> list[Bytes]:
        """The bytes of each part; they stay there until the next call. Raises `IntegrityError` and `StoreError`."""
        needed = sum(_padded(part.nbytes) for part in batch)
        if needed > len(self._buffer):
            self._buffer = torch.empty(needed, dtype=torch.uint8)
        wants, destinations, found = [], {}, []
        at = 0
        for key, part in enumerate(batch):
            tensor = part.leaf.tensor
            bits = replace(tensor, dtype=_BITS[tensor.itemsize])
            piece = Piece.flat(part.leaf.shape, part.start, part.stop)
            memory = self._buffer[at : at + part.nbytes]
            wants.append(Want(key, bits, piece, part.leaf.rank))
            destinations[key] = Destination(memory.view(getattr(torch, bits.dtype)).view(piece.shape), piece)
            found.append(memory.numpy())
            at += _padded(part.nbytes)
        read_into(self._files, plan_reads(self._plan, wants), destinations, workers=WORKERS)
        return found

    def close(self) -> None:
        """Close what is open."""
        self._files.close()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _padded(nbytes: int) -> int:
    """Parts start at multiples of 16 bytes, so that they can be viewed as any dtype."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
