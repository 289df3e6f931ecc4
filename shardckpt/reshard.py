# SPDX-License-Identifier: Apache-2.0
"""Which stored bytes a rank needs, whatever layout they were saved in: pure arithmetic on pieces.

A `Segment` is a stored piece that shares elements with a wanted one. From a file's segments follow the byte ranges that have
to be read, widened to whole digest blocks, and from each range the parts of segments that it holds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .layout import Piece, intersect
from .plan import Plan, PlannedTensor

GAP_BLOCKS = 2
"""A gap between needed runs that is at least this many digest blocks is skipped, not read."""


@dataclass(frozen=True, slots=True)
class Want:
    """What one rank wants of one stored tensor."""

    key: int
    """Number of the want, for whoever places the data."""
    tensor: PlannedTensor
    """The stored tensor."""
    piece: Piece
    """Which elements, in the order of the target's memory."""
    rank: int | None = None
    """For a per-rank tensor, whose."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stored piece that has something of what is wanted."""

    file: int
    """The rank whose file holds it."""
    offset: int
    """First byte in the data region of that file."""
    source: Piece
    """What is stored there."""
    want: Want
    """What is wanted of it."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.source.numel * self.want.tensor.itemsize

    @property
    def stop(self) -> int:
        """One past its last byte in the data region."""
        return self.offset + self.nbytes

    def part(self, start: int, stop: int) -> Piece:
        """The elements that lie in bytes ``[start, stop)`` of the data region."""
        size = self.want.tensor.itemsize
        return self.source.window((start - self.offset) // size, (stop - self.offset) // size)


Extent = tuple[int, int]
"""Bytes ``[start, stop)`` of a data region."""


@dataclass(frozen=True, slots=True)
class FileReads:
    """All that is to be read of one file."""

    file: int
    """The rank whose file it is."""
    segments: tuple[Segment, ...]
    """By offset."""
    extents: tuple[Extent, ...]
    """Disjoint, by offset, at block borders (or at the end of the data region)."""

    @property
    def nbytes(self) -> int:
        """Bytes that will be read."""
        return sum(stop - start for start, stop in self.extents)

    def segments_in(self, start: int, stop: int) -> Iterator[tuple[Segment, int, int]]:
        """Segments that lie in a byte range, each with the part ``[low, high)`` of the range that is theirs."""
        at = bisect_left(self.segments, start + 1, key=lambda segment: segment.stop)
        for segment in self.segments[at:]:
            if segment.offset >= stop:
                # several wants may share a stored piece, so offsets repeat but never fall
                break
            low, high = max(start, segment.offset), min(stop, segment.stop)
            if low < high:
                yield segment, low, high


def plan_reads(plan: Plan, wants: Iterable[Want]) -> list[FileReads]:
    """What has to be read of each file to satisfy ``wants``, by file."""
    by_file: dict[int, list[Segment]] = {}
    for want in wants:
        for file, source in _sources(want):
            offset = plan.offsets(file)[want.tensor.name]
            by_file.setdefault(file, []).append(Segment(file, offset, source, want))
    reads = []
    for file in sorted(by_file):
        segments = sorted(by_file[file], key=lambda segment: segment.offset)
        extents = _extents(segments, plan.block_size, int(plan.bytes_by_rank[file]))
        reads.append(FileReads(file, tuple(segments), extents))
    return reads


def _sources(want: Want) -> Iterator[tuple[int, Piece]]:
    if want.rank is None:
        yield from want.tensor.stored_over(want.piece)
        return
    stored = want.tensor.stored(want.rank)
    if stored is not None and stored.numel:
        yield want.rank, stored


def _extents(segments: Sequence[Segment], block_size: int, data_bytes: int) -> tuple[Extent, ...]:
    extents: list[Extent] = []
    for start, stop in sorted(run for segment in segments for run in _runs(segment, GAP_BLOCKS * block_size)):
        start, stop = start // block_size * block_size, min(-(-stop // block_size) * block_size, data_bytes)
        if extents and start <= extents[-1][1]:
            extents[-1] = (extents[-1][0], max(extents[-1][1], stop))
        else:
            extents.append((start, stop))
    return tuple(extents)


def _runs(segment: Segment, gap: int) -> Iterator[Extent]:
    """Byte ranges of a segment that hold what is wanted; gaps smaller than ``gap`` bytes are part of a range."""
    size = segment.want.tensor.itemsize
    strides = segment.source.grid_strides
    for copy in intersect(segment.source, segment.want.piece):
        starts = [segment.offset + copy.source_position * size]
        length = size
        dims = sorted(zip(strides, copy.sizes, strict=True))
        for at, (stride, count) in enumerate(dims):
            if count > 1 and stride * size - length >= gap:
                for outer, times in reversed(dims[at:]):
                    starts = [start + step * outer * size for start in starts for step in range(times)]
                break
            length += (count - 1) * stride * size
        for start in starts:
            yield start, start + length
