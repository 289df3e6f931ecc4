# SPDX-License-Identifier: Apache-2.0
"""Read planned byte ranges, verify every block before any of it is used, and place what is wanted.

Chunks are independent of each other: a few threads each read one into a buffer, check its digests, and copy the wanted
elements to where they belong. Nothing that was not verified ever reaches a target.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .buffer import CHUNK, BufferPool
from .checksum import damaged_blocks, digest, digests_between
from .errors import (
    CheckpointError,
    CheckpointRemoved,
    ChecksumMismatch,
    IntegrityError,
    MissingFile,
    StoreError,
    TruncatedFile,
)
from .events import Timings
from .layout import Copy, Piece, intersect
from .manifest import MANIFEST_LIMIT, MANIFEST_NAME, manifest_digest
from .parity.rebuild import Rebuilder
from .reshard import FileReads
from .stage import as_bytes
from .store import FileReader, Store
from .validate import Checkpoint

logger = logging.getLogger("shardckpt")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A byte range of one file's data region that is read in one go; it starts at a block border."""

    reads: FileReads
    """The file, and what is wanted of it."""
    start: int
    """First byte in the data region."""
    stop: int
    """One past the last."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Memory that wanted elements go to."""

    data: torch.Tensor
    """This rank's tensor, of any device and strides; one-dimensional for a window."""
    piece: Piece
    """Which elements of the global tensor it holds."""
    name: str = ""
    """Of the target, if it is one of the caller's: to be told when it is left with a part of what it was to hold."""


def cut_chunks(reads: Iterable[FileReads], size: int) -> Iterator[Chunk]:
    """Cut the extents of all files into chunks of at most ``size`` bytes, a multiple of the block size."""
    for file in reads:
        for start, stop in file.extents:
            for at in range(start, stop, size):
                yield Chunk(file, at, min(at + size, stop))


def read_into(
    source: CheckpointFiles, reads: Sequence[FileReads], destinations: Mapping[int, Destination], *, workers: int
) -> None:
    """Read, verify and place all of ``reads``; ``destinations`` are by the keys of their wants.

    Raises `IntegrityError` and `StoreError`; what was placed before stays in the destinations, and no more chunks are begun.
    """
    pool = BufferPool(workers, source.chunk_size)
    failed = threading.Event()

    def job(chunk: Chunk) -> None:
        if not failed.is_set():
            try:
                read_and_place(chunk)
            except BaseException:
                failed.set()
                raise

    def read_and_place(chunk: Chunk) -> None:
        with pool.borrow() as buffer:
            source.read_verified(chunk, buffer.bytes)
            segments = list(chunk.reads.segments_in(chunk.start, chunk.stop))
            with source.timings.measure("place", sum(high - low for _, low, high in segments)):
                for segment, low, high in segments:
                    destination = destinations[segment.want.key]
                    source.note_filled(destination)
                    part = memoryview(buffer.bytes)[low - chunk.start : high - chunk.start]
                    place(part, segment.want.tensor.dtype, segment.part(low, high), destination)

    chunks = list(cut_chunks(reads, source.chunk_size))
    source.expect(chunks)
    with ThreadPoolExecutor(workers, thread_name_prefix="shardckpt-read") as threads:
        list(threads.map(job, chunks))


