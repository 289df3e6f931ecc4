# SPDX-License-Identifier: Apache-2.0
"""Verify: whether what is stored is what was saved. All problems are found, not only the first.

Without reading data: the manifest holds together, every file is there, regular and of the exact size, and its header is the
one that was written and the one that follows from the manifest. With ``read_data`` also every block of data, or of a subset of
it, matches its digest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from shardckpt.buffer import CHUNK, BufferPool
from shardckpt.checksum import damaged_blocks, digest, digests_between
from shardckpt.errors import CheckpointError, MissingFile
from shardckpt.failed_restores import FailedRestores
from shardckpt.header import safetensors_header
from shardckpt.manifest import MANIFEST_LIMIT, MANIFEST_NAME, manifest_digest, step_directory
from shardckpt.parity.layout import parity_record_name
from shardckpt.parity.record import find_parity
from shardckpt.reshard import Extent
from shardckpt.store import FileReader, Store
from shardckpt.tree import read_tree

from .damage import find_damage
from .stored import WORKERS, Progress, StoredCheckpoint, committed_prefixes, no_progress, open_checkpoint
from .subset import EVERYTHING, Portion, Subset

_FILES_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    kind: str
    """Name of the error of `shardckpt.errors` that describes it."""
    file: str
    """Name of the file in the store."""
    start: int | None = None
    """First byte of the range of the file that is concerned; None when the whole file or another one is."""
    stop: int | None = None
    """One past the last byte."""
    tensors: tuple[str, ...] = ()
    """Names of the tensors that have bytes there."""
    message: str
    """What is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found out about one checkpoint."""

    path: str
    """Where it is; `shardckpt.load` takes it."""
    step: int | None
    """Number of the training step; None when the manifest cannot be read."""
    files: int
    """Files that the manifest names."""
    bytes: int
    """Their size."""
    bytes_read: int
    """Bytes of data that were compared with their digests."""
    data_bytes: int
    """Bytes of data that there should be."""
    problems: tuple[Problem, ...]
    """What is wrong, by file; empty when all is well."""
    removed: bool = False
    """Whether it was removed, most likely by a prune, while it was looked at; then nothing else is known."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify(
    store: Store,
    *,
    read_data: bool = False,
    subset: Subset = EVERYTHING,
    workers: int = WORKERS,
    progress: Progress = no_progress,
) -> list[Verification]:
    """Verify the checkpoint in a store, or all committed steps of a root, by step, whatever is wrong with some of them.

    With ``read_data`` the ``subset`` of the data is read too; parity files only if that is all of it. A step of which all data
    was read and is good counts no longer as one that could not be restored. One manifest is held in memory at a time.

    Raises `CheckpointNotFound` when there is none, and `StoreError` when the store cannot be listed. All that is wrong with
    a checkpoint stands in the result.
    """
    prefixes = committed_prefixes(store)
    total = 0
    if read_data and progress is not no_progress:
        total = sum(_nbytes_to_read(store, prefix, subset) for prefix in prefixes)
    counter = _Counter(progress, total)
    found = []
    for prefix in prefixes:
        verification = _verify_one(store, prefix, read_data, subset, workers, counter)
        if read_data and subset == EVERYTHING and verification.ok and verification.step is not None:
            FailedRestores(store).forget(verification.step)
        found.append(verification)
    return found


def _nbytes_to_read(store: Store, prefix: str, subset: Subset) -> int:
    try:
        stored = open_checkpoint(store, prefix)
    except CheckpointError:
        return 0
    return _portion(stored, subset).nbytes


def _portion(stored: StoredCheckpoint, subset: Subset) -> Portion:
    plan = stored.checkpoint.plan
    return Portion(plan, stored.checkpoint.manifest.attempt, subset, max(CHUNK, plan.block_size))


def _verify_one(store: Store, prefix: str, read_data: bool, subset: Subset, workers: int, counter: _Counter) -> Verification:
    digest = None
    try:
        stored = open_checkpoint(store, prefix)
        digest = stored.checkpoint.digest
        read_tree(stored.checkpoint.manifest)
        verifier = _Verifier(stored, workers, counter, _portion(stored, subset) if read_data else None)
        verification = verifier.run(with_parity=subset == EVERYTHING)
    except CheckpointError as error:
        problem = Problem(kind=type(error).__name__, file=f"{prefix}{MANIFEST_NAME}", message=error.message)
        path = f"{store.url}/{prefix}".rstrip("/")
        verification = Verification(path=path, step=None, files=0, bytes=0, data_bytes=0, bytes_read=0, problems=(problem,))
    if verification.ok or _is_there(store, prefix, digest):
        return verification
    return replace(verification, removed=True, problems=())


