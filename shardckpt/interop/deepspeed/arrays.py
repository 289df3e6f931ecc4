# SPDX-License-Identifier: Apache-2.0
"""Tensors as they are wanted, with real names and shapes, and where each of their elements lies in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from ...errors import InvalidForeignCheckpoint, UnsupportedForeignCheckpoint
from ...layout import ITEMSIZE, Ints
from .archive import Record
from .classes import TensorRef

_MOST_RUNS = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """Elements of one tensor that lie together in a file."""

    record: Record
    """The memory that they lie in."""
    offset: int
    """Where they begin in it, in bytes."""
    start: int
    """First element of the raveled tensor."""
    stop: int
    """Behind the last one."""


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """One tensor."""

    dtype: str
    """Name of the element type."""
    shape: Ints
    """Sizes."""
    parts: tuple[Part, ...]
    """By start; disjoint; together they are the whole tensor."""


def array_of(name: str, tensor: TensorRef) -> Array:
    """A tensor that stands in a file as it is. Raises `UnsupportedForeignCheckpoint` for one that is too scattered."""
    size = ITEMSIZE[tensor.dtype]
    parts: list[Part] = []
    for at, (first, count) in enumerate(_runs(tensor)):
        if at == _MOST_RUNS:
            raise UnsupportedForeignCheckpoint(
                f"{tensor.record.file}: the elements of {name!r} do not lie in order (strides {list(tensor.strides)}, as "
                "channels_last makes them). Load the file with torch.load, make the tensor contiguous, and save it again",
                name=name,
            )
        start = parts[-1].stop if parts else 0
        parts.append(Part(tensor.record, first * size, start, start + count))
    return Array(tensor.dtype, tensor.shape, tuple(parts))


def _runs(tensor: TensorRef) -> Iterator[tuple[int, int]]:
    """(first element of the storage, number of elements) of what lies together, in order."""
    if not tensor.numel:
        return
    length, dim = 1, len(tensor.shape)
    while dim and (tensor.shape[dim - 1] == 1 or tensor.strides[dim - 1] == length):
        dim -= 1
        length *= tensor.shape[dim]
    for number in range(prod(tensor.shape[:dim])):
        at = tensor.offset
        for size, stride in zip(tensor.shape[:dim][::-1], tensor.strides[:dim][::-1], strict=True):
            number, index = divmod(number, size)
            at += index * stride
        yield at, length


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements of a parameter, in the flat tensors of one rank."""

    rank: int
    """Whose."""
    group: int
    """Number of the flat tensor."""
    local: int
    """First element in it."""
    start: int
    """First element of the raveled parameter."""
    count: int
    """Number of elements."""


def assemble(name: str, shape: Ints, found: Sequence[tuple[Slice, TensorRef]]) -> Array:
    """A parameter, or state of its shape, from slices of flat tensors, which are in order."""
    parts: list[Part] = []
    at, dtypes = 0, {flat.dtype for _, flat in found}
    for cut, flat in found:
        if cut.local + cut.count > flat.numel or cut.start != at or flat.strides != (1,):
            raise InvalidForeignCheckpoint(
                f"{flat.record.file}: elements [{cut.local}, {cut.local + cut.count}) of a flat tensor of {flat.numel} were "
                f"to be a part of {name!r}: the files do not fit together. Import another tag",
                name=name,
            )
        size = ITEMSIZE[flat.dtype]
        parts.append(Part(flat.record, (flat.offset + cut.local) * size, cut.start, cut.start + cut.count))
        at = cut.start + cut.count
    if at != prod(shape) or len(dtypes) > 1:
        raise InvalidForeignCheckpoint(
            f"{name!r}: the files have {at} elements of it (as {', '.join(sorted(dtypes))}), and its shape {list(shape)} "
            f"needs {prod(shape)}: files are missing or of different saves. Import another tag",
            name=name,
            wanted=prod(shape),
            got=at,
        )
    return Array(dtypes.pop() if dtypes else "float32", shape, tuple(parts))
