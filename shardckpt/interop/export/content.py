# SPDX-License-Identifier: Apache-2.0
"""Elements of stored tensors as streams of bytes, in any other order, cut, padded and in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from shardckpt.adapters.dtypes import dtype_named
from shardckpt.errors import ExportRefused
from shardckpt.layout import ITEMSIZE, Ints
from shardckpt.maintain.parts import Bytes, Leaf, Part, PartReader
from shardckpt.maintain.stored import StoredCheckpoint

MEMORY = 32 << 20
"""Bytes of tensors that are held at once; reading takes up to four buffers of 4 to 16 MiB beside them."""
_STEP = 4 << 20
"""Bytes that are converted, or filled with zeros, at once."""


@dataclass(frozen=True, slots=True)
class Window:
    """Elements ``[start, stop)`` of a stored tensor, in row-major order."""

    leaf: Leaf
    """Of what."""
    start: int
    """First element."""
    stop: int
    """One past the last."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Zeros:
    """Elements that no tensor has, such as padding."""

    numel: int
    """Number of elements."""


@dataclass(frozen=True, eq=False)
class Content:
    """A tensor of an exported file. Two places that hold one and the same object share its memory when the file is loaded."""

    dtype: str
    """Name of the element type in the exported file."""
    shape: Ints
    """Its shape there."""
    spans: tuple[Window | Zeros, ...]
    """Its elements in row-major order."""

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the exported file."""
        return self.numel * ITEMSIZE[self.dtype]


def whole(leaf: Leaf, dtype: str | None = None) -> Content:
    """All of a stored tensor, converted to ``dtype`` if one is given."""
    return Content(dtype or leaf.tensor.dtype, leaf.shape, (Window(leaf, 0, prod(leaf.shape)),))


def is_floating(dtype: str) -> bool:
    """Whether elements of ``dtype`` are real floating-point numbers."""
    return dtype_named(dtype).is_floating_point


class ContentReader:
    """Reads contents of one checkpoint, in the order in which they are written, verified."""

    def __init__(self, stored: StoredCheckpoint, report: Callable[[int], None], memory: int = MEMORY) -> None:
        self._parts = PartReader(stored)
        self._memory = memory
        self._report = report

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from storage so far."""
        return self._parts.bytes_read

    def stream(self, contents: Sequence[Content]) -> Iterator[tuple[int, Any]]:
        """(number of the content, some of its bytes), in order; at least once for each content.

        Bytes are good until the next are asked for. Raises `IntegrityError`, `StoreError`, and `ExportRefused` when a number
        is beyond the range of the dtype that it is converted to.
        """
        batch: list[tuple[int, Content, Part | Zeros]] = []
        room = self._memory
        for number, content in enumerate(contents):
            batch.append((number, content, Zeros(0)))
            for piece in _cut(content, self._memory):
                size = piece.nbytes + 16 if isinstance(piece, Part) else 0
                if size > room and room < self._memory:
                    yield from self._read(batch)
                    batch, room = [], self._memory
                batch.append((number, content, piece))
                room -= size
        yield from self._read(batch)

    def small(self, leaves: Sequence[Leaf]) -> list[bytes]:
        """The whole bytes of small tensors."""
        parts = [Part(number, leaf, 0, prod(leaf.shape)) for number, leaf in enumerate(leaves)]
        return [data.tobytes() for data in self._parts.read(parts)]

    def _read(self, batch: Sequence[tuple[int, Content, Part | Zeros]]) -> Iterator[tuple[int, Any]]:
        found = iter(self._parts.read([piece for _, _, piece in batch if isinstance(piece, Part)]))
        for number, content, piece in batch:
            if isinstance(piece, Part):
                data = next(found)
                for some in _converted(data, piece.leaf, content.dtype):
                    self._report(some.nbytes)
                    yield number, some.data
            else:
                yield from ((number, some) for some in self._zeros(piece.numel * ITEMSIZE[content.dtype]))

    def _zeros(self, nbytes: int) -> Iterator[bytes]:
        yield b""
        for start in range(0, nbytes, _STEP):
            some = bytes(min(_STEP, nbytes - start))
            self._report(len(some))
            yield some

    def close(self) -> None:
        """Close what is open."""
        self._parts.close()

    def __enter__(self) -> ContentReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cut(content: Content, memory: int) -> Iterator[Part | Zeros]:
    for span in content.spans:
        if isinstance(span, Zeros):
            yield span
            continue
        most = memory // span.leaf.tensor.itemsize
        for start in range(span.start, span.stop, most):
            yield Part(0, span.leaf, start, min(start + most, span.stop))


def _converted(data: Bytes, leaf: Leaf, dtype: str) -> Iterator[Bytes]:
    if leaf.tensor.dtype == dtype or not data.nbytes:
        yield data
        return
    source, target = dtype_named(leaf.tensor.dtype), dtype_named(dtype)
    is_narrower = torch.finfo(target).max < torch.finfo(source).max
    for start in range(0, data.nbytes, _STEP):
        numbers = torch.from_numpy(data[start : start + _STEP]).view(source)
        converted = numbers.to(target)
        if is_narrower and not bool((converted.isfinite() | ~numbers.isfinite()).all()):
            raise ExportRefused(
                f"{leaf.tensor.name!r} has numbers that are beyond the range of {dtype}: choose another dtype",
                name=leaf.tensor.name,
                dtype=dtype,
            )
        yield np.asarray(converted.view(torch.uint8).numpy())
