# SPDX-License-Identifier: Apache-2.0
"""Tries out a place for checkpoints: what its file system can do, how fast it is, and how much room there is.

All that is written is removed again. What a killed process leaves has the name of a temporary file of a root (`is_temporary`),
and is removed by a later trial there.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import xxhash

from shardckpt.errors import CheckpointError, StoreError
from shardckpt.store.base import ALIGNMENT, TEMPORARY_SUFFIX, FileReader, Store
from shardckpt.store.filesystem import OPERATING_SYSTEM, FileSystem, closing
from shardckpt.store.local import LocalStore
from shardckpt.store.local_file import write_all
from shardckpt.store.oserror import explained
from shardckpt.store.publish import NEW_FILE_FLAGS, NO_LINKS

_FLUSHES: Final = 9
_FLUSH_SECONDS: Final = 2.0
_FIRST_BYTES: Final = 16 << 20
_FIRST_SECONDS: Final = 0.25
_PIECE: Final = 4 << 20
_THREADS: Final = 3
"""As many as saves have by default."""
_BUFFERS: Final = 4 * _THREADS
_SCRATCH: Final = re.compile(rf"probe\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}\Z", re.ASCII)
_ABANDONED_SECONDS: Final = 3600.0

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Space:
    """How much room a file system has for this user."""

    total: int
    """Bytes."""
    free: int
    """Bytes."""
    free_files: int | None
    """How many more files it can hold; None where it does not count them."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One file, written and made durable, then read past the page cache."""

    nbytes: int
    """Size of the file in bytes."""
    written: float
    """Bytes per second."""
    read: float
    """Bytes per second."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a store was found to be like."""

    direct: bool | None
    """Whether files are written with O_DIRECT; None where there is no such thing."""
    links: bool | None
    """Whether files can have a second name; None where there is no such thing."""
    flush_seconds: float | None
    """How long it takes until 4 KiB are durable; None where nothing is flushed."""
    speed: Speed | None
    """None where there was no room for a file."""


def nearest_directory(path: str, fs: FileSystem = OPERATING_SYSTEM) -> str:
    """The directory ``path`` or, if it is missing, the first one above it that is there.

    Raises `NotACheckpointRoot` when something else is there, and `StoreError`.
    """
    directory = os.path.abspath(path)
    with explained("look at", directory):
        while (mode := _mode(directory, fs)) is None:
            directory = os.path.dirname(directory)
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return directory


def _mode(path: str, fs: FileSystem) -> int | None:
    try:
        return fs.stat(path).st_mode
    except FileNotFoundError:
        with suppress(FileNotFoundError):
            # a link to nothing is no directory, and none can be made in its place
            return fs.lstat(path).st_mode
    return None


def some_file(directory: str, fs: FileSystem = OPERATING_SYSTEM) -> str | None:
    """Path, from ``directory`` on, of one file in it or below, those with a dot left out; None if there is none.

    Looks no further than that, however much there is. Raises `StoreError`.
    """
    with explained("list", directory):
        for leaf in sorted(fs.listdir(directory)):
            path = os.path.join(directory, leaf)
            mode = 0 if leaf.startswith(".") else fs.lstat(path).st_mode
            if stat.S_ISREG(mode):
                return leaf
            below = some_file(path, fs) if stat.S_ISDIR(mode) else None
            if below is not None:
                return os.path.join(leaf, below)
    return None


def space_in(directory: str, fs: FileSystem = OPERATING_SYSTEM) -> Space | None:
    """Room on the file system of a directory; None where it does not tell. Raises `StoreError`."""
    with explained("look at", directory):
        found = fs.statvfs(directory)
    if not found.f_blocks:
        return None
    unit = found.f_frsize or found.f_bsize
    return Space(found.f_blocks * unit, found.f_bavail * unit, found.f_favail if found.f_files else None)


def try_store(store: Store, most: int, fs: FileSystem = OPERATING_SYSTEM) -> Trial:
    """Try everything. Takes a few seconds, and ``most`` bytes of the storage for a moment; no file of less than 1 MiB is tried.

    Makes the root of the store if it is missing, and leaves it there. Raises `StoreError`.
    """
    if isinstance(store, LocalStore):
        remove_leftovers(store.url, fs)
    nbytes = most - most % ALIGNMENT
    speed = measure_speed(store, nbytes) if nbytes >= 1 << 20 else None
    if not isinstance(store, LocalStore):
        return Trial(direct=None, links=None, flush_seconds=None, speed=speed)
    return Trial(store.takes_direct(), has_links(store.url, fs), seconds_to_flush(store.url, fs), speed)


