# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of boxes: hyper-rectangles of element indices, and windows of a raveled array cut into boxes.

Everything here is plain integers. A shape, an offset or a size is a tuple with one int per dimension; a 0-d array has ``()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Ints = tuple[int, ...]


def row_major_strides(shape: Ints) -> Ints:
    """Strides, in elements, of a dense array of ``shape`` whose last dimension varies fastest."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def intersect_boxes(a_offsets: Ints, a_sizes: Ints, b_offsets: Ints, b_sizes: Ints) -> tuple[Ints, Ints] | None:
    """Offsets and sizes of the common part of two boxes, or None when they share no element."""
    offsets, sizes = [], []
    for a_start, a_size, b_start, b_size in zip(a_offsets, a_sizes, b_offsets, b_sizes, strict=True):
        start = max(a_start, b_start)
        stop = min(a_start + a_size, b_start + b_size)
        if stop <= start:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return tuple(offsets), tuple(sizes)


def window_boxes(shape: Ints, start: int, stop: int) -> Iterator[tuple[Ints, Ints]]:
    """Cut elements ``[start, stop)`` of a raveled array of ``shape`` into boxes, in ravel order.

    Yields (offsets, sizes); each box is contiguous in the ravel. There are at most ``2 * ndim - 1`` of them: a ragged head
    and a ragged tail per dimension, and whole rows between them.
    """
    if stop <= start:
        return
    if start == 0 and stop == prod(shape):
        yield (0,) * len(shape), shape
        return
    row = prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    if first == last:
        for offsets, sizes in window_boxes(shape[1:], start - first * row, stop - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    if start > first * row:
        for offsets, sizes in window_boxes(shape[1:], start - first * row, row):
            yield (first, *offsets), (1, *sizes)
        first += 1
    whole = stop // row
    if whole > first:
        yield (first, *(0,) * (len(shape) - 1)), (whole - first, *shape[1:])
    if stop > whole * row:
        for offsets, sizes in window_boxes(shape[1:], 0, stop - whole * row):
            yield (whole, *offsets), (1, *sizes)
