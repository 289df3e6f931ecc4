# SPDX-License-Identifier: Apache-2.0
"""Stored tensors as streams of bytes in their global row-major order, whatever layout they were saved in.

Tensors are read in batches of parts that fit in a fixed amount of memory. What is read are whole digest blocks, so a batch
should need long ranges of few files. One tensor after the other does when there are few ranks. When there are many, each of
them has less than a block of most tensors; then all tensors are read in step, the first n-th of each, the next n-th, and so
on (`choose_rounds`): of tensors that are sharded on their first dimension, that is one file after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from shardckpt.errors import ConfigError
from shardckpt.layout import Ints, MeshLayout, PerRankShapes, Piece
from shardckpt.plan import Plan, PlannedTensor
from shardckpt.read import CheckpointFiles, Destination, read_into
from shardckpt.reshard import Want, plan_reads

from .stored import WORKERS, StoredCheckpoint

MEMORY = 256 << 20
"""Bytes that are held at once, unless the caller says otherwise."""
LEAST_MEMORY = 1 << 20
_ALIGNMENT = 16
_TRIED_BATCHES = 4
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

    number: int
    """Position of the leaf in the list of those that are read."""
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

    def want(self, key: int) -> Want:
        """The part as something to read; its elements as integers of their size."""
        tensor = self.leaf.tensor
        bits = replace(tensor, dtype=_BITS[tensor.itemsize])
        return Want(key, bits, Piece.flat(self.leaf.shape, self.start, self.stop), self.leaf.rank)


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


def cut_batches(leaves: Sequence[Leaf], memory: int, rounds: int = 1, first: int = 0) -> Iterator[list[Part]]:
    """Cut leaves into parts, and put as many parts together as fit in ``memory`` bytes.

    Goes over all leaves ``rounds`` times, each time over the next part of each, from round number ``first`` on. The parts of
    a leaf come in order; an empty leaf has one part.
    """
    batch: list[Part] = []
    room = memory
    for turn in range(first, rounds):
        for number, leaf in enumerate(leaves):
            for part in _cut(number, leaf, memory, turn, rounds):
                if _padded(part.nbytes) > room:
                    yield batch
                    batch, room = [], memory
                batch.append(part)
                room -= _padded(part.nbytes)
    if batch:
        yield batch


def _cut(number: int, leaf: Leaf, memory: int, turn: int, rounds: int) -> Iterator[Part]:
    numel = prod(leaf.shape)
    low, high = _window(leaf, numel, turn, rounds)
    if not numel and not turn:
        yield Part(number, leaf, 0, 0)
    most = memory // leaf.tensor.itemsize
    for start in range(low, high, most):
        yield Part(number, leaf, start, min(start + most, high))


def _window(leaf: Leaf, numel: int, turn: int, rounds: int) -> tuple[int, int]:
    """The elements of a leaf that belong to a round."""
    if leaf.rank is not None:
        return (0, numel) if turn == leaf.rank % rounds else (0, 0)
    rows = numel
    if isinstance(leaf.tensor.layout, MeshLayout) and leaf.tensor.writers[1] == 1:
        # as torch cuts tensors: into whole rows
        rows = leaf.shape[0] if leaf.shape else 1
    step = -(-rows // rounds) * (numel // max(rows, 1))
    return min(turn * step, numel), min((turn + 1) * step, numel)


def choose_rounds(sides: Sequence[tuple[Plan, Sequence[Leaf]]], memory: int) -> int:
    """In how many rounds to read ``leaves``, so that the least is read; they are the same on each side but for their layout.

    Tried on a few batches; a number of rounds that fits a layout is the number of parts that a mesh cuts tensors into.
    """
    leaves = sides[0][1]
    total = sum(leaf.nbytes for leaf in leaves)
    if total <= memory:
        return 1
    choices = {1}
    for plan, _ in sides:
        meshes = {tensor.layout.mesh.shape for tensor in plan.tensors if isinstance(tensor.layout, MeshLayout)}
        choices |= {plan.world_size, *(prod(shape[:n]) for shape in meshes for n in range(1, len(shape) + 1))}

    def cost(rounds: int) -> float:
        batches = list(islice(cut_batches(leaves, memory, rounds, rounds // 2), _TRIED_BATCHES))
        needed = sum(part.nbytes for batch in batches for part in batch)
        reads = (
            plan_reads(plan, [replace(part, leaf=own[part.number]).want(key) for key, part in enumerate(batch)])
            for plan, own in sides
            for batch in batches
        )
        return sum(file.nbytes for files in reads for file in files) / max(needed, 1)

    # parts of less than a quarter of the memory are no use, and cost time each
    return min(sorted({min(rounds, max(1, 4 * total // memory)) for rounds in choices}), key=cost)


def check_memory(memory: int) -> int:
    """``memory`` as a number of bytes that batches can have; `ConfigError` when it is too small."""
    if memory < LEAST_MEMORY:
        raise ConfigError(f"memory={memory} bytes is less than {LEAST_MEMORY}, the least that tensors are read with")
    return memory - memory % _ALIGNMENT


class PartReader:
    """Reads batches of one checkpoint into one buffer, verified."""

    def __init__(self, stored: StoredCheckpoint) -> None:
        self._plan = stored.checkpoint.plan
        self._files = CheckpointFiles(stored.store, stored.prefix, stored.checkpoint)
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
        wants = [part.want(key) for key, part in enumerate(batch)]
        destinations, found = {}, []
        at = 0
        for part, want in zip(batch, wants, strict=True):
            memory = self._buffer[at : at + part.nbytes]
            typed = memory.view(getattr(torch, want.tensor.dtype))
            destinations[want.key] = Destination(typed.view(want.piece.shape), want.piece)
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