def remove_leftovers(directory: str, fs: FileSystem = OPERATING_SYSTEM) -> None:
    """Remove what this user's trials that were killed more than an hour ago have left in a directory, as far as it may.

    By the clock of the storage, which a file that is written now tells.
    """
    leaves: Sequence[str] = ()
    with suppress(OSError):
        leaves = fs.listdir(directory)
    old = [os.path.join(directory, leaf) for leaf in leaves if _SCRATCH.match(leaf)]
    if not old:
        return
    with suppress(StoreError), _scratch_file(directory, fs) as (new, _):
        now = fs.lstat(new).st_mtime
        for path in old:
            with suppress(OSError):
                status = fs.lstat(path)
                is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
                if is_ours and status.st_mtime < now - _ABANDONED_SECONDS:
                    fs.unlink(path)


def has_links(directory: str, fs: FileSystem = OPERATING_SYSTEM) -> bool:
    """Whether a file in a directory can be given a second name, so that it is published in one step. Raises `StoreError`."""
    second = os.path.join(directory, _scratch_name())
    with _scratch_file(directory, fs) as (path, _), explained("link", path):
        try:
            fs.link(path, second)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return False
        finally:
            _remove(second, fs)
    return True


def seconds_to_flush(directory: str, fs: FileSystem = OPERATING_SYSTEM, clock: Clock = perf_counter) -> float:
    """Seconds that it takes to write 4 KiB and make them durable; the median of a few times. Raises `StoreError`."""
    page, found = memoryview(mmap.mmap(-1, ALIGNMENT)), list[float]()
    with _scratch_file(directory, fs) as (path, fd), explained("flush", path):
        while len(found) < _FLUSHES and sum(found) < _FLUSH_SECONDS:
            begun = clock()
            write_all(fs, fd, page, len(found) * ALIGNMENT)
            fs.fsync(fd)
            found.append(clock() - begun)
    return statistics.median(found)


def measure_speed(store: Store, most: int, clock: Clock = perf_counter) -> Speed:
    """How fast a file of ``most`` bytes is written and read; of 16 MiB, if that alone takes longer than a quarter second.

    Raises `StoreError`, also when what is read is not what was written.
    """
    first = _move_file(store, min(most, _FIRST_BYTES), clock)
    if first.nbytes == most or first.nbytes > _FIRST_SECONDS * min(first.written, first.read):
        return first
    return _move_file(store, most, clock)


def _move_file(store: Store, nbytes: int, clock: Clock) -> Speed:
    name = _scratch_name()
    pattern = memoryview(mmap.mmap(-1, _PIECE))
    # nothing that a file system could compress
    pattern[:] = os.urandom(_PIECE)
    pieces = [(at, min(_PIECE, nbytes - at)) for at in range(0, nbytes, _PIECE)]
    expected = {length: _digest(pattern[:length]) for _, length in pieces}
    try:
        begun = clock()
        with store.create(name, nbytes) as writer, ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda piece: writer.write_at(piece[0], pattern[: piece[1]]), pieces))
            writer.finish()
        written = clock() - begun
        with store.open_uncached(name) as reader:
            read, found = _read_all(reader, pieces, clock)
    finally:
        with suppress(CheckpointError):
            store.delete(name)
    wrong = [piece for piece, digest in zip(pieces, found, strict=True) if digest != expected[piece[1]]]
    if wrong:
        raise StoreError(
            f"{store.url} returns other bytes than were written to it a moment ago, from byte {wrong[0][0]} of a file of "
            f"{nbytes} bytes on: the device, its driver or its network is broken; save nothing there",
            url=store.url,
            offset=wrong[0][0],
        )
    # a clock that does not see the time pass must not divide by it
    return Speed(nbytes, nbytes / max(written, 1e-9), nbytes / max(read, 1e-9))


def _read_all(reader: FileReader, pieces: Sequence[tuple[int, int]], clock: Clock) -> tuple[float, list[int]]:
    """Seconds that it takes to read pieces (offset, length), and their digests."""
    seconds, digests = 0.0, list[int]()
    buffers = [memoryview(mmap.mmap(-1, _PIECE)) for _ in range(min(_BUFFERS, len(pieces)))]
    for buffer in buffers:
        # the first write to memory takes as long as a read from a fast device
        buffer[:] = bytes(_PIECE)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(pieces), _BUFFERS):
            some = [(at, buffer[:length]) for (at, length), buffer in zip(pieces[first:], buffers, strict=False)]
            begun = clock()
            list(pool.map(lambda piece: reader.read_at(piece[0], [piece[1]]), some))
            seconds += clock() - begun
            digests += [_digest(piece) for _, piece in some]
    return seconds, digests


def _digest(piece: memoryview) -> int:
    return xxhash.xxh3_64_intdigest(piece)


@contextmanager
def _scratch_file(directory: str, fs: FileSystem) -> Iterator[tuple[str, int]]:
    """Path and descriptor of a new file, which is gone after the block."""
    path = os.path.join(directory, _scratch_name())
    with explained("create", path):
        fd = fs.open(path, NEW_FILE_FLAGS)
    try:
        with explained("close", path), closing(fs, fd):
            yield path, fd
    finally:
        _remove(path, fs)


def _remove(path: str, fs: FileSystem) -> None:
    with suppress(OSError):
        fs.unlink(path)


def _scratch_name() -> str:
    return f"probe.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