class CheckpointFiles:
    """The rank files of a checkpoint, opened when they are first needed, and read with verification."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        checkpoint: Checkpoint,
        timings: Timings | None = None,
        filled: set[str] | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._checkpoint = checkpoint
        self._readers: dict[int, FileReader] = {}
        self._left: dict[int, int] = {}
        self._lock = threading.Lock()
        self.chunk_size = max(CHUNK, checkpoint.plan.block_size)
        """Bytes per chunk."""
        self.rebuilt: set[str] = set()
        """Names of files of which something was rebuilt from parity, because it was missing or damaged."""
        self._rebuilder = Rebuilder(store, prefix, checkpoint)
        self._bytes_read = 0
        self._filled = set() if filled is None else filled
        self.timings = timings or Timings()
        """What was spent on reading and verifying; whoever places data adds to it."""

    @property
    def bytes_read(self) -> int:
        """Bytes of data that were read from storage so far, parity included."""
        return self._bytes_read + self._rebuilder.bytes_read

    def note_filled(self, destination: Destination) -> None:
        """Say that something is placed there now."""
        if destination.name:
            self._filled.add(destination.name)

    def expect(self, chunks: Iterable[Chunk]) -> None:
        """Count the chunks of each file, so that a file can be closed after its last one."""
        for chunk in chunks:
            self._left[chunk.reads.file] = self._left.get(chunk.reads.file, 0) + 1

    def read_verified(self, chunk: Chunk, into: memoryview) -> None:
        """Fill the start of ``into`` with a chunk; raises `ChecksumMismatch` when a block of it is not what was saved.

        What is missing or damaged is rebuilt, where there is a parity. The header is verified with the first bytes of data,
        so a load of all data verifies all headers.
        """
        file, block_size = chunk.reads.file, self._checkpoint.plan.block_size
        try:
            damaged = self._read(chunk, into[: chunk.stop - chunk.start])
        except (IntegrityError, StoreError) as error:
            if isinstance(error, MissingFile):
                self.require_committed(error)
            self._rebuild(file, chunk.start, chunk.stop, into, error)
        else:
            data = self._checkpoint.manifest.files[file].data
            for start in (chunk.start + number * block_size for number in damaged):
                stop = min(start + block_size, chunk.stop)
                changed = self._changed(file, data + start, data + stop)
                self._rebuild(file, start, stop, into[start - chunk.start :], changed)
        with self._lock:
            self._left[file] -= 1
            finished = None if self._left[file] else self._readers.pop(file, None)
        if finished is not None:
            finished.close()

    def _read(self, chunk: Chunk, data: memoryview) -> list[int]:
        """Fill ``data`` with a chunk; the numbers of blocks of it that are not what was saved."""
        file = chunk.reads.file
        record = self._checkpoint.manifest.files[file]
        # opened before memory is taken on the manifest's word: only a file of the right size gets past it
        reader = self._reader(file)
        # no load needs the header: it is read only where it costs no request of its own
        header = memoryview(bytearray(record.data if chunk.start == 0 else 0))
        with self.timings.measure("read", len(data)):
            reader.read_at(record.data + chunk.start - len(header), [header, data])
        if header and digest(header).hex() != record.header:
            raise self._changed(file, 0, record.data)
        block_size = self._checkpoint.plan.block_size
        wanted = digests_between(self._checkpoint.digests[file], chunk.start, chunk.stop, block_size)
        with self._lock:
            self._bytes_read += len(data)
        with self.timings.measure("verify", len(data)):
            return damaged_blocks(data, block_size, wanted)

    def _rebuild(self, file: int, start: int, stop: int, into: memoryview, error: CheckpointError) -> None:
        """Fill ``into`` with bytes ``[start, stop)`` of a data region from other files; raises ``error`` if that cannot be."""
        obstacle, is_rebuilt = None, False
        try:
            is_rebuilt = self._rebuilder.rebuild(file, start, stop, into)
        except CheckpointError as found:
            obstacle = found.message
        if not is_rebuilt:
            raise _unhelped(error, obstacle)
        name = f"{self._prefix}{self._checkpoint.manifest.files[file].name}"
        with self._lock:
            is_news = name not in self.rebuilt
            self.rebuilt.add(name)
        if is_news:
            logger.warning("rebuilt from parity, run shardckpt repair soon: %s", error)

    def require_sizes(self) -> None:
        """Raise unless all files are there with the sizes that the manifest says, by one listing, or can be rebuilt.

        Called before memory is taken on the manifest's word alone.
        """
        sizes = {entry.name: entry.size for entry in self._store.list(self._prefix.rstrip("/"))}
        for file, record in enumerate(self._checkpoint.manifest.files):
            size = sizes.get(f"{self._prefix}{record.name}")
            if size is None:
                self.require_committed(self._missing(file))
            if size != record.size:
                self._require_helped(file, sizes, self._missing(file) if size is None else self._truncated(file, size))

    def are_visible(self) -> bool:
        """Whether anything of the checkpoint can be seen from here: the manifest or, in a listing, a rank file."""
        try:
            self._store.open(f"{self._prefix}{MANIFEST_NAME}").close()
        except MissingFile:
            names = {f"{self._prefix}{record.name}" for record in self._checkpoint.manifest.files}
            return any(entry.name in names for entry in self._store.list(self._prefix.rstrip("/")))
        return True

    def require_committed(self, error: CheckpointError) -> None:
        """Raise `CheckpointRemoved` in place of ``error`` if the checkpoint is being removed: then its manifest went first."""
        try:
            found = manifest_digest(self._store.get(f"{self._prefix}{MANIFEST_NAME}", MANIFEST_LIMIT))
        except MissingFile:
            found = None
        except CheckpointError:
            return
        if found != self._checkpoint.digest:
            raise removed(self._store, self._prefix) from error

    def _require_helped(self, file: int, sizes: Mapping[str, int], error: CheckpointError) -> None:
        """Raise ``error`` about a file unless it can be rebuilt, as far as ``sizes`` tell."""
        try:
            obstacle = self._rebuilder.find_obstacle(file, sizes)
        except CheckpointError as found:
            obstacle = found.message
        if obstacle is not None:
            raise _unhelped(error, obstacle)

    def _reader(self, file: int) -> FileReader:
        with self._lock:
            reader = self._readers.get(file)
            if reader is None:
                reader = self._readers[file] = self._open(file)
            return reader

    def _open(self, file: int) -> FileReader:
        record = self._checkpoint.manifest.files[file]
        try:
            reader = self._store.open(f"{self._prefix}{record.name}")
        except MissingFile as error:
            raise self._missing(file) from error
        if reader.size != record.size:
            reader.close()
            raise self._truncated(file, reader.size)
        reader.expect_ascending()
        return reader

    def _missing(self, file: int) -> MissingFile:
        name = f"{self._prefix}{self._checkpoint.manifest.files[file].name}"
        return MissingFile(
            f"{name} is missing in {self._store.url}: the manifest names it as the file of rank {file}. "
            "The checkpoint was not copied whole, or files were removed; restore another step",
            name=name,
            rank=file,
        )

    def _truncated(self, file: int, got: int) -> TruncatedFile:
        record = self._checkpoint.manifest.files[file]
        name = f"{self._prefix}{record.name}"
        return TruncatedFile(
            f"{name} in {self._store.url} has {got} bytes, the manifest says {record.size}: "
            "it was cut or replaced; restore another step",
            name=name,
            wanted=record.size,
            got=got,
        )

    def _changed(self, file: int, start: int, stop: int) -> ChecksumMismatch:
        """The error for bytes ``[start, stop)`` of a file; the header tells of all tensors of the file."""
        record = self._checkpoint.manifest.files[file]
        name, low, high = f"{self._prefix}{record.name}", start - record.data, stop - record.data
        pieces = self._checkpoint.plan.file_pieces(file)
        tensors = [p.tensor.name for p in pieces if high <= 0 or (p.offset < high and p.offset + p.nbytes > low)]
        some = ", ".join(repr(tensor) for tensor in tensors[:4])
        return ChecksumMismatch(
            f"{name} in {self._store.url}: bytes [{start}, {stop}) do not match their digest. They "
            f"{'hold' if high > 0 else 'are the header of'} {some}{' and more' if len(tensors) > 4 else ''}. "
            "The data was changed after it was saved; restore another step",
            name=name,
            start=start,
            stop=stop,
            tensors=tensors,
        )

    def close(self) -> None:
        """Close what is still open."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._rebuilder.close()

    def __enter__(self) -> CheckpointFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def removed(store: Store, prefix: str) -> CheckpointRemoved:
    """The error for a checkpoint that was there when it was looked for, and is not any more."""
    url = f"{store.url}/{prefix}".rstrip("/")
    return CheckpointRemoved(
        f"the checkpoint {url} was removed while it was read, most likely by a prune: restore another step, and keep more "
        "of them (keep_last)",
        prefix=prefix,
    )


