# SPDX-License-Identifier: Apache-2.0
"""Read each stored byte on one rank only, and pass it on to the ranks that want it.

Which rank reads a byte, and in which turn, is arithmetic on sizes that every rank knows (`Shares`), so nobody asks anybody.
A turn is: read and verify one chunk, cut out what each rank wants of it, exchange (all-to-all), place. A rank whose read
fails keeps taking its turns, so that no other rank hangs, and raises at the end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from .buffer import Buffer
from .layout import GlobalLayout, MeshLayout, PerRankShapes, Piece, cells_over, intersect
from .plan import Plan, PlannedTensor
from .read import CheckpointFiles, Chunk, Destination, put
from .reshard import Extent, FileReads, Segment, Want, plan_reads

TURN_BYTES = 32 << 20
"""Bytes; upper bound of what a rank sends in one turn, if a digest block allows it."""
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class SharedWant:
    """One tensor that ranks want, and how it is spread over them."""

    key: int
    """Number of the want, the same on all ranks."""
    tensor: PlannedTensor
    """The stored tensor."""
    layout: GlobalLayout
    """What each rank wants of it."""


class Shares:
    """Who reads which bytes in which turn: all data regions in a row, in equal shares, in chunks inside files."""

    def __init__(self, plan: Plan, world_size: int, chunk: int) -> None:
        self.chunk = chunk
        """Bytes per turn, a multiple of the block size."""
        chunks_by_file = -(-plan.bytes_by_rank // chunk)
        self._first_chunk: list[int] = [0, *chunks_by_file.cumsum().tolist()]
        self._bytes: list[int] = plan.bytes_by_rank.tolist()
        self.turns: int = max(1, -(-self._first_chunk[-1] // world_size))
        """Turns that it takes."""

    def reader_of(self, file: int, position: int) -> tuple[int, int]:
        """(rank, turn) in which byte ``position`` of the data region of ``file`` is read."""
        return divmod(self._first_chunk[file] + position // self.chunk, self.turns)

    def chunk_of(self, rank: int, turn: int) -> tuple[int, int, int] | None:
        """(file, start, stop) of the bytes that ``rank`` reads in ``turn``; None when it has nothing to do."""
        number = rank * self.turns + turn
        if number >= self._first_chunk[-1]:
            return None
        file = bisect_right(self._first_chunk, number) - 1
        start = (number - self._first_chunk[file]) * self.chunk
        return file, start, min(start + self.chunk, self._bytes[file])


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What one rank wants of a part of a stored piece."""

    low: int
    """Where the part starts in the data region, in bytes."""
    part: Piece
    """The elements that are read."""
    want: SharedWant
    """What is wanted."""
    piece: Piece
    """The elements that the rank which gets the parcel holds of it."""

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(prod(copy.sizes) for copy in intersect(self.part, self.piece)) * self.want.tensor.itemsize


