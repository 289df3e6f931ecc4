# SPDX-License-Identifier: Apache-2.0
"""How ZeRO cuts the parameters of a group over ranks (DeepSpeed 0.19, ``zero/stage_1_and_2.py`` and ``zero/stage3.py``).

Stages 1 and 2: parameters one after the other, padded to a multiple of twice the world size, cut into equal parts. Stage 3:
each parameter cut into ceil(numel / world size) elements; a rank's parts of the parameters of a sub-group one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from math import prod

from shardckpt.maintain.parts import Leaf

from .content import Content, Window, Zeros


def numel(leaf: Leaf) -> int:
    """Number of elements."""
    return prod(leaf.shape)


def partition_size(leaves: Iterable[Leaf], world_size: int) -> int:
    """Elements of each rank's part of a group at stages 1 and 2."""
    total = sum(map(numel, leaves))
    return -(-total // (2 * world_size)) * 2


def fragments(leaves: Sequence[Leaf], rank: int, size: int) -> Iterator[tuple[int, Window]]:
    """(position in the group, elements) of what a rank's part of ``size`` elements holds at stages 1 and 2."""
    offsets = accumulate(map(numel, leaves), initial=0)
    for at, (leaf, offset) in enumerate(zip(leaves, offsets, strict=False)):
        start, stop = max(rank * size - offset, 0), min((rank + 1) * size - offset, numel(leaf))
        if start < stop:
            yield at, Window(leaf, start, stop)


def partition(leaves: Sequence[Leaf], rank: int, size: int, dtype: str, *, padded: bool) -> Content:
    """A rank's part of a group at stages 1 and 2, with or without the padding at its end."""
    spans = tuple(window for _, window in fragments(leaves, rank, size))
    filled = sum(span.numel for span in spans)
    if not padded:
        return Content(dtype, (filled,), spans)
    return Content(dtype, (size,), (*spans, Zeros(size - filled)))


def share_size(leaf: Leaf, world_size: int) -> int:
    """Elements of each rank's part of a parameter at stage 3."""
    return -(-numel(leaf) // world_size)


def shares(leaves: Iterable[Leaf], rank: int, world_size: int, dtype: str) -> Content:
    """A rank's parts of parameters at stage 3, each padded at its own end."""
    spans: list[Window | Zeros] = []
    for leaf in leaves:
        size = share_size(leaf, world_size)
        start, stop = (min(each * size, numel(leaf)) for each in (rank, rank + 1))
        spans += [Window(leaf, start, stop), Zeros(size - (stop - start))]
    return Content(dtype, (sum(span.numel for span in spans),), tuple(spans))


def sub_groups(leaves: Sequence[Leaf], world_size: int, most: int) -> list[slice]:
    """The sub-groups of a group at stage 3: each ends with the parameter that makes it ``most`` elements per rank, or more."""
    found, first, size = [], 0, 0
    for at, leaf in enumerate(leaves):
        size += share_size(leaf, world_size)
        if size >= most or at == len(leaves) - 1:
            found.append(slice(first, at + 1))
            first, size = at + 1, 0
    return found


def round_robin(names: Sequence[str], world_size: int) -> list[str]:
    """The order of a group under ``round_robin_gradients``: every n-th parameter, from the first on, from the second on, ..."""
    return [name for first in range(world_size) for name in names[first::world_size]]
