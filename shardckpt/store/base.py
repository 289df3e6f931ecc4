# SPDX-License-Identifier: Apache-2.0
"""The storage interface: what the engine may rely on, whatever holds the bytes.

The comments and docstrings in this file are the contract. Every store keeps it, and
``tests/store/test_conformance.py`` tries each store against it.

**Names** are relative, '/'-joined and printable, for example ``step-00001000/manifest.json``. `check_name` is
the only judge of names; every method that takes one raises `StoreError` for a name that it refuses.

**Durability.** When `FileWriter.finish`, `Store.put_if_absent` or `Store.delete` returns, a power cut cannot
undo it: neither the bytes nor the name, nor the name of any directory on the way. Before they return nothing
is promised. A flush that failed is never tried again, because the kernel may have dropped the data that it
could not write.

**Atomicity.** `Store.put_if_absent` and `Store.replace` are atomic. A file that is still being written by a `FileWriter` may
be listed and may be read in part; the engine publishes a file by naming it in something that is put with
`put_if_absent` afterwards.

**Threads.** A `Store` may be used from any number of threads. `FileWriter.write_at` and `FileReader.read_at`
may be called by several threads at once on one object; ``finish``, ``abort`` and ``close`` are called by one
thread, after the others have returned.

**Errors** are `StoreError` and its children, `MissingFile` and `TruncatedFile`; the cause is chained. An
error has the detail ``transient=True`` when the same call may well succeed later (see `retry.py`).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from shardckpt.errors import StoreError, TruncatedFile

ALIGNMENT: Final = 4096
"""Bytes. Offsets, lengths and addresses of all writes are multiples of it, so that each can be O_DIRECT."""

TEMPORARY_SUFFIX: Final = ".tmp"
"""Ends the name of every file that a store makes for its own use; see `is_temporary`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in a listing."""

    name: str
    """Relative to the root of the store; can be handed to `Store.open` and `Store.delete`."""
    size: int
    """Bytes."""
    modified: float
    """Seconds since the epoch, by the clock of the storage."""


def check_name(name: str) -> str:
    """Return ``name``, or raise `StoreError` with the rule that it breaks."""
    problem = name_problem(name)
    if problem is not None:
        raise StoreError(
            f"name {name!r} is refused: {problem}; names are relative and '/'-joined, as in 'step-1/manifest.json'",
            name=name,
        )
    return name


def name_problem(name: str) -> str | None:
    """Which rule for names ``name`` breaks; None when it is a good one."""
    parts = name.split("/")
    if name.startswith("/"):
        return "it is absolute"
    if "" in parts:
        return "it has an empty part"
    if "." in parts or ".." in parts:
        return "it has a part '.' or '..'"
    if "\\" in name:
        return "it has a backslash"
    if not name.isprintable():
        return "it has a character that cannot be printed"
    return None


def is_temporary(name: str) -> bool:
    """Whether ``name`` belongs to a store's own housekeeping.

    Such a file is left behind only by a process that was killed; `Store.list` shows it, nothing refers to it,
    and it may be deleted once no process that writes is left.
    """
    return name.endswith(TEMPORARY_SUFFIX)


class FileWriter(ABC):
    """Writes one new file, in any order and from several threads.

    Each byte in ``[0, size)`` is written exactly once; `finish` refuses a file with bytes missing. Leaving a
    ``with`` block without a `finish` that succeeded aborts.
    """

    alignment: int = ALIGNMENT

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self._written = 0
        self._lock = threading.Lock()
        self._state = "open"

    def write_at(self, offset: int, buffer: memoryview) -> None:
        """Write all of ``buffer`` (1-D, bytes) at ``offset`` (bytes); then the buffer may be reused.

        The offset, the length and the memory address are multiples of `alignment`. The last write may
        therefore reach past ``size``: what lies there is cut off by `finish`. Short writes are resumed.
        Raises `StoreError`; after an error the only useful call is `abort`.
        """
        end = offset + buffer.nbytes
        limit = -(-self.size // self.alignment) * self.alignment
        if offset % self.alignment or buffer.nbytes % self.alignment or not 0 <= offset <= end <= limit:
            raise StoreError(
                f"write of bytes [{offset}, {end}) to {self.name} ({self.size} bytes) is refused: both ends "
                f"must be multiples of {self.alignment} and lie in [0, {limit}]",
                name=self.name,
                offset=offset,
                length=buffer.nbytes,
            )
        self._require_open("written to")
        self._write(offset, buffer)
        with self._lock:
            self._written += min(end, self.size) - offset

    def finish(self) -> None:
        """Cut the file to ``size`` bytes, make it durable under its name, and close it.

        Raises `StoreError`, also when some bytes were never written. After an error the file is not to be
        trusted: nothing is tried again, and `abort` removes it.
        """
        self._require_open("finished")
        if self._written != self.size:
            raise StoreError(
                f"{self.name} cannot be finished: {self._written} of {self.size} bytes were written, each byte "
                "must be written exactly once",
                name=self.name,
                wanted=self.size,
                got=self._written,
            )
        self._state = "failed"
        self._finish()
        self._state = "finished"

    def abort(self) -> None:
        """Remove the file and free what the writer holds; does nothing after a `finish` that succeeded.

        Never raises `StoreError`: it is called while another error is on its way. What it cannot remove is
        logged.
        """
        if self._state not in ("finished", "aborted"):
            self._state = "aborted"
            self._abort()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.abort()

    def _require_open(self, what: str) -> None:
        if self._state != "open":
            raise StoreError(f"{self.name} cannot be {what}: its writer is {self._state}", name=self.name)

    @abstractmethod
    def _write(self, offset: int, buffer: memoryview) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _abort(self) -> None: ...


class FileReader(ABC):
    """Reads one file, at any offset and from several threads."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        """Bytes, as found at open."""

    def read_at(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all ``buffers`` (1-D, bytes, writable; any alignment), in order, from ``offset`` (bytes) on.

        Short reads are resumed. Raises `TruncatedFile` (details ``name``, ``offset``, ``wanted``, ``got``)
        when the file ends before, and `StoreError`; then the content of the buffers is undefined.
        """
        wanted = sum(buffer.nbytes for buffer in buffers)
        if offset < 0 or offset + wanted > self.size:
            raise self._truncated(offset, wanted, got=max(0, self.size - offset))
        self._fill(offset, [buffer for buffer in buffers if buffer.nbytes])

    def expect_ascending(self) -> None:  # noqa: B027  (a hint: a store need not take it)
        """Hint that reads will mostly go from low to high offsets, so that reading far ahead pays. Never fails or waits."""

    @abstractmethod
    def close(self) -> None:
        """Free what the reader holds; a second call does nothing."""

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _truncated(self, offset: int, wanted: int, got: int) -> TruncatedFile:
        return TruncatedFile(
            f"{self.name} is too short: wanted {wanted} bytes at offset {offset}, got {got}; the file was "
            "cut, or is not the one that was written",
            name=self.name,
            offset=offset,
            wanted=wanted,
            got=got,
        )

    @abstractmethod
    def _fill(self, offset: int, buffers: list[memoryview]) -> None: ...


