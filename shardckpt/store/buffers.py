# SPDX-License-Identifier: Apache-2.0
"""Fills a list of buffers piece by piece, for readers whose source delivers what it likes."""

from __future__ import annotations


def skip(buffers: list[memoryview], first: int, count: int) -> int:
    """Drop ``count`` bytes from the front of ``buffers[first:]``, in place; return what is the first then."""
    while count and count >= buffers[first].nbytes:
        count -= buffers[first].nbytes
        first += 1
    if count:
        buffers[first] = buffers[first][count:]
    return first


def scatter(data: memoryview, buffers: list[memoryview], first: int) -> int:
    """Copy ``data`` to the front of ``buffers[first:]`` and drop what is filled, as `skip` does."""
    while data.nbytes:
        count = min(data.nbytes, buffers[first].nbytes)
        buffers[first][:count] = data[:count]
        data = data[count:]
        first = skip(buffers, first, count)
    return first