class SharedRead:
    """One load in which data is read once and passed on."""

    def __init__(
        self,
        files: CheckpointFiles,
        plan: Plan,
        wants: Sequence[SharedWant],
        destinations: Mapping[int, Destination],
        group: dist.ProcessGroup | None,
    ) -> None:
        self._files = files
        self._plan = plan
        self._wants = wants
        self._wants_by_name: dict[str, list[SharedWant]] = {}
        for want in wants:
            self._wants_by_name.setdefault(want.tensor.name, []).append(want)
        self._destinations = destinations
        self._group = group
        self._rank = dist.get_rank(group)
        self._world_size = dist.get_world_size(group)
        replicas = max((w.layout.replicas for w in wants if isinstance(w.layout, MeshLayout)), default=1)
        blocks = max(1, min(files.chunk_size, TURN_BYTES // replicas) // plan.block_size)
        self._shares = Shares(plan, self._world_size, blocks * plan.block_size)

    def run(self) -> None:
        """Take all turns; raises this rank's first error after the last one."""
        incoming = self._plan_incoming()
        error: Exception | None = None
        buffers = [Buffer(self._shares.chunk) for _ in range(2)]
        turns = [self._plan_turn(turn) for turn in range(self._shares.turns)]
        self._files.expect(part for chunk in turns if chunk is not None for part in _parts(chunk))
        with ThreadPoolExecutor(1, thread_name_prefix="shardckpt-read") as thread:
            ahead = thread.submit(self._read, turns[0], buffers[0])
            for turn, chunk in enumerate(turns):
                buffer = buffers[turn % 2]
                error = error or ahead.exception()  # type: ignore[assignment]  # the thread raises no BaseException
                if turn + 1 < len(turns):
                    ahead = thread.submit(self._read, turns[turn + 1], buffers[(turn + 1) % 2])
                expected = [incoming.get((sender, turn), []) for sender in range(self._world_size)]
                received = self._exchange(self._plan_outgoing(chunk), expected, chunk, buffer, is_good=error is None)
                if error is None:
                    with self._files.timings.measure("place", len(received)):
                        self._unpack(received, expected)
        if error is not None:
            raise error

    def _plan_turn(self, turn: int) -> Chunk | None:
        """This rank's chunk of a turn, narrowed to what anybody wants; None when nobody wants any of it."""
        where = self._shares.chunk_of(self._rank, turn)
        if where is None:
            return None
        file, start, stop = where
        inside = [
            p
            for p in self._plan.file_pieces(file)
            if p.nbytes and p.offset < stop and p.offset + p.nbytes > start and p.tensor.name in self._wants_by_name
        ]
        if not inside:
            return None
        extents: list[Extent] = []
        block = self._plan.block_size
        for piece in inside:
            low = max(start, piece.offset // block * block)
            high = min(stop, -(-(piece.offset + piece.nbytes) // block) * block)
            if extents and low <= extents[-1][1]:
                low, high = extents.pop()[0], high
            extents.append((low, high))
        segments = tuple(
            Segment(file, p.offset, p.piece, Want(want.key, p.tensor, p.piece))
            for p in inside
            for want in self._wants_by_name[p.tensor.name]
        )
        return Chunk(FileReads(file, segments, tuple(extents)), extents[0][0], extents[-1][1])

    def _read(self, chunk: Chunk | None, buffer: Buffer) -> None:
        """Fill the buffer as the chunk lies in the file, with holes where nobody wants anything."""
        if chunk is not None:
            for part in _parts(chunk):
                self._files.read_verified(part, buffer.bytes[part.start - chunk.start :])

    def _plan_outgoing(self, chunk: Chunk | None) -> list[list[_Parcel]]:
        """What this rank sends to each rank of a chunk, in the order of the file."""
        parcels: list[list[_Parcel]] = [[] for _ in range(self._world_size)]
        if chunk is not None:
            for segment, low, high in chunk.reads.segments_in(chunk.start, chunk.stop):
                part = segment.part(low, high)
                want = self._wants[segment.want.key]
                for rank, piece in _wanted_over(want.layout, part):
                    parcels[rank].append(_Parcel(low, part, want, piece))
        return parcels

    def _plan_incoming(self) -> dict[tuple[int, int], list[_Parcel]]:
        """What this rank gets, by (sender, turn), in the order in which the sender packs it."""
        mine = [Want(want.key, want.tensor, piece) for want in self._wants if (piece := want.layout.piece(self._rank))]
        incoming: dict[tuple[int, int], list[_Parcel]] = {}
        chunk = self._shares.chunk
        for reads in plan_reads(self._plan, [want for want in mine if want.piece.numel]):
            for segment in reads.segments:
                for start in range(segment.offset // chunk * chunk, segment.stop, chunk):
                    low, high = max(start, segment.offset), min(start + chunk, segment.stop)
                    parcel = _Parcel(low, segment.part(low, high), self._wants[segment.want.key], segment.want.piece)
                    incoming.setdefault(self._shares.reader_of(reads.file, low), []).append(parcel)
        for parcels in incoming.values():
            parcels.sort(key=lambda parcel: (parcel.low, parcel.want.key))
        return incoming

    def _exchange(
        self,
        outgoing: list[list[_Parcel]],
        expected: list[list[_Parcel]],
        chunk: Chunk | None,
        buffer: Buffer,
        *,
        is_good: bool,
    ) -> torch.Tensor:
        """What all ranks send to this one. What a rank sends starts with whether its read was good."""
        send_sizes, receive_sizes = [_size(parcels) for parcels in outgoing], [_size(parcels) for parcels in expected]
        send = torch.empty(sum(send_sizes), dtype=torch.uint8)
        received = torch.empty(sum(receive_sizes), dtype=torch.uint8)
        at = 0
        with self._files.timings.measure("exchange", len(send)):
            for parcels, size in zip(outgoing, send_sizes, strict=True):
                send[at] = is_good
                position = at + _ALIGNMENT
                for parcel in parcels:
                    position = _pack(parcel, chunk, buffer, send, position)
                at += size
            dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self._group)
        return received

    def _unpack(self, received: torch.Tensor, expected: list[list[_Parcel]]) -> None:
        start = 0
        for parcels in expected:
            at = start + _ALIGNMENT
            for parcel in parcels if received[start] else ():
                dtype = getattr(torch, parcel.want.tensor.dtype)
                for copy in intersect(parcel.part, parcel.piece):
                    stop = at + prod(copy.sizes) * dtype.itemsize
                    elements = received[at:stop].view(dtype).view(copy.sizes)
                    destination = self._destinations[parcel.want.key]
                    self._files.note_filled(destination)
                    put(destination, copy, elements)
                    at = stop
            start += _size(parcels)


def _parts(chunk: Chunk) -> Iterator[Chunk]:
    """What is read of a chunk."""
    for start, stop in chunk.reads.extents:
        yield Chunk(chunk.reads, start, stop)


def _pack(parcel: _Parcel, chunk: Chunk | None, buffer: Buffer, send: torch.Tensor, position: int) -> int:
    """Copy a parcel's elements out of what was read to ``position`` of ``send``; returns where the next one goes."""
    dtype = getattr(torch, parcel.want.tensor.dtype)
    start = parcel.low - (chunk.start if chunk is not None else 0)
    stored = buffer.tensor[start : start + parcel.part.numel * dtype.itemsize].view(dtype)
    for copy in intersect(parcel.part, parcel.piece):
        stop = position + prod(copy.sizes) * dtype.itemsize
        view = stored.as_strided(copy.sizes, parcel.part.grid_strides, stored.storage_offset() + copy.source_position)
        send[position:stop].view(dtype).view(copy.sizes).copy_(view)
        position = stop
    return position


def _size(parcels: Sequence[_Parcel]) -> int:
    """Bytes that one rank sends to another: a status, the parcels, and padding, so that all can be viewed as any dtype."""
    return _ALIGNMENT + -(-sum(parcel.nbytes for parcel in parcels) // _ALIGNMENT) * _ALIGNMENT


def _wanted_over(layout: GlobalLayout, part: Piece) -> Iterator[tuple[int, Piece]]:
    """(rank, piece) for each rank that wants something of ``part``."""
    if isinstance(layout, PerRankShapes):
        return
    for cell in cells_over(layout, part):
        for rank in cell.ranks:
            yield rank, cell.piece