def _unhelped(error: CheckpointError, obstacle: str | None) -> CheckpointError:
    """``error``, with what keeps a parity from helping, if there is one."""
    if obstacle:
        error.add(f"It cannot be rebuilt from parity: {obstacle}")
    return error


def place(part: memoryview, dtype: str, source: Piece, destination: Destination) -> None:
    """Copy what ``destination`` wants of ``part``, which holds the elements ``source``, to its place.

    Elements are converted when the destination has another dtype; whether that may be is checked before anything is read.
    """
    data, target = destination.data, destination.piece
    same_dtype = data.dtype == getattr(torch, dtype)
    if same_dtype and source.grid == target.grid and not data.is_cuda:
        into = as_bytes(data)
        if into is not None:
            size = data.element_size()
            start = (source.start - target.start) * size
            low, high = max(start, 0), min(start + len(part), len(into))
            if low < high:
                np.copyto(into[low:high], np.frombuffer(part, dtype=np.uint8)[low - start : high - start])
            return
    stored = torch.frombuffer(part, dtype=getattr(torch, dtype))
    for copy in intersect(source, target):
        put(destination, copy, stored.as_strided(copy.sizes, source.grid_strides, copy.source_position))


@torch.no_grad()
def put(destination: Destination, copy: Copy, elements: torch.Tensor) -> None:
    """Write ``elements``, of shape ``copy.sizes``, to where ``copy`` says in the destination."""
    data, target = destination.data, destination.piece
    if target.is_window:
        # a window is one-dimensional and contiguous, whatever the shape of what it is cut from
        at = data.storage_offset() + copy.target_position
        data.as_strided(copy.sizes, target.grid_strides, at).copy_(elements)
    else:
        place_at = tuple(slice(o, o + n) for o, n in zip(copy.target_local, copy.sizes, strict=True))
        data[place_at].copy_(elements)
