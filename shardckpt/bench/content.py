# SPDX-License-Identifier: Apache-2.0
"""Random-looking content that follows from a tensor's name and an element's place in the whole tensor.

Every rank can make its part of it, and check any other part, without a second copy: what a load has put into a shard of any
shape is right if, and only if, each element is the one that belongs at its global position.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ..layout import row_major_strides

_SLAB = 1 << 18
"""Elements that are made in one go; they stay in cache."""

Bits = npt.NDArray[np.uint32]


def fill(name: str, data: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> None:
    """Give ``data``, the part at ``offset`` of the float32 tensor ``name`` of global ``shape``, its content."""
    for found, wanted in _slabs(name, data, shape, offset):
        found[...] = wanted


def count_wrong(name: str, data: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> int:
    """Number of elements of ``data`` that do not have, bit for bit, what `fill` would give them."""
    return sum(int(np.count_nonzero(found != wanted)) for found, wanted in _slabs(name, data, shape, offset))


def poison(data: torch.Tensor) -> None:
    """Overwrite ``data``, so that what is right afterwards was loaded."""
    data.fill_(float("nan"))


def _slabs(name: str, data: torch.Tensor, shape: Sequence[int], offset: Sequence[int]) -> Iterator[tuple[Bits, Bits]]:
    """(bits as they are, bits as they should be) of parts of ``data``; the first is a view of it."""
    if data.dtype != torch.float32:
        raise TypeError(f"{name!r} is {data.dtype}; benchmarks hold float32 only")
    if not data.numel():
        return
    bits: Bits = np.atleast_1d(data.detach().numpy()).view(np.uint32)
    strides = row_major_strides(tuple(shape)) or (1,)
    starts = tuple(offset) or (0,)
    seed = zlib.crc32(name.encode())
    rows = max(1, _SLAB // (bits.size // bits.shape[0]))
    for low in range(0, bits.shape[0], rows):
        found = bits[low : low + rows]
        position = np.full((), seed, dtype=np.uint32)
        for dim, (stride, start) in enumerate(zip(strides, starts, strict=True)):
            first = start + (low if dim == 0 else 0)
            steps = np.arange(first, first + found.shape[dim], dtype=np.int64) * stride
            position = position + steps.astype(np.uint32).reshape(-1, *(1,) * (found.ndim - dim - 1))
        yield found, _scramble(position)


def _scramble(bits: Bits) -> Bits:
    """Make neighbours unlike each other, in place (Murmur3's finalizer)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    bits ^= bits >> np.uint32(16)
    return bits