class Store(ABC):
    """A space of files under one root.

    Nothing is made before the first write; a root that is missing is empty.
    """

    url: str
    """Names the root in messages; `open_store` takes it."""

    @abstractmethod
    def create(self, name: str, size: int) -> FileWriter:
        """Start a new file of ``size`` bytes; directories are made as needed.

        Raises `AlreadyExists` when the name is taken; an existing file is never touched. (An object store
        cannot reserve a name: two writers that create one name at the same time are not told, so names carry
        an attempt id.)
        """

    @abstractmethod
    def replace(self, name: str, size: int) -> FileWriter:
        """Start a file of ``size`` bytes that takes the place of ``name``, if that is there, at its `FileWriter.finish`.

        That happens at once: whoever opens the name gets the whole old file or the whole new one. Until then, and after
        `FileWriter.abort`, the old one is there as it was; after a ``finish`` that failed, either of them. Only for repairs:
        a save never replaces anything.
        """

    @abstractmethod
    def open(self, name: str) -> FileReader:
        """Open a file to read. Raises `MissingFile`, and `StoreError` for all but regular files, links included."""

    def open_uncached(self, name: str) -> FileReader:
        """As `open`, to read what the storage itself holds of a file that is durable, and not what this host remembers.

        As far as the system lets us; where nothing is remembered this is `open`.
        """
        return self.open(name)

    def get(self, name: str, limit: int) -> bytes:
        """Return a whole small file of at most ``limit`` bytes.

        Raises `MissingFile`, or `StoreError` (details ``size``, ``limit``) before a byte is read or memory is
        taken.
        """
        with self.open(name) as reader:
            if reader.size > limit:
                raise StoreError(
                    f"{name} in {self.url} has {reader.size} bytes, more than the {limit} that are read at "
                    "most; it is not what its name says, or was damaged",
                    name=name,
                    size=reader.size,
                    limit=limit,
                )
            data = bytearray(reader.size)
            reader.read_at(0, [memoryview(data)])
        return bytes(data)

    @abstractmethod
    def put_if_absent(self, name: str, data: bytes) -> None:
        """Make ``name`` appear with ``data``, whole and durable, if and only if it does not exist.

        Of several racing writers exactly one wins; the others get `AlreadyExists` and change nothing.
        Outcomes that the storage leaves open (a reply that was lost) are settled here, by looking. After any
        other error the name may or may not exist, and must not be reported as durable; a detail ``claim`` says that
        it may be that of a writer that is slow or dead.
        """

    def put_if_allowed(self, name: str, data: bytes, allow: Callable[[], None]) -> None:
        """As `put_if_absent`, but only if ``allow``, which is called as late as the storage can, does not raise.

        Raises `MissingFile`, and changes nothing, when somebody has called `revoke` for the name in the meantime.
        """
        allow()
        self.put_if_absent(name, data)

    def revoke(self, name: str) -> None:  # noqa: B027  (not every storage has such a thing)
        """Stop every `put_if_allowed` of ``name`` whose ``allow`` was called before: it has either succeeded when this returns,
        or fails. Those whose ``allow`` comes later are not concerned.

        A local store does so, by taking the temporary files away that were to get the name. In an object store, where a put
        is one request, nothing can be stopped, and nothing happens.
        """

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[Entry]:
        """All regular files under the directory ``prefix`` (all files for ""), at any depth, sorted by name.

        A prefix that is missing or is a file gives an empty list. Temporary files are listed
        (`is_temporary`), files with names that `check_name` refuses are not. Files that come or go during the
        call may be listed or not.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, durably; a missing one is no error.

        Directories that this leaves empty are removed too, the root excepted.
        """

    def make_durable(self, name: str) -> None:  # noqa: B027  (where what can be seen is durable, there is nothing to do)
        """Make a file that another process has put last: that one may have been killed before it came to this.

        When this returns, a power cut cannot undo the `put_if_absent`. Raises `StoreError`; `MissingFile`, if it looks and
        there is none.
        """

    def empty_directories(self) -> Sequence[Entry]:
        """Directories right under the root that have nothing in them: what a process has left that was killed.

        To `delete` a file that is not there, in one of them, removes it. Stores without directories have none.
        """
        return ()