def _is_there(store: Store, prefix: str, digest: str | None) -> bool:
    """Whether the checkpoint with a manifest of this SHA-256 is still there, or, for None, any manifest."""
    try:
        found = manifest_digest(store.get(f"{prefix}{MANIFEST_NAME}", MANIFEST_LIMIT))
    except MissingFile:
        return False
    except CheckpointError:
        return True
    return digest in (None, found)


@dataclass(slots=True)
class _Counter:
    """Bytes that were read or given up, over all checkpoints."""

    progress: Progress
    total: int
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.total)


@dataclass(frozen=True, slots=True)
class _Structure:
    """What a look at one file tells."""

    problems: list[Problem] = field(default_factory=list)
    readable: int = 0
    """Bytes of the data region whose digests can be compared: whole blocks that are there."""


class _Verifier:
    """Verifies one checkpoint."""

    def __init__(self, stored: StoredCheckpoint, workers: int, counter: _Counter, portion: Portion | None) -> None:
        """Of the data, the ``portion`` is read, if there is one."""
        self._stored = stored
        self._manifest = stored.checkpoint.manifest
        self._plan = stored.checkpoint.plan
        self._workers = workers
        self._counter = counter
        self._portion = portion
        self._bytes_read = 0

    def run(self, *, with_parity: bool) -> Verification:
        ranks = range(self._manifest.world_size)
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="shardckpt-verify") as threads:
            structures = list(threads.map(self._look_at, ranks))
        problems = [*self._check_place()]
        pool = BufferPool(self._workers, max(CHUNK, self._plan.block_size))
        for rank, structure in zip(ranks, structures, strict=True):
            problems += structure.problems
            if self._portion is not None:
                problems += self._read_data(rank, self._portion.chunks(rank), structure.readable, pool)
        problems += self._look_at_parity(read_data=self._portion is not None and with_parity)
        return Verification(
            path=self._stored.url,
            step=self._manifest.step,
            files=len(self._manifest.files),
            bytes=sum(file.size for file in self._manifest.files),
            bytes_read=self._bytes_read,
            data_bytes=int(self._plan.total_bytes),
            problems=tuple(problems),
        )

    def _problem(self, kind: str, rank: int, start: int, stop: int, message: str) -> Problem:
        record = self._manifest.files[rank]
        pieces = self._plan.lay_out(rank)
        low, high = start - record.data, stop - record.data
        tensors = tuple(p.tensor.name for p in pieces if p.offset < high and p.offset + p.nbytes > low)
        return Problem(kind=kind, file=self._name(rank), start=start, stop=stop, tensors=tensors, message=message)

    def _name(self, rank: int) -> str:
        return f"{self._stored.prefix}{self._manifest.files[rank].name}"

    def _look_at_parity(self, *, read_data: bool) -> Iterator[Problem]:
        """Problems of the parity, if there is to be one: the checkpoint loads all the same, but has lost its protection."""
        store, prefix, block_size = self._stored.store, self._stored.prefix, self._plan.block_size
        try:
            parity = find_parity(store, prefix, self._stored.checkpoint)
        except CheckpointError as error:
            name = f"{prefix}{parity_record_name(self._manifest.attempt)}"
            yield Problem(kind=type(error).__name__, file=name, message=error.message)
            return
        for body in parity.slices() if parity is not None else ():
            damage = find_damage(store, body, b"", block_size, workers=self._workers, read_data=read_data)
            if damage is not None:
                yield Problem(kind=damage.kind, file=body.name, message=damage.message)

    # ---- structure

    def _check_place(self) -> Iterator[Problem]:
        prefix, step = self._stored.prefix, self._manifest.step
        if prefix not in ("", f"{step_directory(step)}/"):
            message = f"the manifest is of step {step}, and its directory is {prefix.rstrip('/')}: it was renamed"
            yield Problem(kind="InvalidManifest", file=f"{prefix}{MANIFEST_NAME}", message=message)

    def _look_at(self, rank: int) -> _Structure:
        record = self._manifest.files[rank]
        try:
            with self._stored.store.open(self._name(rank)) as reader:
                problems = [*self._check_size(rank, reader), *self._check_header(rank, reader)]
                data = min(reader.size, record.size) - record.data
        except CheckpointError as error:
            return _Structure([self._problem(type(error).__name__, rank, 0, record.size, error.message)])
        if data < record.size - record.data:
            data -= data % self._plan.block_size
        return _Structure(problems, max(0, data))

    def _check_size(self, rank: int, reader: FileReader) -> Iterator[Problem]:
        wanted = self._manifest.files[rank].size
        message = f"the file has {reader.size} bytes, the manifest says {wanted}"
        if reader.size < wanted:
            yield self._problem("TruncatedFile", rank, reader.size, wanted, f"{message}: it was cut")
        elif reader.size > wanted:
            yield self._problem("IntegrityError", rank, wanted, reader.size, f"{message}: something was added to it")

    def _check_header(self, rank: int, reader: FileReader) -> Iterator[Problem]:
        record = self._manifest.files[rank]
        expected = safetensors_header(tuple(self._plan.lay_out(rank)))
        if len(expected) != record.data:
            message = f"the header that follows from the manifest has {len(expected)} bytes, the manifest says {record.data}"
            yield self._problem("InvalidManifest", rank, 0, record.data, message)
        elif reader.size >= record.data:
            header = bytearray(record.data)
            reader.read_at(0, [memoryview(header)])
            as_written = digest(memoryview(header)).hex() == record.header
            if header != expected:
                kind = "InvalidManifest" if as_written else "ChecksumMismatch"
                tail = "the file agrees with its digest" if as_written else "it was changed after it was written"
                start, stop = _differing_range(header, expected)
                yield self._problem(
                    kind, rank, start, stop, f"the header is not the one that follows from the manifest; {tail}"
                )
            elif not as_written:
                yield self._problem(
                    "InvalidManifest", rank, 0, record.data, "the header is right, its digest in the manifest not"
                )

    # ---- data

    def _read_data(self, rank: int, wanted: list[Extent], readable: int, pool: BufferPool) -> Iterator[Problem]:
        """Compare those blocks of ``wanted`` that are in the first ``readable`` bytes; damaged neighbours make one problem."""
        data = self._manifest.files[rank].data
        chunks = [(start, min(stop, readable)) for start, stop in wanted if start < readable]
        if chunks:
            try:
                damages = self._compare_all(rank, chunks, pool)
            except CheckpointError as error:
                damages = [_Damage(chunks[0][0], chunks[-1][1], type(error).__name__, error.message)]
            for damage in _join_neighbours(damages):
                yield self._problem(damage.kind, rank, data + damage.start, data + damage.stop, damage.message)
        self._counter.add(_length(wanted) - _length(chunks))

    def _compare_all(self, rank: int, chunks: list[Extent], pool: BufferPool) -> list[_Damage]:
        damages = []
        with (
            self._stored.store.open(self._name(rank)) as reader,
            ThreadPoolExecutor(self._workers, thread_name_prefix="shardckpt-verify") as threads,
        ):
            results = threads.map(lambda chunk: list(self._compare(rank, reader, chunk, pool)), chunks)
            for (start, stop), found in zip(chunks, results, strict=True):
                damages += found
                self._bytes_read += stop - start
                self._counter.add(stop - start)
        return damages

    def _compare(self, rank: int, reader: FileReader, chunk: Extent, pool: BufferPool) -> Iterator[_Damage]:
        start, stop = chunk
        with pool.borrow() as buffer:
            try:
                reader.read_at(self._manifest.files[rank].data + start, [buffer.bytes[: stop - start]])
            except CheckpointError as error:
                yield _Damage(start, stop, type(error).__name__, error.message)
                return
            size = self._plan.block_size
            wanted = digests_between(self._stored.checkpoint.digests[rank], start, stop, size)
            for number in damaged_blocks(buffer.bytes[: stop - start], size, wanted):
                at = start + number * size
                message = "the data does not match its digest: it was changed after it was saved"
                yield _Damage(at, min(at + size, stop), "ChecksumMismatch", message)


class _Damage(NamedTuple):
    """Bytes of a data region that are not what was saved, or cannot be read."""

    start: int
    stop: int
    kind: str
    message: str


def _join_neighbours(damages: Iterable[_Damage]) -> list[_Damage]:
    joined: list[_Damage] = []
    for damage in damages:
        last = joined[-1] if joined else None
        if last is not None and (last.stop, last.kind, last.message) == (damage.start, damage.kind, damage.message):
            joined[-1] = damage._replace(start=last.start)
        else:
            joined.append(damage)
    return joined


def _length(extents: list[Extent]) -> int:
    return sum(stop - start for start, stop in extents)


def _differing_range(a: bytes | bytearray, b: bytes | bytearray) -> Extent:
    """From the first to the last byte in which two equally long strings differ."""
    differing = [at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    return differing[0], differing[-1] + 1
